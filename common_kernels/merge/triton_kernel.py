"""`merge` on the device: one launch, all parts of a row read together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from taut.common_kernels.schedule.triton_kernel import load_item, load_part

if TYPE_CHECKING:
    from torch import Tensor

    from taut.common_kernels.workspace import ScheduledWorkspace

LN2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def combine(
    parts: tl.tensor,  # the row's first column in the first part
    part_stride: tl.tensor,
    column_offsets: tl.tensor,  # [COLUMNS]
    columns_here: tl.tensor,
    lses: tl.tensor,
    lse_stride: tl.tensor,
    splits: tl.tensor,
    SPLITS: tl.constexpr,  # a power of two, at least `splits`
    CHUNK: tl.constexpr,  # parts read together
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Attention of one row from its parts: its columns in float32, and its LSE; parts whose LSE is -inf stay unread."""
    every = tl.arange(0, SPLITS)
    all_lses = tl.load(lses + every * lse_stride, mask=every < splits, other=float("-inf")) * LOG2_E
    top = tl.max(all_lses)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(all_lses - top))
    mixed = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, splits, CHUNK):
        split = start + tl.arange(0, CHUNK)
        part_lses = tl.load(lses + split * lse_stride, mask=split < splits, other=float("-inf")) * LOG2_E
        weights = tl.exp2(part_lses - top)
        numbers = tl.load(
            parts + split[:, None] * part_stride + column_offsets[None, :],
            mask=(part_lses > float("-inf"))[:, None] & columns_here[None, :],
            other=0.0,
        )
        mixed += tl.sum(weights[:, None] * numbers.to(tl.float32), 0)
    lse = tl.where(total > 0.0, (top + tl.log2(total)) * LN2, float("-inf"))
    return mixed / tl.where(total > 0.0, total, 1.0), lse


@triton.jit(do_not_specialize=["count"])
def merge_kernel(
    parts: tl.tensor,
    part_lses: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    count: tl.tensor,
    part_stride_s: tl.tensor,
    part_stride_t: tl.tensor,
    part_stride_h: tl.tensor,
    part_stride_v: tl.tensor,
    lse_stride_s: tl.tensor,
    lse_stride_t: tl.tensor,
    lse_stride_h: tl.tensor,
    out_stride_t: tl.tensor,
    out_stride_h: tl.tensor,
    out_stride_v: tl.tensor,
    out_lse_stride_t: tl.tensor,
    out_lse_stride_h: tl.tensor,
    HEADS: tl.constexpr,
    VALUE: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_LSE: tl.constexpr,
) -> None:
    """One program merges one row; see `merge`."""
    token = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    columns = tl.arange(0, COLUMNS)
    here = columns < VALUE
    mixed, total = combine(
        parts + token * part_stride_t + head * part_stride_h,
        tl.cast(part_stride_s, tl.int64),
        columns * part_stride_v,
        here,
        part_lses + token * lse_stride_t + head * lse_stride_h,
        tl.cast(lse_stride_s, tl.int64),
        count,
        SPLITS,
        CHUNK,
        COLUMNS,
    )
    target = out + token * out_stride_t + head * out_stride_h + columns * out_stride_v
    tl.store(target, mixed.to(out.dtype.element_ty), mask=here)
    if HAS_LSE:
        tl.store(lse + token * out_lse_stride_t + head * out_lse_stride_h, total)


def merge(parts: Tensor, part_lses: Tensor, out: Tensor, lse: Tensor | None = None) -> None:
    """See `Kernels.merge`."""
    count, tokens, heads, value = parts.shape
    if tokens == 0:
        return
    merge_kernel[(tokens * heads,)](
        parts,
        part_lses,
        out,
        lse if lse is not None else part_lses,
        count,
        *parts.stride(),
        *part_lses.stride(),
        *out.stride(),
        *(lse.stride() if lse is not None else (0, 0)),
        HEADS=heads,
        VALUE=value,
        COLUMNS=triton.next_power_of_2(value),
        SPLITS=max(2, triton.next_power_of_2(count)),
        CHUNK=min(8, max(2, triton.next_power_of_2(count))),
        HAS_LSE=lse is not None,
        num_warps=2,
    )


