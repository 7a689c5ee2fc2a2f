"""`merge` on the device: one launch, all parts of a row read together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton

from taut.common_kernels.merge.triton_merge import taut_merge, taut_merge_states
from taut.common_kernels.schedule.triton_launch import launch_options

if TYPE_CHECKING:
    from torch import Tensor

    from taut.common_kernels.workspace import ScheduledWorkspace

NUMBERS = 2048  # of partials that one program of `merge_items` reads together
MANY_PARTIALS = 32  # of an item: from here on one warp merges sooner than two, as measured on an H200


def merge(partials: Tensor, partial_lses: Tensor, out: Tensor, lse: Tensor | None = None) -> None:
    """See `Kernels.merge`."""
    count, tokens, heads, value = partials.shape
    if tokens == 0:
        return
    columns = triton.next_power_of_2(value)
    together = max(1, 1024 // columns)
    taut_merge_states[(triton.cdiv(tokens * heads, together),)](
        partials,
        partial_lses,
        out,
        lse if lse is not None else partial_lses,
        count,
        *partials.stride(),
        *partial_lses.stride(),
        *out.stride(),
        *(lse.stride() if lse is not None else (0, 0)),
        tokens,
        HEADS=heads,
        VALUE_SIZE=value,
        BLOCK_M=together,
        BLOCK_V=columns,
        ODD=count % 2 == 1,
        HAS_LSE=lse is not None,
        num_warps=4,
    )


def merge_items(workspace: ScheduledWorkspace, out: Tensor, lse: Tensor | None, rows: int, early: bool = False) -> None:
    """Merge the partial results of every split item of a step into the output, in one launch.

    Row r of a partial belongs to query `r // Hq` of the item and head `r % Hq`. Items that were not split are left as
    they are.

    Args:
        workspace: prepared for the step, its scratch filled.
        out: [T, Hq, V].
        lse: [T, Hq] float32, written if given.
        rows: how many rows of a partial are in use at most.
        early: whether the kernel launched just before says itself when this one may start (NVIDIA, sm_90+).
    """
    shape, scratch = workspace.schedule.shape, workspace.scratch
    if shape.parts == 1:
        return  # nothing is ever split
    heads, value = out.shape[1:]
    by_item = shape.merges_by_item(workspace.items)
    programs = workspace.items if by_item else shape.parts - 1
    chunk, together, columns, warps = merge_sizes(shape.parts, workspace.items, value)
    taut_merge[(triton.cdiv(value, columns), triton.cdiv(rows, together), programs)](
        scratch.partials,
        scratch.lses,
        workspace.schedule.items,
        workspace.schedule.parts,
        out,
        lse if lse is not None else scratch.lses,
        *out.stride(),
        *(lse.stride() if lse is not None else (0, 0)),
        HEADS=heads,
        PARTIAL_M=scratch.partials.shape[1],
        VALUE_SIZE=value,
        BLOCK_M=together,
        BLOCK_V=columns,
        CHUNK=chunk,
        BY_ITEM=by_item,
        HAS_LSE=lse is not None,
        EARLY=early,
        num_warps=warps,
        **launch_options(early),
    )


def merge_sizes(parts: int, items: int, value_size: int) -> tuple[int, int, int, int]:
    """How many partials, rows and columns one program reads together, and its warps; a pure function.

    As many partials as an item has where all items are alike, since every further round waits for memory anew. Then as
    many columns and rows as a program can hold, so that all programs run at once. Sums over many partials go from
    thread to thread, for which one warp needs no barrier; of few partials each thread has them all, and two warps share
    the columns. Alike for all numbers of items from one power of two to the next: whoever has tried the powers has
    compiled every variant.
    """
    alike = 1 << (max(items, 1).bit_length() - 1)
    chunk = min(128, max(2, triton.next_power_of_2(parts // alike)))
    columns = min(triton.next_power_of_2(value_size), max(32, NUMBERS // chunk))
    return chunk, min(8, max(1, NUMBERS // (chunk * columns))), columns, 1 if chunk >= MANY_PARTIALS else 2
