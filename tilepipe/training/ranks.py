"""The processes that train together: one, or those that ``torchrun`` started."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from tilepipe.models.device import find_device

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Team:
    """One of the processes that train together, one for each device."""

    device: torch.device
    rank: int
    ranks: int

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until every process has come here."""
        if self.ranks > 1:
            torch.distributed.barrier()

    def agree(self, *values: float) -> tuple[float, ...]:
        """Return the values of the first process, in every one."""
        if self.ranks == 1:
            return values
        shared = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.broadcast(shared, 0)
        return tuple(shared.tolist())


def is_first() -> bool:
    """Whether this is the first of the processes that ``torchrun`` started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def joined(name: str) -> Iterator[Team]:
    """Join the processes that ``torchrun`` started, if it did; ``name`` names the device."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device(find_device(name))
    if ranks == 1:
        yield Team(device, 0, 1)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(hours=12),  # one process reads and validates while the others wait
    )
    team = Team(device, int(os.environ["RANK"]), ranks)
    try:
        yield team
        team.wait()  # none leaves while another still talks to it
    finally:
        torch.distributed.destroy_process_group()
