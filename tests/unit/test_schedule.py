"""The schedule in Python: every tile covered exactly once, equal shares, scratch within its bound."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taut.common_kernels.schedule.reference import IDLE, Schedule, active_parts, schedule, tiles_of
from taut.common_kernels.schedule.shape import ScheduleShape, most_items, most_partials, parts_that_fit

ROWS = st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 9)), max_size=40)


@st.composite
def shapes(draw: st.DrawFn) -> ScheduleShape:
    return ScheduleShape(
        parts=draw(st.sampled_from((1, 2, 7, 66, 132))),
        max_items=10_000,
        cut=draw(st.sampled_from((1, 16, 64))),
        block=draw(st.sampled_from((1, 2, 4, 64))),
        left=draw(st.sampled_from((-1, 0, 100))),
        right=draw(st.sampled_from((-1, 0, 3))),
        minimum_share=draw(st.sampled_from((1, 3))),
        spare=draw(st.sampled_from((0, 4))),
    )


def starts_of(rows: list[tuple[int, int]]) -> list[int]:
    starts = [0]
    for _, queries in rows:
        starts.append(starts[-1] + queries)
    return starts


def pieces(shape: ScheduleShape, made: Schedule) -> dict[int, list[tuple[int, range, int]]]:
    """Of each item: which part works on which of its tiles, and where that partial lies, read as a kernel reads it."""
    found: dict[int, list[tuple[int, range, int]]] = {}
    for p, part in enumerate(made.parts):
        for i in range(part.first_item, part.last_item + 1):
            item = made.items[i]
            begin = part.first_tile if i == part.first_item else 0
            end = part.end_tile if i == part.last_item else tiles_of(item, shape.cut)
            split = part.split if i == part.first_item else 0
            if begin < end:
                found.setdefault(i, []).append((p, range(begin, end), item.first_partial + split))
    return found


@given(ROWS, shapes())
@settings(max_examples=150)
def test_every_tile_exactly_once(rows: list[tuple[int, int]], shape: ScheduleShape) -> None:
    made = schedule(shape, [n for n, _ in rows], starts_of(rows))
    found = pieces(shape, made)
    places: list[int] = []
    for i, item in enumerate(made.items):
        covered = [tile for _, tiles, _ in found.get(i, []) for tile in tiles]
        assert covered == list(range(tiles_of(item, shape.cut)))
        assert item.splits == len(found.get(i, []))
        if item.splits > 1:
            places += [place for _, _, place in found[i]]
            assert places[-item.splits :] == list(range(item.first_partial, item.first_partial + item.splits))
    assert len(set(places)) == len(places), "two partials in one place"
    assert max(places, default=-1) < most_partials(shape.parts, len(made.items))
    assert len(made.items) <= most_items(len(rows), starts_of(rows)[-1], shape.block)
    assert len(made.items) <= most_items(
        len(rows), starts_of(rows)[-1], shape.block, max((m for _, m in rows), default=0)
    )


@given(ROWS, shapes())
@settings(max_examples=150)
def test_equal_shares(rows: list[tuple[int, int]], shape: ScheduleShape) -> None:
    made = schedule(shape, [n for n, _ in rows], starts_of(rows))
    shares = [0] * shape.parts
    for found in pieces(shape, made).values():
        for p, tiles, _ in found:
            shares[p] += len(tiles)
    busy = [share for share, part in zip(shares, made.parts, strict=True) if part != IDLE]
    assert all(share == 0 for share in shares[len(busy) :]), "idle parts stand at the end"
    if busy:
        assert max(busy) - min(busy) <= 1, "shares are equal within one tile"
        equal = -(-sum(busy) // min(shape.parts, -(-sum(busy) // shape.minimum_share)))
        assert max(busy) <= equal + shape.spare


@given(ROWS, shapes())
@settings(max_examples=100)
def test_every_query_in_one_item_with_all_that_it_sees(rows: list[tuple[int, int]], shape: ScheduleShape) -> None:
    starts = starts_of(rows)
    made = schedule(shape, [n for n, _ in rows], starts)
    seen_by = {}
    for item in made.items:
        length, queries = rows[item.row]
        for i in range(item.queries):
            query = item.first_query + i
            assert query not in seen_by
            seen_by[query] = item
            position = length - queries + query - starts[item.row]
            assert item.first_position + i == position
            first = max(0, position - shape.left) if shape.left >= 0 else 0
            last = min(length, position + shape.right + 1) if shape.right >= 0 else length
            assert first >= last or (item.first_key <= first and last <= item.end_key)
        assert item.first_key % shape.cut == 0
    assert sorted(seen_by) == list(range(starts[-1]))


@pytest.mark.parametrize(
    ("rows", "parts", "spare", "active"),
    [
        (32, 66, 4, 64),  # two parts an item, instead of cuts that drift through the items
        (64, 66, 4, 64),
        (128, 66, 4, 64),  # two items a part
        (128, 66, 2, 66),  # that would be too long
        (40, 66, 4, 66),
        (2, 66, 4, 66),
        (32, 66, 0, 66),
    ],
)
def test_rows_that_are_alike_are_cut_at_their_ends(rows: int, parts: int, spare: int, active: int) -> None:
    shape = ScheduleShape(parts, rows, 64, 1, spare=spare)
    assert active_parts(shape, [64] * rows) == active
    made = schedule(shape, [4096] * rows, list(range(rows + 1)))
    if active == 64:
        assert all(item.splits == max(1, 64 // rows) for item in made.items)


def test_parts_are_a_whole_wave() -> None:
    assert parts_that_fit(132, 1, 2) == 66
    assert parts_that_fit(132, 2, 1) == 264
    assert parts_that_fit(4, 1, 8) == 1
