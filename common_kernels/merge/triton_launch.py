"""`merge` on the device: one launch, all parts of a row read together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from taut.common_kernels.schedule.triton_launch import launch_options, load_item, load_part

if TYPE_CHECKING:
    from torch import Tensor

    from taut.common_kernels.workspace import ScheduledWorkspace

NUMBERS = 2048  # of partials that one program of `merge_items` reads together
MANY_PARTIALS = 32  # of an item: from here on one warp merges sooner than two, as measured on an H200
LN2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def combine(
    parts: tl.tensor,  # [ROWS] addresses of the rows' first columns in the first part
    part_stride: tl.tensor,
    column_offsets: tl.tensor,  # [COLUMNS]
    columns_here: tl.tensor,
    lses: tl.tensor,  # [ROWS] addresses of their LSEs in the first part
    lse_stride: tl.tensor,
    rows_here: tl.tensor,
    splits: tl.tensor,
    CHUNK: tl.constexpr,  # parts read together
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Attention of some rows from its parts: [ROWS, COLUMNS] float32, and the LSEs; parts of LSE -inf hold numbers."""
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, splits, CHUNK):
        split = start + tl.arange(0, CHUNK)[:, None]
        wanted = (split < splits) & rows_here[None, :]
        part_lses = tl.load(lses[None, :] + split * lse_stride, mask=wanted, other=float("-inf")) * LOG2_E
        numbers = tl.load(
            (parts[None, :] + split * part_stride)[:, :, None] + column_offsets[None, None, :],
            mask=wanted[:, :, None] & columns_here[None, None, :],
            other=0.0,
        )
        # The running softmax of attention itself: a round takes one wait for memory, not two.
        new_top = tl.maximum(top, tl.max(part_lses, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(part_lses - base[None, :])
        decay = tl.exp2(top - base)
        total = total * decay + tl.sum(weights, 0)
        mixed = mixed * decay[:, None] + tl.sum(weights[:, :, None] * numbers.to(tl.float32), 0)
        top = new_top
    return _merged(top, total, mixed)


@triton.jit
def _merged(top: tl.tensor, total: tl.tensor, mixed: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """What a running softmax over parts has come to: attention and its LSEs, zeros and -inf where no part counted."""
    seen = total > 0.0
    safe = tl.where(seen, total, 1.0)
    return mixed / safe[:, None], tl.where(seen, (top + tl.log2(safe)) * LN2, float("-inf"))


@triton.jit
def _part(
    lses: tl.tensor,
    lse_stride: tl.tensor,
    numbers: tl.tensor,
    part_stride: tl.tensor,
    part: tl.tensor,
    here: tl.tensor,
    columns_here: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """The LSEs of some rows of a part, [ROWS], and their numbers, [ROWS, COLUMNS]: loaded whatever their LSE is."""
    place = tl.cast(part, tl.int64)
    part_lse = tl.load(lses + place * lse_stride, mask=here, other=float("-inf"))
    return part_lse, tl.load(numbers + place * part_stride, mask=here[:, None] & columns_here[None, :], other=0.0)


@triton.jit
def _mixed_in(
    top: tl.tensor, total: tl.tensor, mixed: tl.tensor, part_lse: tl.tensor, numbers: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The running softmax over parts, one more of them taken in; one of LSE -inf may hold anything."""
    scaled = part_lse * LOG2_E
    new_top = tl.maximum(top, scaled)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weight, decay = tl.exp2(scaled - base), tl.exp2(top - base)
    seen = tl.where((scaled > float("-inf"))[:, None], numbers.to(tl.float32), 0.0)
    return new_top, total * decay + weight, mixed * decay[:, None] + weight[:, None] * seen


@triton.jit(do_not_specialize=["count", "tokens"])
def taut_merge_states(
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
    tokens: tl.tensor,
    HEADS: tl.constexpr,
    VALUE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ODD: tl.constexpr,  # whether the number of parts is
    HAS_LSE: tl.constexpr,
) -> None:
    """One program merges some rows, each thread its own columns of them part by part: no sum goes across threads."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < tokens * HEADS
    token, head = (row // HEADS).to(tl.int64), row % HEADS
    columns = tl.arange(0, COLUMNS)
    columns_here = columns < VALUE
    numbers_at = parts + (token * part_stride_t + head * part_stride_h)[:, None] + columns[None, :] * part_stride_v
    lses_at = part_lses + token * lse_stride_t + head * lse_stride_h
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, COLUMNS], tl.float32)
    for part in range(0, count - 1, 2):  # two at a time: the loads of the second wait for nothing of the first
        lse_1, numbers_1 = _part(lses_at, lse_stride_s, numbers_at, part_stride_s, part, here, columns_here)
        lse_2, numbers_2 = _part(lses_at, lse_stride_s, numbers_at, part_stride_s, part + 1, here, columns_here)
        top, total, mixed = _mixed_in(top, total, mixed, lse_1, numbers_1)
        top, total, mixed = _mixed_in(top, total, mixed, lse_2, numbers_2)
    if ODD:
        lse_1, numbers_1 = _part(lses_at, lse_stride_s, numbers_at, part_stride_s, count - 1, here, columns_here)
        top, total, mixed = _mixed_in(top, total, mixed, lse_1, numbers_1)
    whole, whole_lse = _merged(top, total, mixed)
    target = (token * out_stride_t + head * out_stride_h)[:, None] + columns[None, :] * out_stride_v
    tl.store(out + target, whole.to(out.dtype.element_ty), mask=here[:, None] & columns_here[None, :])
    if HAS_LSE:
        tl.debug_barrier()  # it may take the place of a part's, which all threads of the row have read
        tl.store(lse + token * out_lse_stride_t + head * out_lse_stride_h, whole_lse, mask=here)


def merge(parts: Tensor, part_lses: Tensor, out: Tensor, lse: Tensor | None = None) -> None:
    """See `Kernels.merge`."""
    count, tokens, heads, value = parts.shape
    if tokens == 0:
        return
    columns = triton.next_power_of_2(value)
    rows = max(1, 1024 // columns)
    taut_merge_states[(triton.cdiv(tokens * heads, rows),)](
        parts,
        part_lses,
        out,
        lse if lse is not None else part_lses,
        count,
        *parts.stride(),
        *part_lses.stride(),
        *out.stride(),
        *(lse.stride() if lse is not None else (0, 0)),
        tokens,
        HEADS=heads,
        VALUE=value,
        ROWS=rows,
        COLUMNS=columns,
        ODD=count % 2 == 1,
        HAS_LSE=lse is not None,
        num_warps=4,
    )


@triton.jit
def taut_merge(
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
    PARTIAL_ROWS: tl.constexpr,
    VALUE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    BY_ITEM: tl.constexpr,
    HAS_LSE: tl.constexpr,
    OVERLAPPED: tl.constexpr,  # whether the kernel before may still run when this one starts
) -> None:
    """One program merges some columns of some rows of one split item; see `merge_items`."""
    if BY_ITEM:
        item = tl.program_id(2)
        first = True
    else:
        # An item is split where a part ends amid it, and only one such part is the item's first.
        first_item, first_tile, item, _, _ = load_part(parts, tl.program_id(2))
        first = (item >= 0) & ((item > first_item) | (first_tile == 0))
        item = tl.maximum(item, 0)
    _, first_query, queries, _, _, _, splits, first_partial = load_item(items, item)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    query, head = row // HEADS, row % HEADS
    here = query < queries
    if OVERLAPPED:  # the schedule was complete before the kernel ahead began, its partials are not
        tl.extra.cuda.gdc_wait()
    if first & (splits > 1):
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        columns_here = columns < VALUE
        slot = first_partial.to(tl.int64) * PARTIAL_ROWS + row
        mixed, total = combine(
            partials + slot * VALUE,
            PARTIAL_ROWS * VALUE,
            columns,
            columns_here,
            partial_lses + slot,
            PARTIAL_ROWS,
            here,
            splits,
            CHUNK,
            ROWS,
            COLUMNS,
        )
        token = (first_query + query).to(tl.int64)
        target = (token * out_stride_t + head * out_stride_h)[:, None] + columns[None, :] * out_stride_v
        tl.store(out + target, mixed.to(out.dtype.element_ty), mask=here[:, None] & columns_here[None, :])
        if HAS_LSE and tl.program_id(0) == 0:
            tl.store(lse + token * lse_stride_t + head * lse_stride_h, total, mask=here)


def merge_items(
    workspace: ScheduledWorkspace, out: Tensor, lse: Tensor | None, rows: int, overlapped: bool = False
) -> None:
    """Merge the partial results of every split item of a step into the output, in one launch.

    Row r of a partial belongs to query `r // Hq` of the item and head `r % Hq`. Items that were not split are left as
    they are.

    Args:
        workspace: prepared for the step, its scratch filled.
        out: [T, Hq, V].
        lse: [T, Hq] float32, written if given.
        rows: how many rows of a partial are in use at most.
        overlapped: whether the kernel launched just before says itself when this one may start (NVIDIA, sm_90+).
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
        PARTIAL_ROWS=scratch.partials.shape[1],
        VALUE=value,
        ROWS=together,
        COLUMNS=columns,
        CHUNK=chunk,
        BY_ITEM=by_item,
        HAS_LSE=lse is not None,
        OVERLAPPED=overlapped,
        num_warps=warps,
        **launch_options(overlapped),
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
