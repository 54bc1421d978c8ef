"""The group of all commands; each is a file in `tilepipe.commands`."""

from __future__ import annotations

import logging
import os
import sys

import click

from tilepipe import __version__
from tilepipe.commands.demo import demo
from tilepipe.commands.evaluate import evaluate
from tilepipe.commands.exits import SHOWN, Commands
from tilepipe.commands.inspect import inspect
from tilepipe.commands.segment import plan, segment
from tilepipe.commands.train import train
from tilepipe.commands.types import Place

log = logging.getLogger("tilepipe")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("-v", "--verbose", is_flag=True, help="Write more of what happens to the terminal.")
@click.option(
    "--log-file", type=Place(), metavar="FILE",
    help="Append all messages to a file, with their times.",
)  # fmt: skip
def main(verbose: bool, log_file: str | None) -> None:
    """Segment images too large for memory, exactly as one pass over the whole would."""
    # Threads of a kernel sleep while they wait for one another: on a shared machine, spinning
    # takes the cores from those that are waited for (measured: four times slower).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setLevel(logging.INFO if verbose else logging.WARNING)
    terminal.addFilter(lambda record: not getattr(record, SHOWN, False))
    terminal.setFormatter(logging.Formatter("tilepipe: %(message)s"))
    handlers: list[logging.Handler] = [terminal]
    if log_file is not None:
        try:
            file = logging.FileHandler(log_file, encoding="utf-8", delay=False)
        except OSError as error:
            raise click.UsageError(
                f"log-file (={log_file}) cannot be written: {error.strerror}"
            ) from None
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        handlers.append(file)
    for handler in handlers:  # what other libraries say is for their own users
        handler.addFilter(lambda record: record.name.split(".")[0] == "tilepipe")
    level = logging.INFO if verbose or log_file is not None else logging.WARNING
    logging.basicConfig(level=level, handlers=handlers)
    log.info("version %s: %s", __version__, click.get_current_context().invoked_subcommand)


for _command in (segment, plan, inspect, train, evaluate, demo):
    main.add_command(_command)

if __name__ == "__main__":
    main()
