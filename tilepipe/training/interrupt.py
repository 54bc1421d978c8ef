"""An interrupt that the user requests: the work ends after its next step, and is saved."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(slots=True)
class Stop:
    """Whether to end after the next step."""

    requested: bool = False


@contextmanager
def stopping() -> Iterator[Stop]:
    """Take the first Ctrl-C or SIGTERM as a request; the second one interrupts.

    In another thread than the main one signals are not ours to take.
    """
    stop = Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    main = threading.current_thread() is threading.main_thread()
    before = [(number, signal.signal(number, ask)) for number in SIGNALS] if main else []
    try:
        yield stop
    finally:
        for number, handler in before:
            signal.signal(number, handler)
