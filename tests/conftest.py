"""Two processes share the machine's cores, so each computes on one."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
