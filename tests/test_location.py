"""Laws of places: a file system and an object store do the same."""

from __future__ import annotations

import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from tilepipe.errors import BadRequest
from tilepipe.storage import appending, objects
from tilepipe.storage.appending import GrowingObjects, append
from tilepipe.storage.location import (
    check_writable,
    find,
    folders,
    hold,
    locate,
    remove_if,
    replace,
)
from tilepipe.storage.objects import ObjectKey, explain

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.s3_server import Server
    from tilepipe.storage.location import Place


def test_what_is_written_is_found(folder: Place) -> None:
    assert find(folder, "") == []
    for name in ("b", "ab", "aa"):
        replace(folder / name, name.encode())
    (folder / "in").mkdir()
    replace(folder / "in" / "c", b"1")
    replace(folder / "in" / "c", b"22")
    assert [path.name for path in find(folder, "a")] == ["aa", "ab"]
    assert [path.name for path in folders(folder)] == ["in"]
    assert {path.name for path in folder.iterdir()} == {"b", "ab", "aa", "in"}
    assert (folder / "in" / "c").read_bytes() == b"22"
    assert (folder / "in" / "c").parents[:2] == (folder / "in", folder)
    found = [(p.exists(), p.is_file(), p.is_dir()) for p in (folder / "in", folder / "b")]
    assert found == [(True, False, True), (True, True, False)]
    assert not (folder / "a").exists()  # though names begin so
    with pytest.raises(FileNotFoundError):
        (folder / "a").read_bytes()
    (folder / "in" / "c").unlink()
    if isinstance(folder, ObjectKey):
        (folder / "in").unlink()  # this server shows what is empty now
    else:
        (folder / "in").rmdir()
    (folder / "b").unlink()
    assert [path.name for path in find(folder, "a")] == ["aa", "ab"]
    (folder / "aa").unlink(missing_ok=True)
    (folder / "aa").unlink(missing_ok=True)
    assert [path.name for path in find(folder, "")] == ["ab"]