@triton.jit
def merge_items_kernel(
    partials: tl.tensor,
    partial_lses: tl.tensor,
    items: tl.tensor,
    parts: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    out_stride_t: tl.tensor,
    out_stride_h: tl.tensor,
    out_stride_v: tl.tensor,
    lse_stride_t: tl.tensor,
    lse_stride_h: tl.tensor,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    VALUE: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    BY_ITEM: tl.constexpr,
    HAS_LSE: tl.constexpr,
) -> None:
    """One program merges some columns of one row of one split item; see `merge_items`."""
    if BY_ITEM:
        item = tl.program_id(2)
        first = True
    else:
        # An item is split where a part ends amid it, and only one such part is the item's first.
        first_item, first_tile, item, _, _ = load_part(parts, tl.program_id(2))
        first = (item >= 0) & ((item > first_item) | (first_tile == 0))
        item = tl.maximum(item, 0)
    _, first_query, queries, _, _, _, splits, first_partial = load_item(items, item)
    row = tl.program_id(1)
    query, head = row // HEADS, row % HEADS
    if first & (splits > 1) & (query < queries):
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        here = columns < VALUE
        slot = first_partial.to(tl.int64) * ROWS + row
        mixed, total = combine(
            partials + slot * VALUE,
            ROWS * VALUE,
            columns,
            here,
            partial_lses + slot,
            ROWS,
            splits,
            SPLITS,
            CHUNK,
            COLUMNS,
        )
        token = (first_query + query).to(tl.int64)
        target = out + token * out_stride_t + head * out_stride_h + columns * out_stride_v
        tl.store(target, mixed.to(out.dtype.element_ty), mask=here)
        if HAS_LSE and tl.program_id(0) == 0:
            tl.store(lse + token * lse_stride_t + head * lse_stride_h, total)


def merge_items(workspace: ScheduledWorkspace, out: Tensor, lse: Tensor | None, rows: int) -> None:
    """Merge the partial results of every split item of a step into the output, in one launch.

    Row r of a partial belongs to query `r // Hq` of the item and head `r % Hq`. Items that were not split are left as
    they are.

    Args:
        workspace: prepared for the step, its scratch filled.
        out: [T, Hq, V].
        lse: [T, Hq] float32, written if given.
        rows: how many rows of a partial are in use at most.
    """
    shape, scratch = workspace.schedule.shape, workspace.scratch
    if shape.parts == 1:
        return  # nothing is ever split
    heads, value = out.shape[1:]
    by_item = workspace.items < shape.parts
    programs = workspace.items if by_item else shape.parts - 1
    columns = merge_columns(value, programs * rows)
    splits = triton.next_power_of_2(shape.parts)
    merge_items_kernel[(triton.cdiv(value, columns), rows, programs)](
        scratch.partials,
        scratch.lses,
        workspace.schedule.items,
        workspace.schedule.parts,
        out,
        lse if lse is not None else scratch.lses,
        *out.stride(),
        *(lse.stride() if lse is not None else (0, 0)),
        HEADS=heads,
        ROWS=scratch.partials.shape[1],
        VALUE=value,
        COLUMNS=columns,
        SPLITS=splits,
        CHUNK=min(splits, 4096 // columns),
        BY_ITEM=by_item,
        HAS_LSE=lse is not None,
        num_warps=4,
    )


def merge_columns(value_size: int, rows: int) -> int:
    """How many columns one program merges: all, or fewer where there are too few rows to fill a device."""
    whole = triton.next_power_of_2(value_size)
    return int(whole if rows > 512 else min(whole, 128))
