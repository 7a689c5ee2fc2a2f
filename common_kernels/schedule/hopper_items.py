"""The schedule's tables as kernels in Gluon read them; see `triton_launch`, which writes them and explains them."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from taut.common_kernels.schedule import triton_items

RECORD = gl.constexpr(triton_items.RECORD.value)
PART_RECORD = gl.constexpr(triton_items.PART_RECORD.value)


@gluon.jit
def load_part(parts: gl.tensor, part: gl.tensor) -> gl.tensor:
    """The record of a part: first item, first tile, last item (-1 where idle), end tile, split of the first item."""
    record = parts + part * PART_RECORD
    return gl.load(record), gl.load(record + 1), gl.load(record + 2), gl.load(record + 3), gl.load(record + 4)


@gluon.jit
def load_first_item(parts: gl.tensor, part: gl.tensor) -> gl.tensor:
    """The record of the item that a part begins in, as `load_item` gives it; zeros where the part idles."""
    return load_item(parts + RECORD, part * (PART_RECORD // RECORD))


@gluon.jit
def load_item(items: gl.tensor, item: gl.tensor) -> gl.tensor:
    """The record of an item: row, first query, queries, first position, first key, end key, splits, first partial."""
    record = items + item * RECORD
    return (
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
def tiles_of(
    queries: gl.tensor,
    first_key: gl.tensor,
    end_key: gl.tensor,
    TILE: gl.constexpr,
) -> gl.tensor:
    """Tiles of an item; see `reference.tiles_of`."""
    return gl.where(queries > 0, gl.maximum(gl.cdiv(end_key - first_key, TILE), 1), 0)


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
