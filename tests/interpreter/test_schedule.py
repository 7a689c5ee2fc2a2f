"""The device's schedule equals its twin in Python."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taut.common_kernels.schedule.reference import schedule
from taut.common_kernels.schedule.shape import Item, Part, ScheduleShape, most_items
from taut.common_kernels.schedule.triton_launch import DeviceSchedule
from taut.common_kernels.step import PageTable, Step


@given(
    rows=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 9)), max_size=40)
    | st.builds(lambda row, count: [row] * count, st.tuples(st.integers(0, 20000), st.just(1)), st.integers(1, 300)),
    many=st.sampled_from((1, 1, 30)),
    parts=st.sampled_from((1, 7, 132, 300)),
    tile=st.sampled_from((16, 64)),
    block=st.sampled_from((1, 2, 4, 64)),
    left=st.sampled_from((-1, 0, 100)),
    right=st.sampled_from((-1, 0)),
    share=st.sampled_from((1, 3)),
    spare=st.sampled_from((0, 9)),
)
@settings(max_examples=25)
def test_equals_its_twin(
    rows: list[tuple[int, int]],
    many: int,
    parts: int,
    tile: int,
    block: int,
    left: int,
    right: int,
    share: int,
    spare: int,
) -> None:
    rows = rows * many
    lengths, queries = [n for n, _ in rows], [m for _, m in rows]
    starts = [0, *torch.tensor(queries, dtype=torch.int64).cumsum(0).tolist()]
    max_query = max(queries, default=0)
    max_items = most_items(len(rows), starts[-1], block, max_query)
    shape = ScheduleShape(parts, max_items, tile, block, left, right, share, spare)
    step = Step(
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(lengths, dtype=torch.int32),
        PageTable(torch.zeros(max(1, len(rows)), 1, dtype=torch.int32), 64),
        max_query,
        max(lengths, default=0),
    )
    device = DeviceSchedule(shape, len(rows), "cpu")
    for table in (device.items, device.parts):
        table.fill_(77)  # an earlier step's
    bound = device.launch(step)
    expected = schedule(shape, lengths, starts)
    assert len(expected.items) <= bound <= max_items
    assert [Part(*record[:5]) for record in device.parts.tolist()] == expected.parts
    items = [Item(*record) for record in device.items[: len(expected.items)].tolist()]
    assert [_meaning(item) for item in items] == [_meaning(item) for item in expected.items]
    if bound < parts:  # then the merge looks at all of them
        assert not device.items[len(expected.items) : bound, Item._fields.index("splits")].any()
    for part, record in zip(expected.parts, device.parts.tolist(), strict=True):
        first = items[part.first_item] if part.last_item >= 0 else Item(*[0] * 8)
        assert Item(*record[8:]) == first  # each part brings its first item along


def _meaning(item: Item) -> Item:
    return item if item.splits > 1 else item._replace(first_partial=0)
