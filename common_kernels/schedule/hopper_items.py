"""The schedule's tables as kernels in Gluon read them; see `triton_items`, its twin."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from taut.common_kernels.aggregates import aggregates_of
from taut.common_kernels.schedule import triton_items

RECORD = gl.constexpr(triton_items.RECORD.value)
PART_RECORD = gl.constexpr(triton_items.PART_RECORD.value)


@aggregates_of(gl, gluon)
class Schedule:
    """Who computes what: the tables of a step.

    Attributes:
        items: pointer to the records of items.
        parts: pointer to the records of parts.
    """

    items: gl.tensor
    parts: gl.tensor


@aggregates_of(gl, gluon)
class Part:
    """The record of a part.

    Attributes:
        first_item: the item that the part begins in.
        first_tile: the tile of that item that it begins with.
        last_item: the item that the part ends in, -1 where the part idles.
        end_tile: the tile of that item before which it ends.
        first_split: which split of the first item the part computes.
    """

    first_item: gl.tensor
    first_tile: gl.tensor
    last_item: gl.tensor
    end_tile: gl.tensor
    first_split: gl.tensor


@aggregates_of(gl, gluon)
class Item:
    """The record of an item.

    Attributes:
        row: whose queries these are.
        first_query: the token of the first of them.
        queries: how many they are; 0 of an item that there is not.
        first_position: the position of the first query in its row.
        first_key: the position of the first key of the first tile.
        end_key: the position that follows the last key.
        splits: how many parts share the item; each leaves a partial if they are several.
        first_partial: where the first partial lies.
    """

    row: gl.tensor
    first_query: gl.tensor
    queries: gl.tensor
    first_position: gl.tensor
    first_key: gl.tensor
    end_key: gl.tensor
    splits: gl.tensor
    first_partial: gl.tensor


@gluon.jit
def load_part(schedule: Schedule, number: gl.tensor) -> Part:
    """A part by its number."""
    record = schedule.parts + number * PART_RECORD
    return Part(gl.load(record), gl.load(record + 1), gl.load(record + 2), gl.load(record + 3), gl.load(record + 4))


@gluon.jit
def load_item(schedule: Schedule, number: gl.tensor) -> Item:
    """An item by its number."""
    return load_record(schedule.items + number * RECORD)  # type: ignore[no-any-return]


@gluon.jit
def load_first_item(schedule: Schedule, number: gl.tensor) -> Item:
    """The item that a part begins in, which lies beside the part's record; zeros where the part idles."""
    return load_record(schedule.parts + number * PART_RECORD + RECORD)  # type: ignore[no-any-return]


@gluon.jit
def load_record(record: gl.tensor) -> Item:
    """The item whose record begins at an address."""
    return Item(
        gl.load(record),
        gl.load(record + 1),
        gl.load(record + 2),
        gl.load(record + 3),
        gl.load(record + 4),
        gl.load(record + 5),
        gl.load(record + 6),
        gl.load(record + 7),
    )


@gluon.jit
def tiles_of(item: Item, CUT: gl.constexpr) -> gl.tensor:
    """Tiles of an item, of CUT keys each; see `reference.tiles_of`."""
    return gl.where(item.queries > 0, gl.maximum(gl.cdiv(item.end_key - item.first_key, CUT), 1), 0)


@gluon.jit
def wait_for_kernel_ahead() -> None:
    """Wait until the kernel that was launched before this one has ended: see `triton_launch.launch_options`.

    Each partition does so for itself, as its first act: by then its warps and their registers are in place.
    """
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def let_next_start() -> None:
    """Let the kernel that is launched after this one start, once some warp of each program has said so or it has ended.

    Whoever says so has waited for the kernel ahead: the next one may read without waiting what that had written.
    """
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
