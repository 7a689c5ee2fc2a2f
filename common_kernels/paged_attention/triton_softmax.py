"""What the kernels of this operation share: one pass of the online softmax over tiles of keys, and its end.

Scores are kept in the domain of base 2 (`score * log2(e)`), since `exp2` is one instruction where `exp` is two.
Flash attention's recurrence (arXiv 2205.14135, algorithm 1), with the output divided once, at the end (arXiv
2307.08691, section 3.1).

A head size is cut into two powers of two (80 = 64 + 16, 96 = 64 + 32, 192 = 128 + 64), so that no column is padded and
no load of a whole tile is masked; the second part is called the tail here, and is 0 where the head size is one power.
"""

from __future__ import annotations

import triton
import triton.language as tl

from taut.common_kernels import float8

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# The maximum before any key was seen: finite, so that "minus infinity minus minus infinity" never arises, and so low
# that no score is below it.
LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def page_numbers(table_row: tl.tensor, positions: tl.tensor, end: tl.tensor, PAGE_SIZE: tl.constexpr) -> tl.tensor:
    """The pages of some positions of a row; 0, and nothing read, for those that are not before `end`."""
    return tl.load(table_row + positions // PAGE_SIZE, mask=positions < end, other=0)


@triton.jit
def as_numbers(cached: tl.tensor, DTYPE: tl.constexpr, FLOAT8: tl.constexpr, NATIVE_FLOAT8: tl.constexpr) -> tl.tensor:
    """Cached elements, without their scale, in the dtype of the products."""
    return float8.decode(cached, NATIVE_FLOAT8, DTYPE) if FLOAT8 else cached.to(DTYPE)


@triton.jit
def attend_tiles(
    acc: tl.tensor,  # [BLOCK_M, VALUE_MAIN] float32, not yet divided
    acc_tail: tl.tensor,  # [BLOCK_M, VALUE_TAIL]
    total: tl.tensor,  # [BLOCK_M] sum of weights
    top: tl.tensor,  # [BLOCK_M] maximum of scores, base 2
    q: tl.tensor,  # [BLOCK_M, HEAD_MAIN]
    q_tail: tl.tensor,  # [BLOCK_M, HEAD_TAIL]
    key_columns: tl.tensor,  # [HEAD_MAIN] pointers: the row's first key (contiguous) or the cache's slot 0
    key_tail_columns: tl.tensor,
    value_columns: tl.tensor,
    value_tail_columns: tl.tensor,
    table_row: tl.tensor,  # pointer: the row's first page number
    key_page_stride: tl.tensor,
    key_token_stride: tl.tensor,
    value_page_stride: tl.tensor,
    value_token_stride: tl.tensor,
    start: tl.tensor,  # first position of the first tile, a multiple of BLOCK_N
    end: tl.tensor,  # past the last position of the last tile
    first_seen: tl.tensor,  # positions outside first_seen <= j < end_seen are not read
    end_seen: tl.tensor,
    positions: tl.tensor,  # [BLOCK_M] of the queries
    slopes: tl.tensor,  # [BLOCK_M] base 2, ALIBI only
    left: tl.tensor,
    right: tl.tensor,
    score_scale: tl.tensor,  # to base 2; with a soft cap: to the argument of tanh
    soft_cap: tl.tensor,  # base 2
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    PAGED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SAME_STRIDES: tl.constexpr,  # of keys and values: their addresses are then worked out once
    BLOCK_N: tl.constexpr,
    HEAD_TAIL: tl.constexpr,
    VALUE_TAIL: tl.constexpr,
    FLOAT8: tl.constexpr,  # whether the cache holds e4m3, given as bytes
    NATIVE_FLOAT8: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
) -> tl.tensor:
    """Tiles start, start + BLOCK_N, ... < end: returns acc, acc_tail, total, top.

    MASKED says that some query does not see some key of these tiles. Without it no load and no score is masked.
    """
    columns = tl.arange(0, BLOCK_N)
    WHOLE_PAGE: tl.constexpr = PAGED and PAGE_SIZE % BLOCK_N == 0
    # The page numbers of a tile are loaded one tile ahead and carried: a load of keys whose address waits for another
    # load of the same iteration is prefetched half as far.
    if PAGED:
        if WHOLE_PAGE:
            pages = page_numbers(table_row, start, end_seen, PAGE_SIZE)
        else:
            pages = page_numbers(table_row, start + columns, end_seen, PAGE_SIZE)
    for tile in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        keys = tile + columns
        if PAGED:
            if WHOLE_PAGE:
                places = (tile % PAGE_SIZE) + columns
                next_pages = page_numbers(table_row, tile + BLOCK_N, end_seen, PAGE_SIZE)
            else:
                places = keys % PAGE_SIZE
                next_pages = page_numbers(table_row, keys + BLOCK_N, end_seen, PAGE_SIZE)
            key_slots = pages.to(tl.int64) * key_page_stride + places * key_token_stride
            value_slots = key_slots
            if not SAME_STRIDES:
                value_slots = pages.to(tl.int64) * value_page_stride + places * value_token_stride
            pages = next_pages
        else:
            key_slots = keys.to(tl.int64) * key_token_stride
            value_slots = key_slots
            if not SAME_STRIDES:
                value_slots = keys.to(tl.int64) * value_token_stride
        live = (keys >= first_seen) & (keys < end_seen)
        if MASKED:
            k = tl.load(key_columns[None, :] + key_slots[:, None], mask=live[:, None], other=0)
        else:
            k = tl.load(key_columns[None, :] + key_slots[:, None])
        scores = tl.dot(q, tl.trans(as_numbers(k, q.dtype, FLOAT8, NATIVE_FLOAT8)), input_precision=PRECISION)
        if HEAD_TAIL:
            if MASKED:
                k_tail = tl.load(key_tail_columns[None, :] + key_slots[:, None], mask=live[:, None], other=0)
            else:
                k_tail = tl.load(key_tail_columns[None, :] + key_slots[:, None])
            scores = tl.dot(
                q_tail, tl.trans(as_numbers(k_tail, q.dtype, FLOAT8, NATIVE_FLOAT8)), scores, input_precision=PRECISION
            )
        if HAS_SOFT_CAP:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1): right at both ends, where exp gives 0 and infinity.
            scores = soft_cap * (1.0 - 2.0 / (tl.exp2(scores * score_scale) + 1.0))
        elif HAS_SLOPES:
            scores = scores * score_scale
        if HAS_SLOPES:
            scores += slopes[:, None] * (keys[None, :] - positions[:, None]).to(tl.float32)
        if MASKED:
            seen = live[None, :]
            if CAUSAL:
                seen &= keys[None, :] <= positions[:, None]
            if HAS_LEFT:
                seen &= keys[None, :] >= positions[:, None] - left
            if HAS_RIGHT:
                seen &= keys[None, :] <= positions[:, None] + right
            scores = tl.where(seen, scores, float("-inf"))
        if HAS_SOFT_CAP or HAS_SLOPES:
            new_top = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp2(scores - new_top[:, None])
        else:
            # The scale is positive: it is folded into one multiply-add with the subtraction.
            new_top = tl.maximum(top, tl.max(scores, 1) * score_scale)
            weights = tl.exp2(scores * score_scale - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(weights, 1)
        top = new_top
        acc = acc * decay[:, None]
        if MASKED:
            v = tl.load(value_columns[None, :] + value_slots[:, None], mask=live[:, None], other=0)
        else:
            v = tl.load(value_columns[None, :] + value_slots[:, None])
        acc = tl.dot(weights.to(q.dtype), as_numbers(v, q.dtype, FLOAT8, NATIVE_FLOAT8), acc, input_precision=PRECISION)
        if VALUE_TAIL:
            acc_tail = acc_tail * decay[:, None]
            if MASKED:
                v_tail = tl.load(value_tail_columns[None, :] + value_slots[:, None], mask=live[:, None], other=0)
            else:
                v_tail = tl.load(value_tail_columns[None, :] + value_slots[:, None])
            acc_tail = tl.dot(
                weights.to(q.dtype),
                as_numbers(v_tail, q.dtype, FLOAT8, NATIVE_FLOAT8),
                acc_tail,
                input_precision=PRECISION,
            )
    return acc, acc_tail, total, top


@triton.jit
def query_range(
    first_position: tl.tensor,
    queries: tl.tensor,
    length: tl.tensor,
    left: tl.tensor,
    right: tl.tensor,
    CAUSAL: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
) -> tl.tensor:
    """Of a block of queries: the keys (first, end) that some of them sees, and those that all of them see."""
    last_position = first_position + queries - 1
    first_seen = 0
    end_seen = length
    first_common = 0
    end_common = length
    if HAS_LEFT:
        first_seen = tl.maximum(first_position - left, 0)
        first_common = tl.maximum(last_position - left, 0)
    if CAUSAL:
        end_seen = tl.minimum(end_seen, last_position + 1)
        end_common = tl.minimum(end_common, first_position + 1)
    if HAS_RIGHT:
        end_seen = tl.minimum(end_seen, last_position + right + 1)
        end_common = tl.minimum(end_common, first_position + right + 1)
    return first_seen, end_seen, first_common, end_common


@triton.jit
def sees_any(
    positions: tl.tensor,
    length: tl.tensor,
    left: tl.tensor,
    right: tl.tensor,
    CAUSAL: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
) -> tl.tensor:
    """Whether a query sees some key of its row, told from its position: the keys may be shared out among programs."""
    first = tl.zeros_like(positions)
    end = tl.zeros_like(positions) + length
    if HAS_LEFT:
        first = tl.maximum(positions - left, 0)
    if CAUSAL:
        end = tl.minimum(end, positions + 1)
    if HAS_RIGHT:
        end = tl.minimum(end, positions + right + 1)
    return first < end


@triton.jit
def add_sinks(total: tl.tensor, top: tl.tensor, sinks: tl.tensor, wanted: tl.tensor) -> tl.tensor:
    """One more score that has no value, where wanted: returns total, top and what acc is to be multiplied by.

    `sinks` [BLOCK_M] are natural, as the model has them.
    """
    scores = tl.where(wanted, sinks * LOG2E, LOWEST)
    new_top = tl.maximum(top, scores)
    decay = tl.exp2(top - new_top)
    return total * decay + tl.where(wanted, tl.exp2(scores - new_top), 0.0), new_top, decay


@triton.jit
def lse_of(total: tl.tensor, top: tl.tensor) -> tl.tensor:
    """The natural logarithm of the sum of exponentiated scores; -inf where nothing was seen."""
    seen = total > 0.0
    return tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) * LN2, float("-inf"))


@triton.jit
def scale_of_scores(
    scale: tl.tensor, key_scale: tl.tensor, soft_cap: tl.tensor, head: tl.tensor, HAS_SOFT_CAP: tl.constexpr
) -> tl.tensor:
    """What a product of query and key is multiplied by: see `score_scale` of `attend_tiles`."""
    score_scale = scale
    if key_scale is not None:
        score_scale *= tl.load(key_scale + head)
    return score_scale * (2.0 * LOG2E) / soft_cap if HAS_SOFT_CAP else score_scale * LOG2E
