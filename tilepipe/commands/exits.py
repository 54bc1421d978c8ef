"""Exit codes: what cannot be done is one line, never a traceback."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import NoReturn, TypeVar

import click

from tilepipe.errors import BadRequest, TileError
from tilepipe.storage.objects import explain

log = logging.getLogger(__name__)

SHOWN = "is_shown"
"""The attribute of a log record that is on the terminal already."""

Command = TypeVar("Command", bound=Callable[..., None])


def refusing(command: Command) -> Command:
    """Turn what cannot be done into one line and an exit code."""

    @wraps(command)
    def run(*args: object, **values: object) -> None:
        try:
            command(*args, **values)
        except BadRequest as error:
            _leave(str(error), 2)
        except TileError as error:
            _leave(str(error), 1)
        except KeyboardInterrupt as error:
            _leave(str(error) or "interrupted; run the same command again to go on", 130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except OSError as error:  # a full disk, a store out of reach
            _leave(f"{explain(error)}; mend that and run the same command again", 1)

    return run  # type: ignore[return-value]


def _leave(message: str, code: int) -> NoReturn:
    click.echo(f"tilepipe: {message}", err=True)
    if logging.getLogger().hasHandlers():
        log.error("exit code %d: %s", code, message, extra={SHOWN: True})
    sys.exit(code)


def end_process() -> NoReturn:
    """End a process that is done, without taking the interpreter down.

    Where processes have talked to one another, threads of torch now and then abort on the way down
    (SIGABRT, "terminate called without an active exception"), when all is written.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class Commands(click.Group):
    """Commands whose refusals are a line, also where click is what refuses."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Add a command; the list of commands shows the first line of its help whole."""
        cmd.short_help = (cmd.help or "").partition("\n")[0]
        super().add_command(cmd, name)

    def invoke(self, ctx: click.Context) -> object:
        """Run the command."""
        with _refusals_in_a_line():
            return super().invoke(ctx)

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: object,
    ) -> click.Context:
        """Read what stands before the command."""
        with _refusals_in_a_line():
            return super().make_context(info_name, args, parent, **extra)


@contextmanager
def _refusals_in_a_line() -> Iterator[None]:
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        help_of = f"; see {error.ctx.command_path} --help" if error.ctx else ""
        _leave(error.format_message().rstrip(".") + help_of, 2)
