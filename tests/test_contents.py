"""The law of what is ours: nothing else is written to or removed, and removal can be stopped."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.commands import ROOT
from tests.support import noise, read, write_unet, write_volume
from tilepipe.errors import BadRequest
from tilepipe.options import Options
from tilepipe.segmentation.segment import plan_segment, segment
from tilepipe.storage.contents import check_ours, clear
from tilepipe.storage.location import Place, locate
from tilepipe.storage.names import LEDGER
from tilepipe.volumes.output import Output
from tilepipe.volumes.volume import open_volume

if TYPE_CHECKING:
    from collections.abc import Callable

    from tilepipe.segmentation.report import Report


TILES = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a volume, a network, a whole output and one of which two tiles are done."""
    folder = tmp_path_factory.mktemp("made")
    write_unet(folder / "net.pt", depth=2)
    write_volume(folder / "v.zarr", noise(40, 60), "yx", chunks=(32, 32))
    for version in ("0.4", "0.5"):
        run(folder, folder / f"whole-{version}", version=version)
        with pytest.raises(KeyboardInterrupt):
            run(folder, folder / f"begun-{version}", version=version, progress=stop)
    return folder


def stop(report: Report) -> None:
    if report.done == 2:
        raise KeyboardInterrupt


def run(made: Path, output: object, *, version: str = "0.5", **more: Any) -> Report:
    options = Options(
        tile=(16, 32), chunks=(16, 32), threads=1, ome_version=version, write="probabilities"
    )
    return segment(
        made / "v.zarr", model=made / "net.pt", output=str(output), options=options,
        engine="serial", **more,
    )  # fmt: skip


