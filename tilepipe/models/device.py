"""Devices and precisions."""

from __future__ import annotations

import torch

from tilepipe.errors import BadRequest

PRECISIONS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def find_device(device: str, *, elsewhere: bool = False) -> str:
    """Return the device that ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` means on this machine.

    With ``elsewhere`` a device need not be one of this machine.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device)
    except RuntimeError:
        raise BadRequest(f"device (={device}) must be auto, cpu, cuda or cuda:N") from None
    if kind.type not in ("cpu", "cuda"):
        raise BadRequest(f"device (={device}) must be auto, cpu, cuda or cuda:N")
    if kind.type == "cuda" and not elsewhere:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (kind.index or 0) >= count:
            here = f"this machine has {count}, counted from 0" if count else "torch finds none here"
            raise BadRequest(f"device (={device}) must be a CUDA device; {here}: use auto or cpu")
    return device
