"""Two processes share the machine's cores, so each computes on one."""

from __future__ import annotations

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("tilepipe", deadline=None)  # shared machines pause
settings.load_profile("tilepipe")