def state(folder: Path) -> dict[str, bytes | str]:
    """Return all that lies in a folder, links as what they say."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes() if path.is_file() else "folder"
        for path in folder.rglob("*")
        if path.name != "lock"
    }  # fmt: skip


LINKS = [LEDGER, f"{LEDGER}/done", f"{LEDGER}/log", f"{LEDGER}/plan.json", "zarr.json", "0"]
LINKS += ["0/zarr.json", "0/c", "0/c/0", "0/c/0/0", "0/c/0/0/0"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", LINKS)
def test_nothing_is_reached_through_a_link(
    made: Path, tmp_path: Path, name: str, overwrite: bool
) -> None:
    output, other = tmp_path / "o", tmp_path / "other"
    shutil.copytree(made / "begun-0.5", output)
    part = output / name
    if part.is_dir():
        (part / "thesis.txt").write_text("of years")
    part.rename(other)
    part.symlink_to(other)
    before = state(tmp_path)
    late = name in ("0/c/0", "0/c/0/0", "0/c/0/0/0") and not overwrite
    if late:  # it is seen where a tile would be written, not by a look at every chunk
        for chunk in (made / "begun-0.5" / "0" / "c").rglob("0/0/0"):
            assert chunk.is_file()
        (output / LEDGER / "done").write_bytes(b"")
        before = state(tmp_path)
        report = run(made, output)
        assert report.failures
        assert all("is a link" in failure.cause for failure in report.failures)
    else:
        with pytest.raises(BadRequest, match=rf"holds {name}, a link") as caught:
            run(made, output, overwrite=overwrite)
        assert "\n" not in str(caught.value)
        assert state(tmp_path) == before
    after = {path: value for path, value in state(tmp_path).items() if path.startswith("other")}
    assert after == {path: value for path, value in before.items() if path.startswith("other")}


FOREIGN = ["notes.txt", "1", f"{LEDGER}/notes.txt", f"{LEDGER}/jobs/job.sh", "0/notes", "0/c/x"]
FOREIGN += ["0/c/0/0/0.txt", "0/c/0/backup/0", "0/c/0/0/0.partial", "0/c/0/0/0/0/0/0"]


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_not_ours_is_never_removed(made: Path, tmp_path: Path, name: str) -> None:
    output = tmp_path / "o"
    shutil.copytree(made / "begun-0.5", output)
    if name == "0/c/0/0/0/0/0/0":
        (output / "0/c/0/0/0").unlink()
        name = "0/c/0/0/0/0/0/0/0"
    (output / name).parent.mkdir(exist_ok=True, parents=True)
    (output / name).write_text("of years")
    before = state(tmp_path)
    with pytest.raises(BadRequest, match=r"holds [\w./]+, which tilepipe did not write") as caught:
        run(made, output, overwrite=True)
    assert name.startswith(str(caught.value).split("holds ")[1].split(",")[0])
    assert state(tmp_path) == before


def test_the_whole_output_may_be_a_link_and_so_may_its_parents(made: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "way").symlink_to(tmp_path / "disk")
    shutil.copytree(made / "begun-0.5", tmp_path / "disk" / "o")
    (tmp_path / "out").symlink_to(tmp_path / "way" / "o")
    assert run(made, tmp_path / "out").before == 2
    assert run(made, tmp_path / "out", overwrite=True).before == 0
    assert (tmp_path / "out").is_symlink()
    assert (read(tmp_path / "disk" / "o") == read(made / "whole-0.5")).all()


def test_a_copy_by_hard_links_is_left_as_it_is(made: Path, tmp_path: Path) -> None:
    """As `cp -al` and programs for backups make them: else its ledger would know too much."""
    shutil.copytree(made / "begun-0.5", tmp_path / "copy", copy_function=shutil.copy2)
    shutil.copytree(tmp_path / "copy", tmp_path / "o", copy_function=os.link)
    (tmp_path / "copy" / LEDGER / "plan.json.new").write_bytes(b"of a crash")
    os.link(tmp_path / "copy" / LEDGER / "plan.json.new", tmp_path / "o" / LEDGER / "plan.json.new")
    before = state(tmp_path / "copy")
    assert run(made, tmp_path / "o").done == TILES - 2
    assert state(tmp_path / "copy") == before
    run(made, tmp_path / "o", overwrite=True)
    assert state(tmp_path / "copy") == before
    assert run(made, tmp_path / "copy").done == TILES - 2
    assert (read(tmp_path / "copy") == read(made / "whole-0.5")).all()


MOUNTED = """
import sys
from pathlib import Path
from tests.test_contents import run
from tilepipe.errors import BadRequest
for overwrite in (False, True):
    try:
        run(Path(sys.argv[1]), sys.argv[2], overwrite=overwrite)
    except BadRequest as error:
        print(error)
