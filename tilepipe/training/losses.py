"""What training makes small. Ignored voxels change nothing; where all are ignored, the loss is 0.

Shape suffixes: ``B`` batch, ``K`` the network's output channels, ``S`` the spatial axes. Classes
are integers with IGNORE where nobody labelled; values are floats with NaN there. Each loss is a
scalar in float32, whatever precision the logits come in (float64 stays).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn import functional

from tilepipe.training.targets import IGNORE

if TYPE_CHECKING:
    from torch import Tensor


class Loss(Protocol):
    """A loss: logits and truth, and a weight for each voxel or none."""

    def __call__(self, logits: Tensor, truth: Tensor, *, weights: Tensor | None = None) -> Tensor:
        """Return the scalar that training makes small."""
        ...


def cross_entropy(logits: Tensor, truth: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Return the mean over labelled voxels of ``w(x)`` times the cross entropy at x.

    The paper's energy (arXiv:1505.04597, equation 1) over the number of labelled voxels, and not
    over the sum of weights, or a batch with many borders would weigh no more than one with few.

    ``logits`` (B, K, S): the softmax over K classes; with K = 1 the logit of class 1 against
    class 0. ``truth`` (B, S) int64. ``weights`` (B, S).
    """
    logits_BKS, known_BS = _wide(logits), truth != IGNORE
    if logits.shape[1] == 1:
        class_BS = torch.where(known_BS, truth, 0).to(logits_BKS.dtype)
        entropy_BS = functional.binary_cross_entropy_with_logits(
            logits_BKS[:, 0], class_BS, reduction="none"
        )
    else:
        entropy_BS = functional.cross_entropy(
            logits_BKS, truth, ignore_index=IGNORE, reduction="none"
        )
    return _mean(entropy_BS, known_BS, weights)


def dice(logits: Tensor, truth: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Return 1 minus the soft Dice overlap, the mean over classes, of the batch as one image.

    For a class with probability p and truth t the overlap is ``(2 sum p t + 1) / (sum p + sum t +
    1)``: the voxel that is added makes a class 1 that is neither true nor predicted.
    A voxel counts ``weights`` times. Shapes as in ``cross_entropy``; with K = 1 the one class is
    class 1. The background is a class as the others.
    """
    logits_BKS, known_BS = _wide(logits), truth != IGNORE
    class_BS = torch.where(known_BS, truth, 0)
    if logits.shape[1] == 1:
        likely_BKS = logits_BKS.sigmoid()
        truth_BKS = class_BS[:, None].to(likely_BKS.dtype)
    else:
        likely_BKS = logits_BKS.softmax(dim=1)
        truth_BKS = torch.zeros_like(likely_BKS).scatter_(1, class_BS[:, None], 1)
    counted_BKS = known_BS[:, None].to(likely_BKS.dtype)
    if weights is not None:
        counted_BKS = counted_BKS * _finite(weights, known_BS)[:, None]
    over = (0, *range(2, logits.dim()))
    both_K = (likely_BKS * truth_BKS * counted_BKS).sum(over)
    either_K = ((likely_BKS + truth_BKS) * counted_BKS).sum(over)
    return 1 - ((2 * both_K + 1) / (either_K + 1)).mean()


def both(logits: Tensor, truth: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Return the sum of ``cross_entropy`` with the weights and ``dice`` without them."""
    return cross_entropy(logits, truth, weights=weights) + dice(logits, truth)


def l1(logits: Tensor, truth: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Return the mean over known values of ``w(x)`` times the absolute difference.

    ``logits`` and ``truth`` (B, K, S), NaN where there is no truth; ``weights`` (B, S).
    """
    apart_BKS, known_BKS = _apart(logits, truth)
    return _mean(apart_BKS.abs(), known_BKS, weights)


def l2(logits: Tensor, truth: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Return the mean over known values of ``w(x)`` times the squared difference.

    Shapes as in ``l1``.
    """
    apart_BKS, known_BKS = _apart(logits, truth)
    return _mean(apart_BKS.square(), known_BKS, weights)


CLASS_LOSSES: dict[str, Loss] = {"cross-entropy": cross_entropy, "dice": dice, "both": both}
"""Losses of classes."""
VALUE_LOSSES: dict[str, Loss] = {"l1": l1, "l2": l2}
"""Losses of values."""
LOSSES: dict[str, Loss] = {**CLASS_LOSSES, **VALUE_LOSSES}
"""All losses by the name that a user gives."""


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _apart(logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    known = ~truth.isnan()
    apart = _wide(logits) - torch.where(known, truth, 0)
    return torch.where(known, apart, 0), known


def _finite(weights: Tensor, known: Tensor) -> Tensor:
    """Return the weights, and 0 where the truth is not known, whatever stands there."""
    return torch.where(known, weights, 0)


def _mean(loss: Tensor, known: Tensor, weights: Tensor | None) -> Tensor:
    """Return the weighted sum over what is known, divided by its number."""
    if weights is not None:
        spread = weights if weights.dim() == loss.dim() else weights[:, None]
        loss = loss * _finite(spread, known)
    return torch.where(known, loss, 0).sum() / known.sum().clamp(min=1)
