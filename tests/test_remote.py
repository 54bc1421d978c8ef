"""Laws of object stores: from and to a bucket, whatever happens, a folder's bytes come out."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import signal
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import obstore
import obstore.store
import pytest
from click.testing import CliRunner

from tests import s3_server
from tests.commands import Commands, until
from tests.s3_server import SECRET
from tests.support import noise, write_unet, write_volume
from tilepipe.cli import main
from tilepipe.commands.inspect import describe_file
from tilepipe.commands.progress import SegmentProgress
from tilepipe.errors import TileError
from tilepipe.evaluation.evaluate import evaluate
from tilepipe.geometry import Region
from tilepipe.options import Options
from tilepipe.runs import fence, lease
from tilepipe.runs.fence import Right
from tilepipe.runs.ledger import Ledger
from tilepipe.segmentation.segment import plan_segment, segment
from tilepipe.segmentation.worker import SegmentJob
from tilepipe.storage import appending
from tilepipe.storage import objects as stores
from tilepipe.storage.names import LEDGER
from tilepipe.storage.objects import ObjectKey, remove_keys
from tilepipe.volumes.output import Output
from tilepipe.volumes.volume import open_volume

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.s3_server import Server
    from tilepipe.segmentation.report import Report

EDGE, TILES = 64, 36
OPTIONS = Options(tile=(EDGE, EDGE), chunks=(EDGE, EDGE), shards=(EDGE, EDGE), threads=1)
SIZES = ("--tile", "64,64", "--chunks", "64,64", "--shards", "64,64", "--threads", "1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a volume of 6 x 6 tiles, a network, and what one process made of them."""
    folder = tmp_path_factory.mktemp("remote")
    write_unet(folder / "net.pt", depth=2, base=8, normalize="zscore")
    write_volume(folder / "v.zarr", noise(6 * EDGE - 9, 6 * EDGE), "yx", chunks=(96, 96))
    run(folder, folder / "v.zarr", folder / "serial.zarr")
    return folder


@pytest.fixture(scope="module")
def slow(made: Path) -> Path:
    """The same folder, with a network that takes seconds, and what it made in ``slow.zarr``."""
    write_unet(made / "slow.pt", depth=2, base=128, normalize="zscore")
    run(made, made / "v.zarr", made / "slow.zarr", model=made / "slow.pt")
    return made


@pytest.fixture(scope="module")
def source(made: Path, prefix: Callable[[], str]) -> str:
    """The volume in a bucket."""
    address = prefix() + "/v.zarr"
    for path in (made / "v.zarr").rglob("*"):
        if path.is_file():
            (ObjectKey.parse(address) / str(path.relative_to(made / "v.zarr"))).write_bytes(
                path.read_bytes()
            )
    return address


@pytest.fixture
def target(prefix: Callable[[], str]) -> str:
    return prefix() + "/o.zarr"


