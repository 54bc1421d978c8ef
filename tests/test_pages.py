"""The pages: their Python runs, the tutorial's commands run, and all their options exist."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner
from sybil import Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

import tilepipe
from tests.support import noise, write_unet, write_volume
from tests.test_engines import FileJob, notes
from tilepipe.cli import main
from tilepipe.engines import TileFailure, TileResult
from tilepipe.errors import TileError

if TYPE_CHECKING:
    from types import ModuleType

    from sybil import Example

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")])
NAMED = re.compile(r"# (?P<name>\w+\.py)\n")
"""How a block begins that is a file, to be saved under its name."""


def commands(source: str) -> list[list[str]]:
    """Return the arguments of each command of tilepipe in a block of shell."""
    lines = (shlex.split(line, comments=True) for line in source.splitlines())
    return [words[1:] for words in lines if words[:1] == ["tilepipe"]]


def run_python(example: Example) -> None:
    """Run a block in the namespace of its page, or save it where it is a file."""
    example.namespace["__name__"] = "__main__"
    if named := NAMED.match(example.parsed):
        Path(named["name"]).write_text(example.parsed)
    else:
        PythonEvaluator()(example)


def run_commands(example: Example) -> None:
    for arguments in commands(example.parsed):
        outcome = CliRunner().invoke(main, arguments)
        assert outcome.exit_code == 0, (arguments, outcome.output)


def check_commands(example: Example) -> None:
    """Fail where a command, or one of its options, does not exist."""
    for arguments in commands(example.parsed):
        if arguments[0].startswith("-"):  # options of the whole process, such as --log-file
            command = [sys.executable, "-m", "tilepipe", *arguments, "--help"]
            subprocess.run(command, check=True, capture_output=True)
            continue
        outcome = CliRunner().invoke(main, [*arguments, "--help"])
        assert outcome.exit_code == 0, (arguments, outcome.output)


PYTHON = CodeBlockParser("python", run_python)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a small volume and a network as the pages name them."""
    write_volume(tmp_path / "volume.zarr", noise(150, 130), "yx", (64, 64))
    write_unet(tmp_path / "unet.pt")
    (tmp_path / "recipe.toml").write_text("steps = 10\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pool", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    "page", ["README.md", "docs/reference/model.md", "docs/reference/python.md"]
)
@pytest.mark.usefixtures("folder")
def test_the_python_of_a_page_runs(page: str) -> None:
    examples = list(Sybil([PYTHON]).parse(ROOT / page).examples())
    assert examples
    for example in examples:
        example.evaluate()


def test_the_exported_network_of_the_readme_is_a_model(folder: Path) -> None:
    first, *_ = Sybil([PYTHON]).parse(ROOT / "README.md").examples()
    first.evaluate()
    outcome = CliRunner().invoke(main, ["plan", "volume.zarr", "--model", "unet.pt2"])
    assert outcome.exit_code == 0, outcome.output
    assert (folder / "unet.pt2").exists()


@pytest.mark.long
def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parsers = [PYTHON, CodeBlockParser("sh", run_commands)]
    document = Sybil(parsers).parse(ROOT / "docs/tutorial.md")
    for example in document.examples():
        example.evaluate()
    assert document.namespace["count"] == 393, "the page says so"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.usefixtures("folder")
def test_the_commands_of_a_page_exist(page: Path) -> None:
    for example in Sybil([CodeBlockParser("sh", check_commands)]).parse(page).examples():
        example.evaluate()


def test_the_reference_names_all_that_is_public() -> None:
    page = (ROOT / "docs/reference/api.md").read_text()
    listed = set(re.findall(r"^::: tilepipe\.(\w+)$", page, re.MULTILINE))
    assert listed == set(tilepipe.__all__) - {"__version__"}


@pytest.fixture
def pool(folder: Path) -> ModuleType:
    """The engine of docs/engine.md, as a file that the processes of the pool import."""
    first, *_ = Sybil([PYTHON]).parse(ROOT / "docs/engine.md").examples()
    first.evaluate()
    import pool

    return pool


@pytest.mark.long
def test_the_engine_of_the_page_segments(
    pool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    _, second = Sybil([PYTHON]).parse(ROOT / "docs/engine.md").examples()
    second.evaluate()
    assert "9 tiles were done by the pool, and 0 after it" in capsys.readouterr().out


def test_the_engine_of_the_page_keeps_the_laws(pool: ModuleType, folder: Path) -> None:
    job = FileJob(str(folder), always=(3,), once=(5, 7))
    outcomes = list(pool.run(job, range(20), workers=2, retries=1))
    assert sorted(outcome.index for outcome in outcomes) == list(range(20))
    failed = [outcome for outcome in outcomes if isinstance(outcome, TileFailure)]
    assert [(outcome.index, outcome.attempts) for outcome in failed] == [(3, 2)]
    again = {o.index: o.attempts for o in outcomes if isinstance(o, TileResult) and o.attempts > 1}
    assert again == {5: 2, 7: 2}
    assert sorted(notes(folder, "opened")) == sorted(notes(folder, "closed"))


def test_the_engine_of_the_page_takes_no_more_than_it_needs(pool: ModuleType, folder: Path) -> None:
    tiles = iter(range(1000))
    outcomes = pool.run(FileJob(str(folder)), tiles, workers=2)
    next(outcomes)
    outcomes.close()
    assert next(tiles) <= 5
    assert notes(folder, "opened")
    assert sorted(notes(folder, "opened")) == sorted(notes(folder, "closed"))


@pytest.mark.parametrize("job", ["broken", "deadly"])
def test_the_engine_of_the_page_says_when_it_cannot_go_on(
    pool: ModuleType, folder: Path, job: str
) -> None:
    chosen = {
        "broken": FileJob(str(folder), broken=True),
        "deadly": FileJob(str(folder), deadly=(2,)),
    }
    with pytest.raises(TileError, match="a process of the pool ended"):
        list(pool.run(chosen[job], range(9)))


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_shell_completes_commands_options_and_files(tmp_path: Path) -> None:
    script = 'eval "$(_TILEPIPE_COMPLETE=bash_source tilepipe)"; complete -p tilepipe'
    path = Path(sys.executable).parent
    shown = subprocess.run(
        ["bash", "-c", script], env={"PATH": f"{path}:/usr/bin:/bin"}, cwd=tmp_path,
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "_tilepipe_completion tilepipe" in shown
    for words, completed in {
        "tilepipe seg": "plain,segment",
        "tilepipe segment volume.zarr --wri": "plain,--write",
        "tilepipe segment volume.zarr --write lab": "plain,labels",
        "tilepipe segment vol": "file,vol",
        "tilepipe segment volume.zarr --model un": "file,un",
        "tilepipe --log-file ru": "file,ru",
    }.items():
        asked = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        outcome = CliRunner().invoke(
            main, env={**asked, "_TILEPIPE_COMPLETE": "bash_complete"}, prog_name="tilepipe"
        )
        assert outcome.output.split() == [completed]
