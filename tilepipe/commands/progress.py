"""How far a command is: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, NoReturn

import click

if TYPE_CHECKING:
    from tqdm import tqdm

    from tilepipe.segmentation.report import Report

LINE_SECONDS = 30.0
"""How often progress is written where there is no terminal."""
TERMINAL_SECONDS = 1.0
"""The same on a terminal, of what has no bar."""


class LineTimer:
    """Says when it is time for another line."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def is_due(self, on_terminal: float = TERMINAL_SECONDS) -> bool:
        """Return whether a line is due, and if so begin to wait for the next."""
        due = time.monotonic() - self._last > (on_terminal if sys.stderr.isatty() else LINE_SECONDS)
        if due:
            self._last = time.monotonic()
        return due


class SegmentProgress:
    """Shows how far a segmentation is."""

    def __init__(self) -> None:
        self._timer = LineTimer()
        self._bar: tqdm[NoReturn] | None = None

    def __call__(self, report: Report) -> None:
        """Show the tiles that are done, the rate and the time left."""
        finished = report.done + len(report.failures)
        rate = f"{report.voxels / max(report.seconds, 1e-9) / 1e6:.3g} megavoxels/s"
        failed = f"{len(report.failures)} failed" if report.failures else ""
        if sys.stderr.isatty():
            self._draw(report, finished, ", ".join(filter(None, [rate, failed])))
        elif self._timer.is_due():
            left = report.seconds / finished * report.left
            click.echo(
                f"{report.before + finished} of {report.tiles} tiles"
                f"{f' ({failed})' if failed else ''}, {rate}, about {left:.0f} s left",
                err=True,
            )

    def _draw(self, report: Report, finished: int, postfix: str) -> None:
        from tqdm import tqdm

        if self._bar is None and report.dashboard:
            click.echo(f"dashboard      {report.dashboard}", err=True)
        self._bar = bar = self._bar or tqdm[NoReturn](
            desc="segmenting", total=report.tiles, initial=report.before, unit="tile",
            file=sys.stderr, dynamic_ncols=True,
        )  # fmt: skip
        bar.set_postfix_str(postfix, refresh=False)
        bar.update(report.before + finished - bar.n)

    def scan(self, done: int, blocks: int) -> None:
        """Show how far the volume has been read for its normalization."""
        self.stage("normalization", done, blocks)

    def stage(self, what: str, done: int, blocks: int) -> None:
        """Show how far a pass over the volume is."""
        if self._timer.is_due():
            click.echo(f"{what}: {done / blocks:.0%} of the volume read", err=True)

    def end(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