@pytest.fixture(scope="module")
def commands(s3: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    started = Commands(tmp_path_factory.mktemp("commands"))
    yield started
    started.server.kill()
    started.server.communicate()


def run(made: Path, source: str | Path, output: str | Path, **more: object):  # type: ignore[no-untyped-def]
    asked = {"model": made / "net.pt", "options": OPTIONS, "engine": "serial", **more}
    return segment(source, output=output, **asked)  # type: ignore[arg-type]


def command(made: Path, target: str, *more: str, model: str = "net.pt") -> list[str]:
    named = ["--model", str(made / model), "-o", target]
    return ["segment", str(made / "v.zarr"), *named, *SIZES, "--engine", "serial", *more]


def objects(address: str) -> dict[str, bytes]:
    """Return all that lies below an address."""
    key = ObjectKey.parse(address)
    store = key.store()
    return {
        one["path"]: bytes(obstore.get(store, one["path"]).bytes())
        for page in obstore.list(store)
        for one in page
        if one["size"]  # this server shows folders as empty objects
    }


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def voxels(found: dict[str, bytes]) -> dict[str, bytes]:
    """Return what belongs to the array."""
    return {name: content for name, content in found.items() if name.startswith("0/")}


def check_whole(made: Path, target: str, like: str = "serial.zarr") -> None:
    assert voxels(objects(target)) == voxels(files(made / like))
    assert Output.at(target).read_attributes()["state"] == "done"
    ledger = Ledger.open(Output.at(target), write=False)
    assert ledger is not None
    with ledger:
        assert (ledger.done, ledger.failures) == (TILES, [])


def done(target: str) -> int:
    """Return how many tiles a ledger has; 0 where there is none yet."""
    ledger = Ledger.open(Output.at(target), write=False)
    if ledger is None:
        return 0
    with ledger:
        return ledger.done


def test_a_bucket_gives_the_bytes_of_a_folder(
    made: Path, source: str, target: str, tmp_path: Path
) -> None:
    assert run(made, source, tmp_path / "o.zarr").done == TILES
    assert voxels(files(tmp_path / "o.zarr")) == voxels(files(made / "serial.zarr"))
    assert run(made, source, target).done == TILES
    check_whole(made, target)
    assert sorted(path.name for path in ObjectKey.parse(f"{target}/{LEDGER}").iterdir()) == [
        "done.000000", "log.000000", "plan.json",
    ]  # fmt: skip
    before = objects(target)
    again = run(made, source, target)
    assert (again.before, again.done) == (TILES, 0)
    assert objects(target) == before
    opened = Output.at(target).open()
    assert (opened.path, opened.shape) == (target, open_volume(target).shape)
    assert evaluate(target, made / "serial.zarr").pixels.pixel_error == 0  # type: ignore[union-attr]


def test_one_answer_is_asked_for_once(
    made: Path, s3: Server, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tile is one request; beside them, those of a whole run are few, whatever its size."""
    monkeypatch.setattr(fence, "FRESH", 3600)  # what is asked again as time goes by is left out
    monkeypatch.setattr(appending, "FLUSH", 3600)
    monkeypatch.setattr(lease, "BEAT", 3600)
    most = {"first": 43, "again": 31, "anew": 53}
    with (
        s3_server.counted(s3) as (address, requests),
        fresh_stores(),
        monkeypatch.context() as patch,
    ):
        patch.setenv("AWS_ENDPOINT_URL", address)
        for name, bound in most.items():
            requests.clear()
            report = run(made, made / "v.zarr", target, overwrite=name == "anew")
            assert report.done == (0 if name == "again" else TILES)
            voxels = [request for request in requests if "/0/c/" in request]
            assert len(voxels) == report.done, voxels
            looks = [request for request in requests if re.fullmatch("GET .*/lock", request)]
            assert len(looks) <= 6, looks  # of threads that look at the same moment each asks
            others = [request for request in requests if request not in (*voxels, *looks)]
            assert len(others) <= bound, (name, len(others), "\n".join(others))
    check_whole(made, target)


def test_a_plan_writes_nothing(made: Path, target: str) -> None:
    parent = str(ObjectKey.parse(target).parent)
    plan_segment(made / "v.zarr", model=made / "net.pt", output=target, options=OPTIONS)
    assert not [one for page in obstore.list(ObjectKey.parse(parent).store()) for one in page]


def test_an_output_in_a_bucket_is_read_as_in_a_folder(made: Path, target: str) -> None:
    run(made, made / "v.zarr", target)
    image, level = open_volume(target), open_volume(f"{target}/0")
    known = open_volume(made / "serial.zarr")
    assert (image.axes, image.scale, image.kind) == (known.axes, known.scale, known.kind)
    assert (level.axes, level.scale) == (known.axes, known.scale)
    values, text = describe_file(target)
    assert (values["tiles"], values["done"]) == (TILES, TILES)
    assert f"{TILES} of {TILES} done" in text


@pytest.mark.long
def test_workers_write_to_a_bucket(made: Path, source: str, target: str) -> None:
    report = run(made, source, target, engine="dask", workers=2)
    assert (report.done, report.failures) == (TILES, [])
    check_whole(made, target)


@pytest.mark.long
def test_killed_at_any_moment_it_goes_on(slow: Path, commands: Commands, target: str) -> None:
    arguments, kept = command(slow, target, model="slow.pt"), [0]
    for least in (0, 1):
        pid = commands.start(arguments)
        until(lambda least=least: ObjectKey.parse(target).exists() and done(target) >= least)  # type: ignore[misc]
        os.killpg(pid, signal.SIGKILL)
        code, said = commands.end()
        assert code == -signal.SIGKILL, said
        kept.append(done(target))
    assert 0 < kept[-1] < TILES
    code, said = commands.run(arguments)
    assert (code, f"{kept[-1]} of them before" in said) == (0, True), said
    check_whole(slow, target, "slow.zarr")
    ledger = [path.name for path in ObjectKey.parse(f"{target}/{LEDGER}").iterdir()]
    assert len(ledger) <= 1 + 2 * len(kept), ledger


@pytest.mark.long
def test_tasks_of_an_array_share_a_bucket(slow: Path, s3: Server, target: str) -> None:
    """All begin at once; one is killed, and what it leaves the others do."""
    forks = [Commands(slow / name) for name in ("1", "2", "3") if (slow / name).mkdir() is None]
    try:
        shards = [command(slow, target, "--task", f"{n}/3", model="slow.pt") for n in (1, 2, 3)]
        pids = [fork.start(task) for fork, task in zip(forks, shards, strict=True)]
        until(lambda: (ObjectKey.parse(target) / LEDGER / "lock-2").is_file())
        os.killpg(pids[1], signal.SIGKILL)
        ends = [fork.end() for fork in forks]
        assert [code for code, _ in ends] == [0, -signal.SIGKILL, 0], ends
        if done(target) < TILES:  # the others had ended before it was dead
            code, said = forks[0].run(shards[0])
            assert code == 0, said
        check_whole(slow, target, "slow.zarr")
        kept = {path.name for path in ObjectKey.parse(f"{target}/{LEDGER}").iterdir()}
        assert not {name for name in kept if name.startswith("lock")} - {"lock-2"}
    finally:
        for fork in forks:
            fork.server.kill()
            fork.server.communicate()


def test_an_output_is_replaced_when_asked_and_never_what_is_not_ours(
    made: Path, target: str
) -> None:
    run(made, made / "v.zarr", target, options=Options(tile=(128, 128), chunks=(64, 64)))
    with pytest.raises(ValueError, match="another plan"):
        run(made, made / "v.zarr", target)
    run(made, made / "v.zarr", target, overwrite=True)
    check_whole(made, target)
    foreign = ObjectKey.parse(target) / "thesis"
    foreign.write_bytes(b"years of work")
    with pytest.raises(ValueError, match="holds thesis"):
        run(made, made / "v.zarr", target, overwrite=True)
    other = ObjectKey.parse(target).parent / "other"
    (other / "data").write_bytes(b"1")
    with pytest.raises(ValueError, match=r"no output of tilepipe"):
        run(made, made / "v.zarr", str(other), overwrite=True)
    assert foreign.read_bytes() == b"years of work"
    assert (other / "data").read_bytes() == b"1"


@pytest.mark.parametrize("name", ["a%20b.zarr", "a%2Fb.zarr", "100%.zarr", "a+é.zarr"])
def test_an_address_is_taken_as_it_stands(made: Path, prefix: Callable[[], str], name: str) -> None:
    """Metadata, voxels and the ledger lie below the same key."""
    target = f"{prefix()}/{name}"
    run(made, made / "v.zarr", target)
    check_whole(made, target)
    assert (ObjectKey.parse(target) / "0" / "zarr.json").is_file()
    assert [key.name for key in ObjectKey.parse(target).parent.iterdir()] == [name]


def test_removing_what_is_not_there_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 says nothing of it; this store does, as Google's and Azure's do."""
    store = obstore.store.LocalStore(tmp_path, automatic_cleanup=True)
    monkeypatch.setattr(stores, "_store", lambda *_, **__: store)
    key = ObjectKey.parse("gs://bucket/folder")
    with pytest.raises(FileNotFoundError):
        obstore.delete(store, "folder")
    key.unlink(missing_ok=True)
    (key / "a").write_bytes(b"1")
    remove_keys([found for found, _ in key.objects()])
    remove_keys([key / "a"])
    assert not key.exists()


def test_a_running_output_is_left_alone(made: Path, target: str) -> None:
    run(made, made / "v.zarr", target)
    before = objects(target)
    with Ledger.open(Output.at(target)) or contextlib.nullcontext():
        for overwrite in (False, True):
            with pytest.raises(ValueError, match=rf"another run \(.*process {os.getpid()}\)"):
                run(made, made / "v.zarr", target, overwrite=overwrite)
    assert objects(target) == before


def test_a_store_that_is_silent_for_a_while_costs_time_alone(
    made: Path, s3: Server, target: str
) -> None:
    paused = []

    def pause(_: object) -> None:
        if not paused:
            paused.append(1)
            stack.enter_context(s3.paused())
            threading.Timer(3.0, stack.close).start()

    stack = contextlib.ExitStack()
    report = run(made, made / "v.zarr", target, progress=pause)
    assert (paused, report.done, report.failures) == ([1], TILES, [])
    assert report.seconds > 2.5
    check_whole(made, target)


def test_a_store_that_is_gone_ends_the_run(
    made: Path, s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "RETRIES", 0)
    monkeypatch.setattr(lease, "BEAT", 0.1)
    monkeypatch.setattr(lease, "PATIENCE", 0.3)
    with s3_server.serving(tmp_path) as other, fresh_stores():
        monkeypatch.setenv("AWS_ENDPOINT_URL", other.environment["AWS_ENDPOINT_URL"])

        def kill(_: object) -> None:
            other.stop()

        with pytest.raises(TileError, match=r"s3://tests/o\) has been out of reach") as caught:
            run(made, made / "v.zarr", "s3://tests/o", progress=kill)
    assert "\n" not in str(caught.value)
    left = {thread.name for thread in threading.enumerate()}
    assert not left & {"tilepipe-lease", "tilepipe-parts"}


@pytest.mark.parametrize("interrupted", [True, False])
def test_a_store_that_fails_for_good_ends_the_run_in_one_line(
    made: Path, target: str, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    """Whoever is interrupted then is told just that, and the claim is let go."""

    class Failing(SegmentProgress):
        def __call__(self, report: Report) -> None:
            if report.done == 2:
                stores._store.cache_clear()
                monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
                if interrupted:
                    raise KeyboardInterrupt

    monkeypatch.setattr("tilepipe.commands.segment.SegmentProgress", Failing)
    arguments = command(made, target)
    result = CliRunner().invoke(main, arguments)
    stores._store.cache_clear()
    last = result.stderr.splitlines()[-1]
    assert result.exit_code == (130 if interrupted else 1), result.stderr
    assert ("interrupted" if interrupted else "SignatureDoesNotMatch") in last
    assert last.startswith("tilepipe: ")
    left = [thread.name for thread in threading.enumerate()]
    assert not {"tilepipe-lease", "tilepipe-parts"} & set(left)


def test_no_secret_is_kept_or_said(made: Path, commands: Commands, target: str) -> None:
    arguments = command(made, target)
    code, said = commands.run(["-v", *arguments])
    assert code == 0, said
    assert SECRET not in said
    assert not [name for name, content in objects(target).items() if SECRET.encode() in content]
    plan = plan_segment(made / "v.zarr", model=made / "net.pt", output=target)
    assert SECRET.encode() not in pickle.dumps(
        SegmentJob(plan, Right(Output.at(target), "lock", "token"))
    )


@contextlib.contextmanager
def serving(handler: Callable[..., SimpleHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def served(made: Path) -> Iterator[str]:
    """The address of the folder on a web server, which does not list."""

    class Handler(SimpleHTTPRequestHandler):
        def list_directory(self, path: object) -> None:
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with serving(partial(Handler, directory=str(made))) as address:
        yield address


def test_a_web_server_is_read(made: Path, served: str, tmp_path: Path) -> None:
    run(made, f"{served}/v.zarr", tmp_path / "o.zarr")
    assert voxels(files(tmp_path / "o.zarr")) == voxels(files(made / "serial.zarr"))
    image, known = open_volume(f"{served}/serial.zarr"), open_volume(made / "serial.zarr")
    assert (image.axes, image.scale) == (known.axes, known.scale)


@pytest.mark.long
def test_a_store_that_is_down_for_seconds_is_asked_again(made: Path) -> None:
    end: list[float] = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if end and time.monotonic() < end[0]:
                self.send_error(503)
            else:
                super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with serving(partial(Handler, directory=str(made))) as address:
        volume = open_volume(f"{address}/v.zarr")
        whole = Region.whole(volume.shape)
        end.append(time.monotonic() + 5)
        assert (volume.read(whole) == open_volume(made / "v.zarr").read(whole)).all()


def refused(arguments: list[str]) -> str:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, result.output
    [line] = result.stderr.splitlines()
    return line


def test_what_cannot_be_reached_is_refused_in_one_line(
    made: Path, served: str, s3: Server, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ["--model", str(made / "net.pt")]
    v = str(made / "v.zarr")
    for arguments, message in (
        ([f"{served}/none.zarr", "-o", target], "there is no metadata of one"),
        (["s3://no-such-bucket/v.zarr", "-o", target], "NoSuchBucket"),
        ([f"{target}/nothing.zarr"], "holds nothing"),
        ([f"{served}/v.zarr"], "must be named for a source"),
        ([v, "-o", "s3://tests"], "must be a path in a bucket"),
        ([v, "-o", f"{served}/o.zarr"], "HTTP is for reading"),
        ([v, "-o", "s3://a:b@c/o.zarr"], "credentials by the environment"),
    ):
        assert message in refused(["segment", *arguments, *model])
    assert "model (=s3://...) must be" in refused(["segment", v, "--model", "s3://tests/net.pt"])
    assert "output (=s3://...) must be" in refused(
        ["train", v, v, "-o", "s3://tests/net.pt", "--steps", "1"]
    )
    assert "must be a folder of this machine" in refused(["demo", "-o", target])
    with fresh_stores(), monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        assert "SignatureDoesNotMatch" in refused(["segment", v, *model, "-o", target])
        assert "SignatureDoesNotMatch" in refused(["inspect", target])
    assert not ObjectKey.parse(target).exists()


@contextlib.contextmanager
def fresh_stores() -> Iterator[None]:
    """Let the environment be read anew, here and afterwards."""
    stores._store.cache_clear()
    try:
        yield
    finally:
        stores._store.cache_clear()