def test_of_many_at_once_one_creates(folder: Place) -> None:
    start, found = threading.Barrier(8), []

    def create(n: int) -> None:
        start.wait()
        found.append(hold(folder / "lock", b"%d" % n))

    threads = [threading.Thread(target=create, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [held] = [one for one in found if one is not None]
    assert held.rewrite(b"again")
    assert (folder / "lock").read_bytes() == b"again"
    held.close()


def test_what_another_has_is_not_written_over(folder: Place) -> None:
    path = folder / "lock"
    first = hold(path, b"first")
    assert first is not None
    path.unlink()
    second = hold(path, b"other")
    assert second is not None
    first.rewrite(b"again")
    assert path.read_bytes() == b"other"
    for one in (first, second):
        one.close()


def test_of_many_who_remove_the_dead_none_removes_the_living(folder: Place) -> None:
    path = folder / "lock"
    replace(path, b"dead")
    start, taken = threading.Barrier(8), []

    def take(n: int) -> None:
        start.wait()
        remove_if(path, lambda content: content == b"dead")
        taken.append(hold(path, b"alive %d" % n))

    threads = [threading.Thread(target=take, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [held] = [one for one in taken if one is not None]
    held.close()
    assert path.read_bytes().startswith(b"alive")
    remove_if(path, lambda content: content == b"dead")
    assert path.read_bytes().startswith(b"alive")
    assert [one.name for one in find(folder, "")] == ["lock"]


def granted() -> None:
    """Whoever writes here may do so."""


def test_what_is_appended_is_read_in_order(folder: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(appending, "PART", 100)
    monkeypatch.setattr(appending, "FLUSH", 0.01)
    records = [b"%07d\n" % n for n in range(300)]
    for part in (records[:100], records[100:]):
        with closing(append(folder / "done", granted)) as file:
            for record in part:
                file.write(record)
                if record.endswith(b"50\n"):
                    file.sync()
    whole = b"".join(path.read_bytes() for path in find(folder, "done"))
    assert whole == b"".join(records)
    assert len(find(folder, "done")) < len(records) / 5


def test_two_who_append_lose_nothing(prefix: Callable[[], str]) -> None:
    """One who was taken for dead, and is not, and who took over."""
    key = ObjectKey.parse(prefix()) / "done"
    with closing(GrowingObjects(key, granted)) as dead:
        dead.write(b"1")
        dead.sync()
        with closing(GrowingObjects(key, granted)) as heir:
            heir.write(b"2")
            heir.sync()
            for n in range(3):
                dead.write(b"a%d" % n)
                dead.sync()
                heir.write(b"b%d" % n)
                heir.sync()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(appending, "PART", 1)
            dead.write(b"c")
            dead.sync()
            dead.write(b"d")
            dead.sync()
    found = [path.read_bytes() for path in find(key.parent, "done")]
    assert found == [b"1a0a1a2c", b"2b0b1b2", b"d"]


def test_what_was_appended_is_seen_soon(
    prefix: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(appending, "FLUSH", 0.05)
    key = ObjectKey.parse(prefix()) / "done"
    with closing(GrowingObjects(key, granted)) as file:
        file.write(b"1")
        for _ in range(200):
            if find(key.parent, "done"):
                break
            threading.Event().wait(0.05)
        [there] = find(key.parent, "done")
        assert there.read_bytes() == b"1"


def test_a_store_that_refuses_for_long_is_told(
    prefix: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = ObjectKey.parse(prefix()) / "done"
    parts = GrowingObjects(key, granted)
    parts.write(b"1")
    objects._store.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(appending, "PATIENCE", 0.0)
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(PermissionError, match="SignatureDoesNotMatch"):
            parts.sync()
        with pytest.raises(PermissionError, match="SignatureDoesNotMatch"):
            parts.write(b"2")
    objects._store.cache_clear()
    parts.write(b"3")
    parts.close()
    [there] = find(key.parent, "done")
    assert there.read_bytes() == b"13"


def test_a_thread_that_fails_for_good_is_told(
    prefix: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what is no OSError, such as a fault of a library: nothing is written any more."""
    monkeypatch.setattr(appending, "FLUSH", 0.01)
    parts = GrowingObjects(ObjectKey.parse(prefix()) / "done", granted)
    with monkeypatch.context() as patch:
        patch.setattr(objects, "_store", lambda *_, **__: None)  # no store, says obstore
        parts.write(b"1")
        parts._thread.join(timeout=60)
        assert not parts._thread.is_alive()
        with pytest.raises(OSError, match=r"done: .*None") as caught:
            parts.write(b"2")
        assert "\n" not in str(caught.value)
    parts.close()


def test_a_store_that_creates_again_what_exists_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server that takes any object, whatever the condition, as old ones do."""
    held: list[str] = []

    class Heedless(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            held.append(self.headers["If-None-Match"])
            self.send_response(200)
            self.send_header("ETag", f'"{len(held)}"')
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_POST(self) -> None:  # to remove several at once, here one
            asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
            held.clear()
            name = asked.partition("<Key>")[2].partition("</Key>")[0]
            said = f"<DeleteResult><Deleted><Key>{name}</Key></Deleted></DeleteResult>".encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Heedless)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    objects._store.cache_clear()
    try:
        with pytest.raises(OSError, match="creates again what exists"):
            check_writable(ObjectKey.parse("s3://tests/o"), "probe")
        assert held == []  # what was tried was removed
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        objects._store.cache_clear()


def test_a_place_to_write_is_left_as_it_was(folder: Place) -> None:
    check_writable(folder, "probe")
    assert find(folder, "") == []


def test_what_a_store_refuses_is_told_in_one_line(
    s3: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    objects._store.cache_clear()
    try:
        key = ObjectKey.parse("s3://tests/refused")
        with pytest.raises(
            PermissionError, match=r"^s3://tests/refused: SignatureDoes\w+: The req"
        ):
            key.read_bytes()
        with pytest.raises(OSError, match="SignatureDoesNotMatch") as caught:
            key.is_dir()
    finally:
        objects._store.cache_clear()
    assert "\n" not in str(caught.value)


def test_no_secret_is_in_an_address_or_an_error() -> None:
    for address in ("s3://user:hush@bucket/a", "https://host/a?token=hush", "s3://bucket/a b"):
        with pytest.raises(BadRequest) as caught:
            locate(address, "output")
        assert "hush" not in str(caught.value)
    error = ValueError(
        "GET https://x.test/a/b?sv=1&sig=hush in 3 ms: timeout\n\nDebug source: hush"
    )
    assert explain(error) == "GET https://x.test/a/b in 3 ms: timeout"
