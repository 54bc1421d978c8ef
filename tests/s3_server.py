"""A real S3 server of our own on this machine (SeaweedFS), on the loopback interface only."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import threading
import time
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.error import HTTPError, URLError
from urllib.parse import unquote
from urllib.request import urlopen

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

USER, SECRET = "a-user-of-tests", "a-secret-that-nobody-may-keep"
WAIT = 60.0
GRPC = 10000
"""What is added to each port of the program for another one."""


def program() -> str | None:
    """Return the path of ``weed``; None where there is none."""
    return shutil.which("weed", path=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _free_ports() -> int:
    """Return the first of four ports in a row that are free, with their twins.

    All lie below those that systems give to whoever connects.
    """
    for attempt in range(1000):
        port = 10000 + (os.getpid() + attempt) % 2500 * 4
        if all(_is_free(port + n + twin) for n in range(4) for twin in (0, GRPC)):
            return port
    raise RuntimeError("no ports are free")


class Server:
    """The server of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, _free_ports()
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "data").mkdir()
        identity = {
            "name": "test",
            "credentials": [{"accessKey": USER, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "List", "Tagging", "Write"],
        }
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))

    @property
    def environment(self) -> dict[str, str]:
        """What its clients need."""
        return {
            "AWS_ACCESS_KEY_ID": USER,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
        }

    def start(self) -> None:
        weed, port, log = program(), self.port, self.folder / "log"
        assert weed is not None
        command = [
            weed, "-logtostderr=true", "server", f"-dir={self.folder / 'data'}",
            "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false",
            f"-master.port={port + 1}", f"-volume.port={port + 2}", "-volume.max=20",
            "-volume.preStopSeconds=0", "-master.volumeSizeLimitMB=256",
            "-filer", f"-filer.port={port + 3}", f"-filer.localSocket={self.folder / 'f.sock'}",
            "-s3", f"-s3.port={port}", f"-s3.localSocket={self.folder / 's.sock'}",
            f"-s3.config={self.folder / 's3.json'}", "-s3.iam=false",
            "-s3.port.iceberg=0", "-s3.port.lance=0",
        ]  # fmt: skip
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        end = time.monotonic() + WAIT
        while not (self._answers() and b"Start Seaweed S3 API" in log.read_bytes()):
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"no S3 server: {log.read_text()[-2000:]}")
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            urlopen(f"http://127.0.0.1:{self.port}/", timeout=1).close()
        except HTTPError as error:  # it knows who may not
            error.close()
            return True
        except (URLError, OSError):
            return False
        return True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let it answer nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()  # its own end takes seconds
            self._process.wait()


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """Serve until the end."""
    server = Server(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def counted(server: Server) -> Iterator[tuple[str, list[str]]]:
    """Give another address of a server, and the requests that come in there, as they come."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            requests.append(f"{self.command} {unquote(self.path)}")
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            connection = HTTPConnection("127.0.0.1", server.port)
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers.items():  # the host, too, is signed
                connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            content = response.read()
            self.send_response_only(response.status, response.reason)
            for name, value in response.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            length = response.getheader("Content-Length", "0")
            self.send_header(
                "Content-Length", length if self.command == "HEAD" else str(len(content))
            )
            self.end_headers()
            self.wfile.write(content)
            connection.close()

        do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = forward

        def log_message(self, *_: object) -> None:
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=proxy.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{proxy.server_port}", requests
    finally:
        proxy.shutdown()
        thread.join()
        proxy.server_close()
