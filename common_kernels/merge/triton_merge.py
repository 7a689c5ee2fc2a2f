"""The merge of partials: the running softmax of attention, over results in place of keys.

Flash-Decoding, and section 2.2 of FlashInfer (arXiv 2501.01005).
"""

from __future__ import annotations

import triton
import triton.language as tl

from taut.common_kernels import base2
from taut.common_kernels.aggregates import aggregates_of
from taut.common_kernels.schedule.triton_items import Schedule, load_item, load_part

LN2 = tl.constexpr(base2.LN2)
LOG2E = tl.constexpr(base2.LOG2E)


@triton.jit
def combine(
    partials: tl.tensor,  # [BLOCK_M] addresses of the first columns in the first partial
    partial_stride: tl.tensor,
    column_offsets: tl.tensor,  # [BLOCK_V]
    columns_here: tl.tensor,
    lses: tl.tensor,  # [BLOCK_M] addresses of their LSEs in the first partial
    lse_stride: tl.tensor,
    m_here: tl.tensor,
    splits: tl.tensor,
    CHUNK: tl.constexpr,  # partials read together
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
) -> tl.tensor:
    """Attention [BLOCK_M, BLOCK_V] float32 from its partials, and the LSEs; partials of LSE -inf hold numbers."""
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for start in range(0, splits, CHUNK):
        split = start + tl.arange(0, CHUNK)[:, None]
        wanted = (split < splits) & m_here[None, :]
        partial_lses = tl.load(lses[None, :] + split * lse_stride, mask=wanted, other=float("-inf")) * LOG2E
        numbers = tl.load(
            (partials[None, :] + split * partial_stride)[:, :, None] + column_offsets[None, None, :],
            mask=wanted[:, :, None] & columns_here[None, None, :],
            other=0.0,
        )
        # The running softmax of attention itself: a round takes one wait for memory, not two.
        new_max = tl.maximum(row_max, tl.max(partial_lses, 0))
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(partial_lses - base[None, :])
        alpha = tl.exp2(row_max - base)
        row_sum = row_sum * alpha + tl.sum(weights, 0)
        mixed = mixed * alpha[:, None] + tl.sum(weights[:, :, None] * numbers.to(tl.float32), 0)
        row_max = new_max
    return merged(row_max, row_sum, mixed)


