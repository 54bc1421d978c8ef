"""Losses against torch's own and the formula; ignored voxels change nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn import functional

from tilepipe.training.losses import (
    CLASS_LOSSES,
    LOSSES,
    VALUE_LOSSES,
    both,
    cross_entropy,
    dice,
    l1,
    l2,
)
from tilepipe.training.targets import IGNORE

if TYPE_CHECKING:
    from torch import Tensor

SIZES = [(5, 7), (3, 4, 5)]


def sample(
    name: str, classes: int, size: tuple[int, ...], ignored: float = 0.3
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logits, truth, weights, and where the truth is known (B, S)."""
    torch.manual_seed(classes)
    logits = (3 * torch.randn(2, classes, *size)).requires_grad_()
    known = torch.rand(2, *size) >= ignored
    if name in VALUE_LOSSES:
        truth = torch.randn(2, classes, *size)
        truth = torch.where(known[:, None], truth, torch.nan)
    else:
        truth = torch.randint(0, max(classes, 2), (2, *size))
        truth = torch.where(known, truth, IGNORE)
    return logits, truth, 5 * torch.rand(2, *size), known


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_is_the_weighted_mean_over_labelled_voxels(
    size: tuple[int, ...], weighted: bool
) -> None:
    logits, truth, weights, known = sample("cross-entropy", 4, size)
    chosen = logits.log_softmax(1).gather(1, truth.where(known, 0)[:, None])[:, 0]
    by_hand = -(weights if weighted else 1) * chosen
    found = cross_entropy(logits, truth, weights=weights if weighted else None)
    torch.testing.assert_close(found, by_hand[known].mean())
    if not weighted:
        torch.testing.assert_close(
            found, functional.cross_entropy(logits, truth, ignore_index=IGNORE)
        )


@pytest.mark.parametrize("name", CLASS_LOSSES)
def test_one_logit_is_two_of_which_one_is_zero(name: str) -> None:
    logits, truth, weights, _ = sample(name, 1, (6, 5))
    two = torch.cat([torch.zeros_like(logits), logits], dim=1)
    found = LOSSES[name](logits, truth, weights=weights)
    if name == "cross-entropy":
        torch.testing.assert_close(found, LOSSES[name](two, truth, weights=weights))
    else:
        assert 0 < found < LOSSES[name](two, truth, weights=weights) + 1


@pytest.mark.parametrize("size", SIZES)
def test_dice_is_the_formula_over_the_batch(size: tuple[int, ...]) -> None:
    logits, truth, _, known = sample("dice", 3, size)
    likely, overlaps = logits.softmax(1), []
    for index in range(3):
        p, t = likely[:, index][known], (truth[known] == index).float()
        overlaps.append((2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1))
    torch.testing.assert_close(dice(logits, truth), 1 - sum(overlaps) / 3)


def test_dice_of_the_right_answer_is_zero_and_of_the_wrong_one_nearly_one() -> None:
    truth = torch.randint(0, 2, (1, 30, 30))  # of class 2 there is none
    right = 100 * functional.one_hot(truth, 3).movedim(-1, 1).float()
    wrong = 100 * functional.one_hot(1 - truth, 3).movedim(-1, 1).float()
    assert dice(right, truth).item() == pytest.approx(0, abs=1e-6)
    assert dice(wrong, truth).item() == pytest.approx(2 / 3, abs=1e-2)


def test_dice_counts_a_voxel_as_often_as_its_weight() -> None:
    logits, truth, _, _ = sample("dice", 3, (4, 6))
    times = torch.randint(0, 4, (6,))
    repeated = dice(logits.repeat_interleave(times, dim=-1), truth.repeat_interleave(times, dim=-1))
    torch.testing.assert_close(dice(logits, truth, weights=times.expand(2, 4, 6)), repeated)


@pytest.mark.parametrize("size", SIZES)
def test_losses_of_values_are_torchs(size: tuple[int, ...]) -> None:
    logits, truth, weights, known = sample("l1", 2, size)
    where = known[:, None].expand_as(truth)
    torch.testing.assert_close(l1(logits, truth), functional.l1_loss(logits[where], truth[where]))
    torch.testing.assert_close(l2(logits, truth), functional.mse_loss(logits[where], truth[where]))
    apart = weights[:, None] * (logits - truth) ** 2
    torch.testing.assert_close(l2(logits, truth, weights=weights), apart[where].mean())


def test_both_is_the_sum() -> None:
    logits, truth, weights, _ = sample("both", 3, (6, 5))
    found = both(logits, truth, weights=weights)
    torch.testing.assert_close(
        found, cross_entropy(logits, truth, weights=weights) + dice(logits, truth)
    )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_ignored_voxels_change_nothing(name: str, classes: int, weighted: bool) -> None:
    logits, truth, weights, known = sample(name, classes, (6, 5))
    weights = torch.where(known, weights, torch.nan)
    given = weights if weighted else None
    loss = LOSSES[name](logits, truth, weights=given)
    assert loss.shape == ()
    loss.backward()
    assert logits.grad is not None
    grad = logits.grad.movedim(1, -1)
    assert grad.isfinite().all()
    assert (grad[~known] == 0).all()
    assert (grad[known] != 0).any()
    other = torch.where(known[:, None], logits, 50 * torch.randn_like(logits))
    assert LOSSES[name](other, truth, weights=given) == loss


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("classes", [1, 3])
def test_where_nothing_is_labelled_the_loss_is_zero_and_so_is_its_gradient(
    name: str, classes: int
) -> None:
    logits, truth, weights, _ = sample(name, classes, (6, 5), ignored=1.1)
    loss = LOSSES[name](logits, truth, weights=weights)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("classes", [1, 3])
def test_losses_are_computed_in_float32_under_autocast(name: str, classes: int) -> None:
    logits, truth, weights, _ = sample(name, classes, (6, 5))
    half = logits.detach().bfloat16()
    plain = LOSSES[name](half.float(), truth, weights=weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = LOSSES[name](half, truth, weights=weights)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_small_differences(name: str) -> None:
    logits, truth, weights, _ = sample(name, 3, (2, 3))
    wide = logits.detach().double().requires_grad_()
    truth = truth.double() if name in VALUE_LOSSES else truth
    assert torch.autograd.gradcheck(
        lambda x: LOSSES[name](x, truth, weights=weights.double()), (wide,)
    )
