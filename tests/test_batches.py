"""Laws of batches: whatever becomes of them, a tile is settled once, blamed for itself only."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tilepipe.engines import TileFailure, TileResult
from tilepipe.engines.attempts import Back, Failed, Tiles
from tilepipe.engines.batches import MOST, SPAN, Batch, Ended, Pace, of_each

DIED = Failed("died", opening=False, lost=True)
BAD = Failed("bad", opening=False)


def result(index: int) -> TileResult:
    return TileResult(index, 1, 0, 0.0, 0.0, 0.0, "host:1")


@given(
    tiles=st.integers(0, 60),
    retries=st.integers(0, 3),
    workers=st.integers(0, 3),
    most=st.integers(1, 9),
    window=st.integers(1, 5),
    data=st.data(),
)
def test_each_tile_is_settled_once_and_blamed_for_itself_only(
    tiles: int, retries: int, workers: int, most: int, window: int, data: st.DataObject
) -> None:
    todo, flying = Tiles(range(tiles), retries), list[tuple[int, ...]]()
    blamed, settled = Counter[int](), dict[int, TileResult | TileFailure]()
    suspects, trouble = set[int](), data.draw(st.integers(0, 30))
    while True:
        while len(flying) < window and (batch := todo.take(workers, most)):
            assert len(batch) <= most
            assert len(batch) == 1 or not suspects & {*batch}
            flying.append(batch)
        if not flying:
            break
        batch = flying.pop(data.draw(st.integers(0, len(flying) - 1)))
        ended: Ended | Failed | Back = Ended(tuple(map(result, batch)), 0.1)
        if trouble:
            trouble -= 1
            bad = Ended((*map(result, batch[:-1]), BAD), 0.1)
            cut = Ended((*map(result, batch[:-1]), Back()), 0.1)
            short = Ended((result(batch[0]),), 0.1)
            ended = data.draw(st.sampled_from([ended, DIED, Back(), bad, cut, short]))
            if ended is bad or (ended is DIED and len(batch) == 1):
                blamed[batch[-1]] += 1
            if ended is DIED:
                suspects |= {*batch}
        for index, outcome in of_each(batch, ended):
            if not isinstance(outcome, Failed) or not outcome.lost:
                suspects.discard(index)
            if (known := todo.end(index, outcome)) is not None:
                assert index not in settled
                settled[index] = known
    assert sorted(settled) == [*range(tiles)]
    for index, known in settled.items():
        assert known.attempts == blamed[index] + isinstance(known, TileResult)
        assert isinstance(known, TileFailure) == (blamed[index] > retries)


def test_of_a_batch_that_is_lost_each_tile_is_tried_alone() -> None:
    todo = Tiles(range(6), retries=0)
    assert todo.take(1, 4) == (0, 1, 2, 3)
    assert [todo.end(*each) for each in of_each((0, 1, 2, 3), DIED)] == [None] * 4
    assert todo.take(1, 4) == (0,)
    assert todo.take(1, 4) == (4, 5)  # one on trial for each worker
    assert todo.end(0, result(0)) == result(0)
    assert todo.take(1, 4) == (1,)
    assert [todo.end(*each) for each in of_each((1,), DIED)] == [TileFailure(1, "died", 1)]


@given(each=st.floats(1e-5, 10), before=st.integers(1, MOST), threads=st.integers(1, 10_000))
def test_a_batch_takes_its_span_and_no_longer(each: float, before: int, threads: int) -> None:
    pace = Pace(slots=2)
    assert pace.most(threads) == 1
    pace.note(Ended(tuple(map(result, range(before))), each * before))
    most, span = pace.most(threads), pace.span(threads)
    assert span >= SPAN
    assert threads / span <= 100.0001
    assert 1 <= most <= min(MOST, 2 * before)
    assert most == 1 or most * each <= span * 1.0001
    pace.note(Ended((Back(),), 0.0))
    assert pace.most(threads) == most


def test_what_tiles_take_is_told_to_those_that_come() -> None:
    pace = Pace(slots=3)
    pace.note(Ended((TileResult(0, 1, 0, 0.1, 0.2, 0.3, "host:1"), BAD), 0.6))
    assert abs(pace.expected - 1.8) < 1e-9
    assert Batch((1,), SPAN, pace.expected).expected == pace.expected
