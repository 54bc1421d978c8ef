"""The commands as a user runs them: exit codes, one line for what cannot be done, JSON."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from click.testing import CliRunner, Result

from tests.commands import ROOT
from tests.support import noise, write_unet, write_volume
from tilepipe.cli import main

if TYPE_CHECKING:
    from pathlib import Path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_unet(tmp_path / "unet.pt")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_volume(tmp_path / "image.zarr", noise(50, 70), "yx")


def test_segment_shows_the_plan_and_the_end(source: Path, model: Path, tmp_path: Path) -> None:
    first = run("segment", source, "--model", model, "-o", tmp_path / "out.zarr")
    assert first.exit_code == 0, first.output
    assert "context       20,20 before, 20,20 after" in first.output
    assert "1 of 1 tiles done" in first.output
    again = run("segment", source, "--model", model, "-o", tmp_path / "out.zarr")
    assert again.exit_code == 0
    assert "nothing was left to do" in again.output


def test_plan_touches_nothing_and_speaks_json(source: Path, model: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    found = run("plan", source, "--model", model, "--json", "--tile", "16,32")
    assert found.exit_code == 0
    plan = json.loads(found.output)
    assert plan["costs"]["tiles"] == 12
    assert plan["sizes"]["tile"] == [16, 32]
    assert sorted(tmp_path.rglob("*")) == before


def test_inspect_tells_a_model_a_volume_and_an_output(
    source: Path, model: Path, tmp_path: Path
) -> None:
    assert "20,20 before, 20,20 after" in run("inspect", model).output
    assert json.loads(run("inspect", model, "--json").output)["context"]["step"] == [4, 4]
    assert "yx = 50,70" in run("inspect", source).output
    run("segment", source, "--model", model, "-o", tmp_path / "out.zarr")
    assert "1 of 1 done" in run("inspect", tmp_path / "out.zarr").output
    assert json.loads(run("inspect", tmp_path / "out.zarr", "--json").output)["done"] == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["segment", "none.zarr", "--model", "{model}"], "none.zarr"),
        (["segment", "{source}", "--model", "none.pt"], "none.pt"),
        (
            ["segment", "{source}", "--model", "{model}", "--tile", "17,16", "--chunks", "8,8"],
            "two tiles write into one; nearest: 16",
        ),
        (["segment", "{source}", "--model", "{model}", "--tile", "big"], "whole numbers"),
        (["segment", "{source}", "--model", "{model}", "--write", "poems"], "--write"),
        (["segment", "", "--model", "{model}"], "source"),
        (["segment", "{source}", "--model", "{model}", "--device", "cuda:99"], "device"),
        (
            ["segment", "{source}", "--model", "{model}", "--engine=local-cuda", "--device=cpu"],
            "leave out --device (=cpu)",
        ),
        (["segment", "{source}", "--model", "{model}", "--memory", "lots"], "512MB or 4GB"),
        (["segment", "{source}", "--model", "{model}", "--network-args", "[1]"], "JSON object"),
        (["segment", "{source}", "--model", "{model}", "--workers", "0"], "must be positive"),
        (["segment", "{source}", "--model", "{model}", "-o", "{source}"], "source"),
        (["segment", "{source}", "--model", "{model}", "-o", "{source}/in"], "source"),
        (["segment", "{source}", "--model", "{model}", "-o", "/none/out.zarr"], "/none"),
        (["segment", "{source}", "--model", "{model}", "--level", "3"], "level"),
        (["segment", "{source}", "--model", "{model}", "--axes", "zyx"], "axes"),
        (["segment", "{model}", "--model", "{model}"], "unet.pt"),
        (["segment", "{source}", "--model", "{source}"], "must be a file"),
        (["inspect", "none"], "none"),
        (["demo", "--size", "3"], "at least 64"),
        (["plan", "{source}"], "--model"),
    ],
)
def test_bad_requests_end_with_2_and_a_line(
    arguments: list[str], says: str, source: Path, model: Path, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    found = run(*(a.format(source=source, model=model) for a in arguments))
    assert found.exit_code == 2, found.output
    assert says in found.output
    assert found.output.startswith("tilepipe: ")
    assert found.output.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


PLAIN = """
import sys
for name in ("obstore", "dask_jobqueue", "cryptography", "tensorboard", "hypothesis", "bokeh"):
    sys.modules[name] = None  # as where no extra is installed
