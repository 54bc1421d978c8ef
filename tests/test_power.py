"""The law of power failures: what the ledger says is on the disk. On a real file system that fails.

Its image is mounted, and while a run writes there, the file system is told to stop at once, as
if the machine had lost its power: what was not forced to disk is gone. Then it is mounted again.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from tests.commands import Commands, until
from tests.support import noise, read, write_unet, write_volume
from tilepipe.models.checkpoint import save_whole
from tilepipe.options import Options
from tilepipe.runs.ledger import Ledger
from tilepipe.segmentation.segment import segment
from tilepipe.storage.location import replace
from tilepipe.volumes.output import Output

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.long

SHUTDOWN = 0x8004587D
"""``EXT4_IOC_SHUTDOWN`` of Linux, by which file systems are tested themselves."""
AT_ONCE = struct.pack("I", 2)
"""``EXT4_GOING_FLAGS_NOLOGFLUSH``: nothing more reaches the disk, not even the journal."""
EDGE, ACROSS = 64, 14
"""Voxels of a tile, and tiles along each axis: more than any machine does in a second or two."""
SIZES = ("--tile", "64,64", "--chunks", "64,64", "--threads", "1", "--write", "probabilities")


class Disk:
    """A small file system in a file."""

    def __init__(self, folder: Path) -> None:
        self._image, self.folder = folder / "image", folder / "disk"
        self.folder.mkdir()
        with self._image.open("wb") as file:
            file.truncate(256 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", self._image], check=True)
        self._mount()

    def _mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", self._image, self.folder], check=True)

    def lose_power(self) -> None:
        """Stop at once; from now on all that is asked of it fails."""
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(handle, SHUTDOWN, AT_ONCE)
        finally:
            os.close(handle)

    def start_again(self) -> None:
        """Mount what has reached the disk."""
        self.end()
        self._mount()

    def end(self) -> None:
        for _ in range(50):
            if subprocess.run(["umount", self.folder], capture_output=True).returncode == 0:
                return
            time.sleep(0.1)
        raise AssertionError("the file system is in use")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid() or not shutil.which("mkfs.ext4"):
        pytest.skip("only root can mount, with mkfs.ext4")
    try:
        disk = Disk(tmp_path)
    except subprocess.CalledProcessError:
        pytest.skip("no file system can be mounted here")
    yield disk
    disk.end()


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    started = Commands(tmp_path_factory.mktemp("commands"))
    with started.server as server:
        yield started
        assert server.stdin is not None
        server.stdin.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_unet(folder / "net.pt", base=64)
    write_volume(folder / "v.zarr", noise(ACROSS * EDGE, ACROSS * EDGE), "yx", (EDGE, EDGE))
    for version in ("0.5", "0.4"):
        options = Options(
            write="probabilities",
            tile=(EDGE, EDGE),
            chunks=(EDGE, EDGE),
            threads=1,
            ome_version=version,
        )
        source, model = folder / "v.zarr", folder / "net.pt"
        segment(source, model=model, output=folder / version, options=options, engine="serial")
    return folder


def chunks(target: Path, index: int) -> list[Path]:
    """Return the files of a tile, of both classes."""
    place = f"{index // ACROSS}/{index % ACROSS}"
    prefix = "0/c" if (target / "zarr.json").is_file() else "0"
    return [target / f"{prefix}/{channel}/{place}" for channel in range(2)]


def lost_tiles(target: Path, truth: Path) -> list[int]:
    """Return the tiles that the ledger has, and the disk has not."""
    ledger = Ledger.open(Output.at(target), write=False)
    if ledger is None:
        return []
    with ledger:
        finished = [index for index in range(ACROSS**2) if index in ledger]
    return [n for n in finished if contents(target, n) != contents(truth, n)]


def contents(target: Path, index: int) -> list[bytes | None]:
    return [path.read_bytes() if path.is_file() else None for path in chunks(target, index)]


def finished(target: Path) -> int:
    """Return how many tiles the ledger has; what is torn at its end does not count."""
    ledger = Ledger.open(Output.at(target), write=False)
    if ledger is None:
        return -1
    with ledger:
        return ledger.done


def fail_at(disk: Disk, commands: Commands, files: Path, tiles: int, *more: str) -> tuple[int, str]:
    """Run, and lose power when so many tiles are done."""
    target = disk.folder / "o.zarr"
    named = ("--model", str(files / "net.pt"), "-o", str(target), "--engine", "serial")
    commands.start(["segment", str(files / "v.zarr"), *named, *SIZES, *more])
    until(lambda: finished(target) >= tiles)
    time.sleep(2.0 if tiles else 0)  # the ledger itself is forced to disk once a second
    disk.lose_power()
    ended = commands.end()
    disk.start_again()
    return ended


@pytest.mark.parametrize("version", ["0.5", "0.4"])
def test_what_the_ledger_has_outlives_a_power_failure(
    disk: Disk, commands: Commands, files: Path, version: str
) -> None:
    target, truth, before, codes = disk.folder / "o.zarr", files / version, -1, []
    for more in (1, 2):
        code, shown = fail_at(disk, commands, files, before + more, "--ome-version", version)
        codes.append(code)
        assert "Traceback" not in shown
        assert lost_tiles(target, truth) == []
        assert finished(target) >= before
        before = finished(target)
    assert before >= 2
    assert codes[0] == 1, shown  # a second run may be through, on a fast machine
    named = ("--model", str(files / "net.pt"), "-o", str(target), "--engine", "serial")
    code, shown = commands.run(
        ["segment", str(files / "v.zarr"), *named, *SIZES, "--ome-version", version]
    )
    assert code == 0, shown
    assert before == ACROSS**2 or f"{before} of them before" in shown, shown
    assert (read(target) == read(truth)).all()
    disk.lose_power()
    disk.start_again()
    assert (read(target) == read(truth)).all()  # a run that is done is on the disk, all of it


def test_fast_does_not_promise_that(disk: Disk, commands: Commands, files: Path) -> None:
    """And so the test above can fail."""
    fail_at(disk, commands, files, 8, "--fast")
    assert lost_tiles(disk.folder / "o.zarr", files / "0.5") != []


def test_checkpoints_and_small_files_are_the_old_or_the_new(disk: Disk) -> None:
    for number in range(3):
        save_whole(disk.folder / "unet.pt", {"weights": [number] * 1000})
        replace(disk.folder / "plan.json", b"%d" % number * 5000)
        before = (disk.folder / "unet.pt").read_bytes()
        disk.lose_power()
        disk.start_again()
        assert (disk.folder / "unet.pt").read_bytes() == before
        assert (disk.folder / "plan.json").read_bytes() == b"%d" % number * 5000
