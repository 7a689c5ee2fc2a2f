"""The schedule's tables as kernels in Triton read them; `triton_schedule` writes them.

The tables are int32. A record of an item has eight numbers, the fields of `Item` in their order. A record of a part has
sixteen: the fields of `Part`, three of no meaning, and those of its first item, so that a program which begins a part
need not wait twice for memory before it knows where its keys are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from taut.common_kernels.aggregates import aggregates_of

RECORD = tl.constexpr(8)
PART_RECORD = tl.constexpr(16)


@aggregates_of(tl, triton)
class Schedule:
    """Who computes what: the tables of a step.

    Attributes:
        items: pointer to the records of items.
        parts: pointer to the records of parts.
    """

    items: tl.tensor
    parts: tl.tensor


@aggregates_of(tl, triton)
class Part:
    """A program's share of the schedule.

    Attributes:
        first_item: number of the item that it begins in.
        first_tile: of that item, the schedule tile that it begins with.
        last_item: number of the item that it ends in; -1 where it idles.
        end_tile: of that item, past its last schedule tile.
        first_split: how many parts of its first item come before it.
    """

    first_item: tl.tensor
    first_tile: tl.tensor
    last_item: tl.tensor
    end_tile: tl.tensor
    first_split: tl.tensor


@aggregates_of(tl, triton)
class Item:
    """Some queries of one row and the keys that they may see.

    Attributes:
        row: the request.
        first_query: place of its first query among those of the step.
        queries: how many it has.
        first_position: of its first query in the row.
        first_key: position of its first key.
        end_key: past the position of its last key.
        splits: in how many parts it lies; 0 where it has no tiles.
        first_partial: number of its first partial, if it is split.
    """

    row: tl.tensor
    first_query: tl.tensor
    queries: tl.tensor
    first_position: tl.tensor
    first_key: tl.tensor
    end_key: tl.tensor
    splits: tl.tensor
    first_partial: tl.tensor


@triton.jit
def load_part(schedule: Schedule, number: tl.tensor) -> Part:
    """A part by its number."""
    record = schedule.parts + number * PART_RECORD
    return Part(tl.load(record), tl.load(record + 1), tl.load(record + 2), tl.load(record + 3), tl.load(record + 4))


@triton.jit
def load_item(schedule: Schedule, number: tl.tensor) -> Item:
    """An item by its number."""
    return load_record(schedule.items + number * RECORD)  # type: ignore[no-any-return]


@triton.jit
def load_first_item(schedule: Schedule, number: tl.tensor) -> Item:
    """The item that a part begins in, which lies beside the part's record; zeros where the part idles."""
    return load_record(schedule.parts + number * PART_RECORD + RECORD)  # type: ignore[no-any-return]


@triton.jit
def load_record(record: tl.tensor) -> Item:
    """The item whose record begins at an address."""
    return Item(
        tl.load(record),
        tl.load(record + 1),
        tl.load(record + 2),
        tl.load(record + 3),
        tl.load(record + 4),
        tl.load(record + 5),
        tl.load(record + 6),
        tl.load(record + 7),
    )


@triton.jit
def tiles_of(item: Item, CUT: tl.constexpr) -> tl.tensor:
    """Schedule tiles of an item, of CUT keys each."""
    return tiles_between(item.queries, item.first_key, item.end_key, CUT)


@triton.jit
def tiles_between(queries: tl.tensor, first_key: tl.tensor, end_key: tl.tensor, CUT: tl.constexpr) -> tl.tensor:
    """Schedule tiles between two keys: at least one, if there are queries."""
    return tl.where(queries > 0, tl.maximum(tl.cdiv(end_key - first_key, CUT), 1), 0)