@triton.jit
def merged(row_max: tl.tensor, row_sum: tl.tensor, mixed: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """What a running softmax over partials has come to: attention and its LSEs; zeros and -inf where none counted."""
    seen = row_sum > 0.0
    safe = tl.where(seen, row_sum, 1.0)
    return mixed / safe[:, None], tl.where(seen, (row_max + tl.log2(safe)) * LN2, float("-inf"))


@aggregates_of(tl, triton)
class Partials:
    """Where the partial results of some m lie.

    Attributes:
        numbers: [BLOCK_M, BLOCK_V] addresses in the first partial.
        stride: from one to the next.
        lses: [BLOCK_M] addresses in the first partial.
        lse_stride: from one to the next.
        here: [BLOCK_M] which m there are.
        columns_here: [BLOCK_V] which columns there are.
    """

    numbers: tl.tensor
    stride: tl.tensor
    lses: tl.tensor
    lse_stride: tl.tensor
    here: tl.tensor
    columns_here: tl.tensor


@triton.jit
def load_partial(partials: Partials, number: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """LSEs [BLOCK_M] of a partial and its numbers [BLOCK_M, BLOCK_V]: loaded whatever the LSEs are."""
    place = tl.cast(number, tl.int64)
    lses = tl.load(partials.lses + place * partials.lse_stride, mask=partials.here, other=float("-inf"))
    wanted = partials.here[:, None] & partials.columns_here[None, :]
    return lses, tl.load(partials.numbers + place * partials.stride, mask=wanted, other=0.0)


@triton.jit
def mixed_in(
    row_max: tl.tensor, row_sum: tl.tensor, mixed: tl.tensor, partial_lse: tl.tensor, numbers: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The running softmax over partials, one more of them taken in; one of LSE -inf may hold anything."""
    scaled = partial_lse * LOG2E
    new_max = tl.maximum(row_max, scaled)
    base = tl.where(new_max == float("-inf"), 0.0, new_max)
    weight, alpha = tl.exp2(scaled - base), tl.exp2(row_max - base)
    seen = tl.where((scaled > float("-inf"))[:, None], numbers.to(tl.float32), 0.0)
    return new_max, row_sum * alpha + weight, mixed * alpha[:, None] + weight[:, None] * seen


@triton.jit(do_not_specialize=["count", "tokens"])
def taut_merge_states(
    partials: tl.tensor,
    partial_lses: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    count: tl.tensor,
    partial_stride: tl.tensor,
    partial_token_stride: tl.tensor,
    partial_head_stride: tl.tensor,
    partial_column_stride: tl.tensor,
    partial_lse_stride: tl.tensor,
    partial_lse_token_stride: tl.tensor,
    partial_lse_head_stride: tl.tensor,
    out_token_stride: tl.tensor,
    out_head_stride: tl.tensor,
    out_stride: tl.tensor,
    lse_token_stride: tl.tensor,
    lse_head_stride: tl.tensor,
    tokens: tl.tensor,
    HEADS: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ODD: tl.constexpr,  # whether the number of partials is odd
    HAS_LSE: tl.constexpr,
) -> None:
    """One program merges some m, each thread its own columns partial by partial: no sum goes across threads."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    here = m < tokens * HEADS
    token, head = (m // HEADS).to(tl.int64), m % HEADS
    columns = tl.arange(0, BLOCK_V)
    columns_here = columns < VALUE_SIZE
    numbers_at = (
        partials
        + (token * partial_token_stride + head * partial_head_stride)[:, None]
        + columns[None, :] * partial_column_stride
    )
    lses_at = partial_lses + token * partial_lse_token_stride + head * partial_lse_head_stride
    states = Partials(numbers_at, partial_stride, lses_at, partial_lse_stride, here, columns_here)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for number in range(0, count - 1, 2):  # two at a time: the loads of the second wait for nothing of the first
        lse_1, numbers_1 = load_partial(states, number)
        lse_2, numbers_2 = load_partial(states, number + 1)
        row_max, row_sum, mixed = mixed_in(row_max, row_sum, mixed, lse_1, numbers_1)
        row_max, row_sum, mixed = mixed_in(row_max, row_sum, mixed, lse_2, numbers_2)
    if ODD:
        lse_1, numbers_1 = load_partial(states, count - 1)
        row_max, row_sum, mixed = mixed_in(row_max, row_sum, mixed, lse_1, numbers_1)
    whole, whole_lse = merged(row_max, row_sum, mixed)
    target = (token * out_token_stride + head * out_head_stride)[:, None] + columns[None, :] * out_stride
    tl.store(out + target, whole.to(out.dtype.element_ty), mask=here[:, None] & columns_here[None, :])
    if HAS_LSE:
        tl.debug_barrier()  # it may take the place of a partial's, which all threads of an m have read
        tl.store(lse + token * lse_token_stride + head * lse_head_stride, whole_lse, mask=here)


@triton.jit
def taut_merge(
    partials: tl.tensor,
    partial_lses: tl.tensor,
    items: tl.tensor,
    parts: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    out_token_stride: tl.tensor,
    out_head_stride: tl.tensor,
    out_stride: tl.tensor,
    lse_token_stride: tl.tensor,
    lse_head_stride: tl.tensor,
    HEADS: tl.constexpr,
    PARTIAL_M: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    BY_ITEM: tl.constexpr,
    HAS_LSE: tl.constexpr,
    EARLY: tl.constexpr,  # whether this kernel may start before the one ahead has ended
) -> None:
    """One program merges some columns of some m of one split item; see `triton_launch.merge_items`."""
    schedule = Schedule(items, parts)
    if BY_ITEM:
        number = tl.program_id(2)
        first = True
    else:
        # An item is split where a part ends amid it, and only one such part is the item's first.
        part = load_part(schedule, tl.program_id(2))
        first = (part.last_item >= 0) & ((part.last_item > part.first_item) | (part.first_tile == 0))
        number = tl.maximum(part.last_item, 0)
    item = load_item(schedule, number)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    query, head = m // HEADS, m % HEADS
    here = query < item.queries
    if EARLY:  # the schedule was complete before the kernel ahead began, its partials are not
        tl.extra.cuda.gdc_wait()
    if first & (item.splits > 1):
        columns = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
        columns_here = columns < VALUE_SIZE
        first_m = item.first_partial.to(tl.int64) * PARTIAL_M + m
        mixed, mixed_lse = combine(
            partials + first_m * VALUE_SIZE,
            PARTIAL_M * VALUE_SIZE,
            columns,
            columns_here,
            partial_lses + first_m,
            PARTIAL_M,
            here,
            item.splits,
            CHUNK,
            BLOCK_M,
            BLOCK_V,
        )
        token = (item.first_query + query).to(tl.int64)
        target = (token * out_token_stride + head * out_head_stride)[:, None] + columns[None, :] * out_stride
        tl.store(out + target, mixed.to(out.dtype.element_ty), mask=here[:, None] & columns_here[None, :])
        if HAS_LSE and tl.program_id(0) == 0:
            tl.store(lse + token * lse_token_stride + head * lse_head_stride, mixed_lse, mask=here)
