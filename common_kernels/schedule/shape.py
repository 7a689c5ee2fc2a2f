"""What a schedule is made of, and how much there can be of it: the host's part. Imports neither torch nor triton.

`reference` says what work items and parts are, and how they are made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class ScheduleShape:
    """What does not change from step to step.

    Args:
        parts: how many parts the line of tiles is cut into; see `parts_that_fit`.
        max_items: the most work items a step can have; see `most_items`.
        cut: keys of a schedule tile.
        block: the most queries in a work item.
        left: how far back a query sees, itself not counted; -1 for all.
        right: how far ahead it sees, 0 where causal; -1 for all. A schedule that sees more than the mask is right too:
            the kernel masks.
        minimum_share: tiles; a part gets no fewer while others have none.
        spare: tiles by which the longest part may exceed an equal share, so that parts end where items end if all items
            are alike; see `reference.active_parts`.
        longest: rows with more queries than this get no items, since another kernel serves them; 0 for no bound,
            and otherwise no less than `block`.
    """

    parts: int
    max_items: int
    cut: int
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
