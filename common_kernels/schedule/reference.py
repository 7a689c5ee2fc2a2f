"""The schedule in plain Python: to read, and to test against.

A *work item* is a block of consecutive queries of one row, with the run of keys that they see, cut into *tiles* of
keys. All tiles of a step, item after item, stand in one line. The line is cut into as many *parts* as programs run at
once, of equal length within one tile. A part may begin and end amid an item: that item is *split*, and each part that
works on it leaves a partial result in scratch, side by side with the item's other partials; `merge` makes one of
them. An item that lies within one part is written straight to the output.

The idea of a fixed number of parts with equal shares, made on the device, is FlashMLA's (its metadata kernel), and goes
back to Stream-K (arXiv 2301.03598) and Flash-Decoding.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

from taut.common_kernels.schedule.shape import Item, Part

if TYPE_CHECKING:
    from collections.abc import Sequence

    from taut.common_kernels.schedule.shape import ScheduleShape


IDLE = Part(0, 0, -1, 0, 0)


class Schedule(NamedTuple):
    """The work of one step.

    Args:
        items: every item.
        parts: every part, idle ones at the end.
    """

    items: list[Item]
    parts: list[Part]


def tiles_of(item: Item, tile: int) -> int:
    """Tiles of a work item. One that has queries but no keys counts as one: its output must be written too."""
    return max(-(-(item.end_key - item.first_key) // tile), 1) if item.queries else 0


def active_parts(shape: ScheduleShape, tiles: Sequence[int]) -> int:
    """How many parts the line of tiles is cut into; the others idle.

    All of them, unless there is too little to do. Where all items are alike, a few parts may idle so that the cuts fall
    on the ends of items: beginning another item and leaving another partial cost as much as several tiles.

    Args:
        shape: what does not change from step to step.
        tiles: of each item.
    """
    total, count = sum(tiles), sum(n > 0 for n in tiles)
    active = min(shape.parts, -(-total // shape.minimum_share))
    if not shape.spare or active < shape.parts or max(tiles, default=0) * count != total:
        return active
    each = -(-count // shape.parts)  # items of a part, or else one, cut into several parts
    even = shape.parts // count * count if count <= shape.parts else count // each
    fits = count % each == 0 and -(-total // even) <= -(-total // shape.parts) + shape.spare
    return even if fits else active


def part_of_tile(place: int, total: int, active: int) -> int:
    """Which of `active` parts the tile at `place` of the line belongs to: part p begins at `p * total // active`."""
    return ((place + 1) * active - 1) // total


def schedule(shape: ScheduleShape, lengths: Sequence[int], query_starts: Sequence[int]) -> Schedule:
    """The schedule of a step.

    Args:
        shape: what does not change from step to step.
        lengths: [R] cached tokens of each row.
        query_starts: [R + 1] the queries of row r are `query_starts[r] : query_starts[r + 1]`.
    """
    items = [
        _item(shape, row, length, query_starts[row + 1], first)
        for row, length in enumerate(lengths)
        if not 0 < shape.longest < query_starts[row + 1] - query_starts[row]
        for first in range(query_starts[row], max(query_starts[row + 1], query_starts[row] + 1), shape.block)
    ]
    starts = [0]
    for item in items:
        starts.append(starts[-1] + tiles_of(item, shape.cut))
    total = starts[-1]
    active = active_parts(shape, [tiles_of(item, shape.cut) for item in items])

    partials = 0
    for i, item in enumerate(items):
        splits = 0
        if starts[i] < starts[i + 1]:
            splits = part_of_tile(starts[i + 1] - 1, total, active) - part_of_tile(starts[i], total, active) + 1
        items[i] = item._replace(splits=splits, first_partial=partials)
        partials += splits if splits > 1 else 0

    parts = []
    for p in range(active):
        begin, end = p * total // active, (p + 1) * total // active
        first, last = (bisect_right(starts, place, 0, len(items)) - 1 for place in (begin, end - 1))
        split = p - part_of_tile(starts[first], total, active)
        parts.append(Part(first, begin - starts[first], last, end - starts[last], split))
    return Schedule(items, parts + [IDLE] * (shape.parts - active))


def _item(shape: ScheduleShape, row: int, length: int, row_end: int, first_query: int) -> Item:
    queries = min(shape.block, row_end - first_query)
    first_position = length - (row_end - first_query)
    end_key = length
    if shape.right >= 0:
        end_key = max(0, min(end_key, first_position + queries + shape.right))
    first_key = 0
    if shape.left >= 0:
        first_key = max(0, min(first_position - shape.left, end_key)) // shape.cut * shape.cut
    return Item(row, first_query, queries, first_position, first_key, end_key, 0, 0)