from tilepipe.cli import main
main(sys.argv[1:])
"""


def test_nothing_of_an_extra_is_needed_without_it(tmp_path: Path) -> None:
    """Segmenting, overwriting and training with what is held out, as after a plain install."""

    def start(*arguments: str) -> None:
        ran = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PLAIN, *arguments],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr

    write_volume(tmp_path / "v.zarr", noise(64, 80), "yx")
    write_volume(tmp_path / "l.zarr", (noise(64, 80) > 128).astype("uint8"), "yx")
    sizes = ["--patch", "12,12", "--base", "2", "--depth", "2", "--elastic", "0"]
    training = ["train", "v.zarr", "l.zarr", "-o", "u.pt", "--steps", "2", *sizes]
    start(*training, "--val-region", ":,40:80", "--validate-every", "1", "--target", "classes")
    start("segment", "v.zarr", "--model", "u.pt", "-o", "o.zarr")
    start("segment", "v.zarr", "--model", "u.pt", "-o", "o.zarr", "--overwrite")
    start("evaluate", "o.zarr", "l.zarr", "--kind", "classes")


def test_a_log_file_holds_what_happened_with_its_time(
    source: Path, model: Path, tmp_path: Path
) -> None:
    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "tilepipe", *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    log = tmp_path / "run.log"
    request = ["segment", str(source), "--model", str(model), "-o", str(tmp_path / "o")]
    assert start("--log-file", str(log), *request, "--tile", "32,32").returncode == 0
    refused = start("--log-file", str(log), *request, "--tile", "0,0")
    assert refused.returncode == 2
    assert refused.stderr.count("tile (=0,0)") == 1  # once on the terminal
    lines = log.read_text().splitlines()
    stamp = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|ERROR) tilepipe")
    assert all(map(stamp.match, lines))
    assert re.search(r"worker: tile 0, voxels 0:32,0:32: ", log.read_text())
    assert "ERROR tilepipe.commands.exits: exit code 2: tile (=0,0)" in lines[-1]
    nowhere = start("--log-file", str(tmp_path / "none" / "run.log"), *request)
    assert nowhere.returncode == 2
    assert "cannot be written" in nowhere.stderr.splitlines()[-1]


def test_the_demo_writes_over_no_picture(tmp_path: Path) -> None:
    (tmp_path / "overlay.png").write_text("of a thesis")
    ended = CliRunner().invoke(main, ["demo", "--size", "64", "-o", str(tmp_path)])
    assert (ended.exit_code, "overlay.png already" in ended.output) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["overlay.png"]


def test_the_demo_needs_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("of a thesis")
    ended = CliRunner().invoke(main, ["demo", "--size", "64", "-o", str(tmp_path / "file")])
    assert (ended.exit_code, "must be a folder" in ended.output) == (2, True)
    assert (tmp_path / "file").read_text() == "of a thesis"


def test_the_plan_refuses_shards_of_zarr_v2(source: Path, model: Path) -> None:
    shards = ["--ome-version", "0.4", "--chunks", "16,16", "--shards", "32,32"]
    ended = run("plan", source, "--model", model, *shards)
    assert (ended.exit_code, "give --ome-version 0.5" in ended.output) == (2, True)


def test_the_demo_segments_well_and_makes_a_picture(tmp_path: Path) -> None:
    found = run("demo", "--size", "300", "-o", tmp_path / "demo")
    assert found.exit_code == 0, found.output
    score = next(line for line in found.output.splitlines() if line.startswith("Dice"))
    assert float(score.split()[-1]) > 0.95
    assert (tmp_path / "demo" / "overlay.png").read_bytes().startswith(b"\x89PNG")


def test_a_corrupt_chunk_sets_its_tiles_aside_by_name(
    source: Path, model: Path, tmp_path: Path
) -> None:
    image = write_volume(tmp_path / "tiles.zarr", noise(128, 128), "yx", chunks=(64, 64))
    chunk = image / "c" / "0" / "1"
    good = chunk.read_bytes()
    chunk.write_bytes(b"\x00" * 40 + good[40:])
    command = ("segment", image, "--model", model, "-o", tmp_path / "out.zarr", "--tile", "16,16")
    found = run(*command)
    assert found.exit_code == 1, found.output
    assert "tiles failed; run the same command to try again" in found.output
    assert "voxels 0:16,64:80" in found.output
    assert "failed" in run("inspect", tmp_path / "out.zarr").output
    chunk.write_bytes(good)
    assert run(*command).exit_code == 0
    whole = run("segment", image, "--model", model, "-o", tmp_path / "o2.zarr", "--tile", "16,16")
    assert whole.exit_code == 0
    for path in (tmp_path / "o2.zarr" / "0").rglob("*"):
        if path.is_file():
            other = tmp_path / "out.zarr" / "0" / path.relative_to(tmp_path / "o2.zarr" / "0")
            assert other.read_bytes() == path.read_bytes()


def test_an_image_that_is_all_zero_leaves_no_doubt(model: Path, tmp_path: Path) -> None:
    """A missing chunk is no sign of an unfinished tile: the ledger says what is done."""
    image = write_volume(tmp_path / "zero.zarr", np.zeros((32, 32), "u1"), "yx")
    assert run("segment", image, "--model", model, "-o", tmp_path / "out.zarr").exit_code == 0
    assert "1 of 1 done" in run("inspect", tmp_path / "out.zarr").output
