"""The schedule in plain Python: to read, to test against, and to size buffers with. Imports neither torch nor triton.

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
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class ScheduleShape:
    """What does not change from step to step.

    Args:
        parts: how many parts the line of tiles is cut into; see `parts_that_fit`.
        max_items: the most work items a step can have; see `most_items`.
        tile: keys in a tile.
        block: the most queries in a work item.
        left: how far back a query sees, itself not counted; -1 for all.
        right: how far ahead it sees, 0 where causal; -1 for all. A schedule that sees more than the mask is right too:
            the kernel masks.
        minimum_share: tiles; a part gets no fewer while others have none.
        spare: tiles by which the longest part may exceed an equal share, so that parts end where items end if all items
            are alike; see `active_parts`.
        longest: rows with more queries than this get no items, since another kernel serves them; 0 for no bound,
            and otherwise no less than `block`.
    """

    parts: int
    max_items: int
    tile: int
    block: int
    left: int = -1
    right: int = -1
    minimum_share: int = 1
    spare: int = 0
    longest: int = 0

    def merges_by_item(self, items: int) -> bool:
        """Whether the merge of a step that can have so many items looks at each of them, and not at each part."""
        return items < self.parts


class Item(NamedTuple):
    """One work item; the fields stand in this order in the device's table.

    Args:
        row: the row of the step.
        first_query: its first query, counted over the whole step.
        queries: how many; 0 in the one item of a row without queries, which has no tiles and is in no part.
        first_position: where in the row its first query stands.
        first_key: the position of its first tile's first key, a multiple of the tile.
        end_key: the first position that none of its queries sees.
        splits: how many parts work on it; 0 without tiles.
        first_partial: where in scratch the first of its partials lies; of no meaning where `splits` is below 2.
    """

    row: int
    first_query: int
    queries: int
    first_position: int
    first_key: int
    end_key: int
    splits: int
    first_partial: int


class Part(NamedTuple):
    """One part; the fields stand in this order in the device's table.

    Args:
        first_item: the item it begins in.
        first_tile: the tile of that item it begins with.
        last_item: the item it ends in; -1 in an idle part.
        end_tile: the first tile of that item that is no longer its own.
        split: which of the first item's partials is its own.
    """

    first_item: int
    first_tile: int
    last_item: int
    end_tile: int
    split: int


IDLE = Part(0, 0, -1, 0, 0)


class Schedule(NamedTuple):
    """The work of one step.

    Args:
        items: every item.
        parts: every part, idle ones at the end.
    """

    items: list[Item]
    parts: list[Part]


def parts_that_fit(multiprocessors: int, programs_each: int, head_blocks: int) -> int:
    """Parts of a whole wave: every part is worked on by one program for each block of heads, and all run at once.

    Args:
        multiprocessors: of the device.
        programs_each: how many programs share one.
        head_blocks: into how many programs the heads of one item are cut.
    """
    return max(1, multiprocessors * programs_each // head_blocks)


def most_items(rows: int, tokens: int, block: int, max_query: int = 0) -> int:
    """The most work items of a step.

    Args:
        rows: at most so many.
        tokens: at most so many queries in all rows.
        block: the most queries in an item.
        max_query: the most queries in a row; 0 for no bound.
    """
    # The rows have at most tokens // block full blocks, and each at most one more that is not full; a row without
    # queries has one item all the same.
    bound = rows + tokens // block
    return min(bound, rows * max(1, -(-max_query // block))) if max_query else bound


def most_partials(parts: int, items: int) -> int:
    """The most partial results of a step.

    Parts meet in parts - 1 places. One amid an item adds a partial to it, and splitting an item at all adds one more.
    """
    return parts - 1 + min(items, parts - 1)


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
        starts.append(starts[-1] + tiles_of(item, shape.tile))
    total = starts[-1]
    active = active_parts(shape, [tiles_of(item, shape.tile) for item in items])

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
        first_key = max(0, min(first_position - shape.left, end_key)) // shape.tile * shape.tile
    return Item(row, first_query, queries, first_position, first_key, end_key, 0, 0)