"""


def test_what_is_mounted_in_an_output_is_left(made: Path, tmp_path: Path) -> None:
    output, other = tmp_path / "o", tmp_path / "other"
    shutil.copytree(made / "begun-0.5", output)
    shutil.copytree(output / "0" / "c" / "0", other)
    before = state(other)
    try:
        ended = subprocess.run(
            [
                *("unshare", "--mount", "sh", "-c"),
                'mount --bind "$1" "$2/0/c/0" || exit 77; shift 2; "$@"',
                *("sh", str(other), str(output), sys.executable, "-W", "ignore", "-c", MOUNTED),
                *(str(made), str(output)),
            ],
            capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("no unshare")
    if ended.returncode == 77 or "unshare failed" in ended.stderr:
        pytest.skip(f"nothing can be mounted here: {ended.stderr.strip()}")
    assert ended.stdout.count("holds 0/c/0, where another file system is mounted") == 2, ended
    assert state(other) == before


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_removal_that_is_stopped_leaves_what_is_ours(
    made: Path, tmp_path: Path, version: str, every: int
) -> None:
    """Stopped after each file and folder in turn, by the audit hook that sees every removal."""
    whole, chunks = made / f"whole-{version}", len(chunk_files(made / f"whole-{version}"))
    count = len([*(made / f"begun-{version}").rglob("*")])
    for stopped in range(count):
        output = tmp_path / f"{stopped}"
        shutil.copytree(whole, output)
        with StopRemoving(output, stopped) as removing:
            with pytest.raises(KeyboardInterrupt):
                clear(output)
            assert removing.left == 0
        Output.at(output).check_free(overwrite=True)
        done = output / LEDGER / "done"
        assert len(chunk_files(output)) == chunks or not done.exists()
        if stopped % every == 0:
            try:  # to go on, which must never take zeros for voxels
                run(made, output, version=version)
            except BadRequest as error:
                if not str(error).endswith("--overwrite"):
                    raise
                run(made, output, version=version, overwrite=True)
            assert voxels(output) == voxels(whole)
        shutil.rmtree(output)


def chunk_files(output: Path) -> list[Path]:
    return [path for path in (output / "0").rglob("*") if path.is_file() and path.name.isdigit()]


class StopRemoving:
    """Raises KeyboardInterrupt at the removal after so many, below a folder."""

    hooks: list[StopRemoving] = []  # noqa: RUF012  an audit hook is never removed

    def __init__(self, folder: Path, left: int) -> None:
        self.folder, self.left = f"{folder}{os.sep}", left

    def __enter__(self) -> StopRemoving:
        if not self.hooks:
            sys.addaudithook(_see)
        self.hooks[:] = [self]
        return self

    def __exit__(self, *_: object) -> None:
        self.hooks[:] = [StopRemoving(Path("nowhere"), 0)]


def _see(event: str, arguments: tuple[Any, ...]) -> None:
    hook = StopRemoving.hooks[0]
    if event in ("os.remove", "os.rmdir") and str(arguments[0]).startswith(hook.folder):
        if hook.left == 0:
            raise KeyboardInterrupt
        hook.left -= 1


def test_keys_of_others_below_an_output_are_left(made: Path, prefix: Callable[[], str]) -> None:
    address = prefix()
    run(made, address)
    place = locate(address, "output")
    check_ours(place)
    neighbour, note = locate(f"{address}-2/zarr.json", "key"), place / "0" / "notes.txt"
    for key in (neighbour, note):
        key.write_bytes(b"of years")  # type: ignore[union-attr]
    with pytest.raises(BadRequest, match=r"holds 0/notes\.txt, which tilepipe did not write"):
        run(made, address, overwrite=True)
    assert run(made, address).before == TILES
    note.unlink()
    (place / "0").write_bytes(b"")  # type: ignore[union-attr]  # as some show folders
    assert run(made, address, overwrite=True).before == 0
    assert neighbour.read_bytes() == b"of years"


def test_what_every_engine_leaves_is_ours(made: Path, tmp_path: Path) -> None:
    for output in (made / "whole-0.5", made / "begun-0.4"):
        check_ours(output)
    from tilepipe.runs.array import ArrayTask

    for number in (1, 2):
        run(made, tmp_path / "o", task=ArrayTask(number, 2))
    check_ours(tmp_path / "o")


def test_a_plan_says_the_same(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "begun-0.5", tmp_path / "o")
    (tmp_path / "o" / LEDGER).rename(tmp_path / "ledger")
    (tmp_path / "o" / LEDGER).symlink_to(tmp_path / "ledger")
    with pytest.raises(BadRequest, match="a link"):
        plan_segment(made / "v.zarr", model=made / "net.pt", output=tmp_path / "o")


METADATA = [("0.5", name) for name in ("zarr.json", "0/zarr.json")]
METADATA += [("0.4", name) for name in (".zgroup", ".zattrs", "0/.zarray", "0/.zattrs")]


def voxels(place: Place) -> bytes:
    return b"".join(
        key.read_bytes()
        for key in sorted(everything(place / "0"), key=str)
        if not key.name.startswith((".", "zarr"))
    )


def everything(place: Place) -> list[Place]:
    if isinstance(place, Path):
        return [path for path in place.rglob("*") if path.is_file()]
    return [key for key, _ in place.objects()]


@pytest.mark.parametrize(("version", "name"), METADATA)
def test_metadata_that_a_crash_has_spoiled_is_made_anew(
    made: Path, tmp_path: Path, version: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = made / f"whole-{version}"
    size = (whole / name).stat().st_size
    cut_off = (whole / name).read_bytes()[:-9]
    for begun, content in (("begun", b""), ("whole", b"\0" * size), ("begun", cut_off)):
        output = tmp_path / f"{len(content)}" / f"whole-{version}"
        shutil.copytree(made / f"{begun}-{version}", output)
        (output / name).write_bytes(content)
        before = state(output)
        plan_segment(
            made / "v.zarr", model=made / "net.pt", output=output,
            options=Options(write="probabilities", ome_version=version),
        )  # fmt: skip
        assert state(output) == before  # a plan touches nothing
        report = run(made, output, version=version)
        assert f"{output / name} was spoiled" in caplog.text
        assert report.before + report.done == TILES
        assert voxels(output) == voxels(whole)
        for file in ("0/.zarray", "0/.zattrs", ".zgroup", "0/zarr.json"):
            if (whole / file).exists():
                assert (output / file).read_bytes() == (whole / file).read_bytes()
        assert [*open_volume(output).scale] == [*open_volume(whole).scale]
        ours, theirs = Output.at(output).read_attributes(), Output.at(whole).read_attributes()
        plans = [attributes.pop("plan") for attributes in (ours, theirs)]
        assert ours == theirs
        assert {**plans[0], "target": ""} == {**plans[1], "target": ""}


def test_in_a_bucket_too(made: Path, prefix: Callable[[], str]) -> None:
    address = prefix()
    with pytest.raises(KeyboardInterrupt):
        run(made, address, progress=stop)
    place = locate(address, "output")
    for name in ("zarr.json", "0/zarr.json"):
        key = place
        for part in name.split("/"):
            key = key / part
        key.write_bytes(b"")  # type: ignore[union-attr]
    report = run(made, address)
    assert report.before + report.done == TILES
    assert voxels(place) == voxels(made / "whole-0.5")


def test_an_array_that_is_gone_is_not_made_anew(made: Path, tmp_path: Path) -> None:
    """Its chunks are gone with it, and would read as zeros of finished tiles."""
    for name in ("0", "0/zarr.json"):
        output = tmp_path / name.replace("/", "-")
        shutil.copytree(made / "begun-0.5", output)
        lost = output / name
        shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
        (output / "zarr.json").write_bytes(b"")
        with pytest.raises(BadRequest, match="is damaged"):
            run(made, output)
        (output / LEDGER / "done").unlink()
        assert run(made, output).done == TILES
        assert voxels(output) == voxels(made / "whole-0.5")


@pytest.mark.parametrize(
    "content",
    [b"", b'{"identity": {"al', b"\0" * 99, b"[]", b"{}", b"[" * 9999],
    ids=["empty", "cut", "zeros", "list", "nothing", "deep"],
)
def test_a_plan_that_a_crash_has_spoiled_is_told(
    made: Path, tmp_path: Path, content: bytes
) -> None:
    output = tmp_path / "o"
    shutil.copytree(made / "begun-0.5", output)
    (output / LEDGER / "plan.json").write_bytes(content)
    with pytest.raises(BadRequest, match=r"--overwrite$") as caught:
        run(made, output)
    assert "\n" not in str(caught.value)
    (output / "zarr.json").write_bytes(content)  # both, at the worst
    with pytest.raises(BadRequest, match=r"--overwrite$"):
        run(made, output)
    assert run(made, output, overwrite=True).done == TILES


@pytest.mark.parametrize("name", ["zarr.json", "0/zarr.json", f"{LEDGER}/done"])
def test_a_folder_in_place_of_a_file_is_told(made: Path, tmp_path: Path, name: str) -> None:
    output = tmp_path / "o"
    shutil.copytree(made / "begun-0.5", output)
    (output / name).unlink()
    (output / name).mkdir()
    with pytest.raises(BadRequest, match=f"damaged: {name} is a folder"):
        run(made, output)
