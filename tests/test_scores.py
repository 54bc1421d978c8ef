"""Scores are those of their definitions over all voxels and all pairs of voxels."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tilepipe.evaluation.scores import TWENTIETHS, object_scores, partition_scores, pixel_scores
from tilepipe.evaluation.table import Table, add, tabulate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Labels = NDArray[np.int64]

labels = arrays(np.int64, (3, 2, 4), elements=st.integers(0, 4))


def fenced(predicted: Labels, true: Labels) -> tuple[list[tuple[int, int]], list[int]]:
    """Return the objects of each voxel with a true label: predicted 0 is an object of its own."""
    kept = [(p, t) for p, t in zip(predicted.ravel(), true.ravel(), strict=True) if t]
    mine = [(0, place) if p == 0 else (1, int(p)) for place, (p, _) in enumerate(kept)]
    return mine, [int(t) for _, t in kept]


def entropy(of: list[object]) -> float:
    return -sum(n / len(of) * math.log2(n / len(of)) for n in Counter(of).values())


@settings(deadline=None, max_examples=60)
@given(predicted=labels, true=labels)
def test_partitions_are_compared_over_all_pairs_of_voxels(predicted: Labels, true: Labels) -> None:
    found = partition_scores(tabulate(predicted, true))
    mine, theirs = fenced(predicted, true)
    if not theirs:
        assert found is None
        return
    assert found is not None
    pairs = [(a, b) for a in range(len(mine)) for b in range(len(mine))]
    in_mine = {pair for pair in pairs if mine[pair[0]] == mine[pair[1]]}
    in_theirs = {pair for pair in pairs if theirs[pair[0]] == theirs[pair[1]]}
    both = len(in_mine & in_theirs)
    assert found.voxels == len(theirs)
    assert found.v_rand.split == pytest.approx(both / len(in_theirs))
    assert found.v_rand.merge == pytest.approx(both / len(in_mine))
    score = 2 * both / (len(in_mine) + len(in_theirs))
    assert found.v_rand.score == pytest.approx(score)
    assert found.rand_error == pytest.approx(1 - score)
    h_mine, h_theirs = entropy(mine), entropy(theirs)
    h_both = entropy(list(zip(mine, theirs, strict=True)))
    assert found.voi_split == pytest.approx(h_both - h_theirs, abs=1e-9)
    assert found.voi_merge == pytest.approx(h_both - h_mine, abs=1e-9)
    shared = h_mine + h_theirs - h_both
    for value, whole in (
        (found.v_info.split, h_mine),
        (found.v_info.merge, h_theirs),
        (found.v_info.score, (h_mine + h_theirs) / 2),
    ):
        assert value == pytest.approx(shared / whole if whole > 1e-12 else 1, abs=1e-9)


@settings(deadline=None, max_examples=40)
@given(predicted=labels, true=labels)
def test_planes_are_scored_apart(predicted: Labels, true: Labels) -> None:
    plane = np.arange(3)[:, None, None]
    found = partition_scores(tabulate(predicted, true, plane=plane))
    apart = [partition_scores(tabulate(p, t)) for p, t in zip(predicted, true, strict=True)]
    kept = [scores for scores in apart if scores is not None]
    if not kept:
        assert found is None
        return
    assert found is not None
    assert found.planes == len(kept)
    for name in ("v_rand", "v_info"):
        for part in ("score", "split", "merge"):
            mean = np.mean([getattr(getattr(scores, name), part) for scores in kept])
            assert getattr(getattr(found, name), part) == pytest.approx(mean)
    unique = predicted + 10 * plane * (predicted > 0), true + 10 * plane * (true > 0)
    pooled = partition_scores(tabulate(*unique))
    assert pooled is not None
    assert found.rand_error == pytest.approx(pooled.rand_error)
    objects = object_scores(tabulate(predicted, true, plane=plane))
    assert objects == object_scores(tabulate(*unique))


@settings(deadline=None, max_examples=60)
@given(predicted=labels, true=labels)
def test_objects_are_matched_one_by_one(predicted: Labels, true: Labels) -> None:
    found = object_scores(tabulate(predicted, true))
    mine, theirs = (set(np.unique(a).tolist()) - {0} for a in (predicted, true))
    assert (found.predicted, found.true) == (len(mine), len(theirs))
    for match, twentieth in zip(found.matches, TWENTIETHS, strict=True):
        hits = sum(
            20 * np.sum((predicted == a) & (true == b))
            > twentieth * np.sum((predicted == a) | (true == b))
            for a in mine
            for b in theirs
        )
        assert match.hits == hits
        total = len(mine) + len(theirs) - hits
        assert match.precision == (hits / total if total else 1)
    mean = np.mean([match.precision for match in found.matches])
    assert found.average_precision == pytest.approx(mean)


@settings(deadline=None, max_examples=60)
@given(predicted=labels, true=labels)
def test_voxels_are_compared_one_by_one(predicted: Labels, true: Labels) -> None:
    found = pixel_scores(tabulate(predicted, true))
    assert found.pixel_error == np.mean(predicted != true)
    assert [scores.label for scores in found.classes] == np.union1d(predicted, true).tolist()
    for scores in found.classes:
        p, t = predicted == scores.label, true == scores.label
        assert (scores.predicted, scores.true) == (p.sum(), t.sum())
        assert scores.dice == 2 * np.sum(p & t) / (p.sum() + t.sum())
        assert scores.iou == np.sum(p & t) / np.sum(p | t)


@settings(deadline=None, max_examples=60)
@given(predicted=labels, true=labels, cut=st.integers(0, 3), numbers=st.permutations(range(1, 5)))
def test_tables_of_blocks_add_up_and_numbers_do_not_matter(
    predicted: Labels, true: Labels, cut: int, numbers: list[int]
) -> None:
    plane = np.arange(3)[:, None, None]
    whole = tabulate(predicted, true, plane=plane)
    parts = [
        tabulate(predicted[part], true[part], plane=plane[part])
        for part in (slice(cut, None), slice(0, cut))
    ]
    together = add(parts)
    for name in ("plane", "predicted", "true", "voxels"):
        assert np.array_equal(getattr(together, name), getattr(whole, name))
    again = np.array([0, *numbers])
    renumbered = tabulate(again[predicted] * 10**12, again[true], plane=plane)
    assert partition_scores(renumbered) == partition_scores(whole)
    assert object_scores(renumbered) == object_scores(whole)


@settings(deadline=None, max_examples=60)
@given(true=labels, numbers=st.permutations(range(1, 5)))
def test_a_perfect_answer_scores_one(true: Labels, numbers: list[int]) -> None:
    table = tabulate(np.array([0, *numbers])[true], true)
    assert object_scores(table).average_precision == 1
    found = partition_scores(table)
    if found is not None:
        assert found.v_rand.score == found.v_rand.split == found.v_rand.merge == 1
        assert found.v_info.score == found.v_info.split == found.v_info.merge == 1
        assert found.rand_error == found.voi_split == found.voi_merge == 0
    assert pixel_scores(tabulate(true, true)).pixel_error == 0


def test_hand_computed_values() -> None:
    """Four voxels of a, two of b; the prediction cuts a in halves and loses one voxel of b."""
    true = np.array([1, 1, 1, 1, 2, 2, 0, 0])
    predicted = np.array([5, 5, 6, 6, 7, 0, 7, 7])
    found = partition_scores(tabulate(predicted, true))
    assert found is not None
    # Pairs: true 16 + 4; predicted 4 + 4 + 1 + 1; in both 4 + 4 + 1 + 1.
    assert found.v_rand.split == 10 / 20
    assert found.v_rand.merge == 10 / 10
    assert found.rand_error == pytest.approx(1 - 20 / 30)
    assert found.voi_split == pytest.approx(1)  # one bit within a, one within b
    assert found.voi_merge == 0
    objects = object_scores(tabulate(predicted, true))
    assert [match.hits for match in objects.matches] == [0] * 10  # 2/4, 2/4 and 1/4


def test_running_together_lowers_merge_and_cutting_apart_lowers_split() -> None:
    true = np.repeat([1, 2, 3, 4], 25)
    merged, cut = (true + 1) // 2, np.repeat(np.arange(1, 9), [12, 13] * 4)
    for predicted, perfect, worse in ((merged, "split", "merge"), (cut, "merge", "split")):
        found = partition_scores(tabulate(predicted, true))
        assert found is not None
        for scores in (found.v_rand, found.v_info):
            assert getattr(scores, perfect) == pytest.approx(1)
            assert getattr(scores, worse) < 0.8


def test_wide_numbers_stay_apart() -> None:
    ids = np.array([2**64 - 1, 2**63, 1, 0], np.uint64)
    found = object_scores(tabulate(ids, ids))
    assert (found.predicted, found.true, found.average_precision) == (3, 3, 1)


def test_tables_of_labels_with_and_without_a_sign_do_not_add_up() -> None:
    signed, unsigned = (tabulate(ids, ids) for ids in (np.array([-1]), np.array([1], np.uint64)))
    assert add([unsigned, add([]), unsigned]).unsigned == (True, True)
    with pytest.raises(ValueError, match="with and without a sign"):
        add([signed, unsigned])


def test_nothing_adds_up_to_nothing() -> None:
    nothing = np.zeros((0, 3), np.uint8)
    for table in (tabulate(nothing, nothing), add([])):
        assert isinstance(table, Table)
        assert len(table) == table.total == 0
        assert partition_scores(table) is None
        assert object_scores(table).average_precision == 1
        assert pixel_scores(table).classes == ()
