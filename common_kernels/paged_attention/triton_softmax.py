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

from taut.common_kernels import base2, float8
from taut.common_kernels.aggregates import aggregates_of
from taut.common_kernels.triton_mask import Mask, sees

LOG2E = tl.constexpr(base2.LOG2E)
LN2 = tl.constexpr(base2.LN2)
LOWEST = tl.constexpr(base2.LOWEST)


@triton.jit
def page_numbers(table_row: tl.tensor, keys: tl.tensor, end: tl.tensor, PAGE_SIZE: tl.constexpr) -> tl.tensor:
    """The pages of the keys at some positions; 0, and nothing read, for those that are not before `end`."""
    return tl.load(table_row + keys // PAGE_SIZE, mask=keys < end, other=0)


@triton.jit
def load_columns(columns: tl.tensor, slots: tl.tensor, live: tl.tensor, MASKED: tl.constexpr) -> tl.tensor:
    """The vectors [BLOCK_N, columns] of some slots; zeros in place of those that are not live, if MASKED."""
    if MASKED:
        vectors = tl.load(columns[None, :] + slots[:, None], mask=live[:, None], other=0)
    else:
        vectors = tl.load(columns[None, :] + slots[:, None])
    return vectors


@triton.jit
def as_numbers(cached: tl.tensor, DTYPE: tl.constexpr, FLOAT8: tl.constexpr, NATIVE_FLOAT8: tl.constexpr) -> tl.tensor:
    """Cached elements, without their scale, in the dtype of the products."""
    return float8.decode(cached, NATIVE_FLOAT8, DTYPE) if FLOAT8 else cached.to(DTYPE)


@aggregates_of(tl, triton)
class Scoring:
    """How products of queries and keys become weights.

    Attributes:
        scale: of a product, to base 2; with a soft cap, to the argument of tanh.
        soft_cap: base 2, read if HAS_SOFT_CAP.
        HAS_SOFT_CAP: whether scores are capped.
        HAS_SLOPES: whether a bias grows with the distance (ALiBi).
    """

    scale: tl.tensor
    soft_cap: tl.tensor
    HAS_SOFT_CAP: tl.constexpr
    HAS_SLOPES: tl.constexpr


@aggregates_of(tl, triton)
class Queries:
    """The queries of a tile, one for each m.

    Attributes:
        main: [BLOCK_M, HEAD_MAIN].
        tail: [BLOCK_M, HEAD_TAIL], of no meaning without a tail.
        positions: [BLOCK_M] in their row.
        slopes: [BLOCK_M] base 2, read if scores have slopes.
    """

    main: tl.tensor
    tail: tl.tensor
    positions: tl.tensor
    slopes: tl.tensor


@aggregates_of(tl, triton)
class Keys:
    """Where the keys and values of a row lie, for one head.

    Attributes:
        key: [HEAD_MAIN] pointers: the row's first key (contiguous) or the cache's slot 0.
        key_tail: [HEAD_TAIL] pointers, of no meaning without a tail.
        value: [VALUE_MAIN] pointers.
        value_tail: [VALUE_TAIL] pointers, of no meaning without a tail.
        table_row: pointer: the row's first page number, if PAGED.
        first_seen: positions outside first_seen <= j < end_seen are not read.
        PAGED: whether there is a page table.
        SAME_STRIDES: of keys and values: their addresses are then worked out once.
        FLOAT8: whether the cache holds e4m3, given as bytes.
    """

    key: tl.tensor
    key_tail: tl.tensor
    value: tl.tensor
    value_tail: tl.tensor
    table_row: tl.tensor | None
    key_page_stride: tl.tensor
    key_token_stride: tl.tensor
    value_page_stride: tl.tensor
    value_token_stride: tl.tensor
    first_seen: tl.tensor
    end_seen: tl.tensor
    PAGED: tl.constexpr
    PAGE_SIZE: tl.constexpr
    SAME_STRIDES: tl.constexpr
    HEAD_TAIL: tl.constexpr
    VALUE_TAIL: tl.constexpr
    FLOAT8: tl.constexpr
    NATIVE_FLOAT8: tl.constexpr


@aggregates_of(tl, triton)
class Sums:
    """What a pass of the online softmax has come to.

    Attributes:
        acc: [BLOCK_M, VALUE_MAIN] float32, not yet divided.
        acc_tail: [BLOCK_M, VALUE_TAIL], of no meaning without a tail.
        row_sum: [BLOCK_M] sum of weights.
        row_max: [BLOCK_M] maximum of scores, base 2.
    """

    acc: tl.tensor
    acc_tail: tl.tensor
    row_sum: tl.tensor
    row_max: tl.tensor


@triton.jit
def nothing_seen(BLOCK_M: tl.constexpr, VALUE_MAIN: tl.constexpr, VALUE_TAIL: tl.constexpr) -> Sums:
    """The sums before any key."""
    acc = tl.zeros([BLOCK_M, VALUE_MAIN], tl.float32)
    acc_tail = acc
    if VALUE_TAIL:
        acc_tail = tl.zeros([BLOCK_M, VALUE_TAIL], tl.float32)
    return Sums(acc, acc_tail, tl.zeros([BLOCK_M], tl.float32), tl.full([BLOCK_M], LOWEST, tl.float32))


@triton.jit
def attend_tiles(
    sums: Sums,
    queries: Queries,
    cached: Keys,
    mask: Mask,
    scoring: Scoring,
    start: tl.tensor,  # first position of the first tile, a multiple of BLOCK_N
    end: tl.tensor,  # past the last position of the last tile
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
) -> Sums:
    """The sums after tiles start, start + BLOCK_N, ... < end.

    MASKED says that some query does not see some key of these tiles. Without it no load and no score is masked.
    """
    acc, acc_tail, row_sum, row_max = sums.acc, sums.acc_tail, sums.row_sum, sums.row_max
    q, positions, first_seen, end_seen = queries.main, queries.positions, cached.first_seen, cached.end_seen
    PAGED: tl.constexpr = cached.PAGED
    PAGE_SIZE: tl.constexpr = cached.PAGE_SIZE
    FLOAT8: tl.constexpr = cached.FLOAT8
    NATIVE_FLOAT8: tl.constexpr = cached.NATIVE_FLOAT8
    columns = tl.arange(0, BLOCK_N)
    WHOLE_PAGE: tl.constexpr = PAGED and PAGE_SIZE % BLOCK_N == 0
    # The page numbers of a tile are loaded one tile ahead and carried: a load of keys whose address waits for another
    # load of the same iteration is prefetched half as far.
    if PAGED:
        if WHOLE_PAGE:
            pages = page_numbers(cached.table_row, start, end_seen, PAGE_SIZE)
        else:
            pages = page_numbers(cached.table_row, start + columns, end_seen, PAGE_SIZE)
    for tile in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        keys = tile + columns
        if PAGED:
            if WHOLE_PAGE:
                places = (tile % PAGE_SIZE) + columns
                next_pages = page_numbers(cached.table_row, tile + BLOCK_N, end_seen, PAGE_SIZE)
            else:
                places = keys % PAGE_SIZE
                next_pages = page_numbers(cached.table_row, keys + BLOCK_N, end_seen, PAGE_SIZE)
            key_slots = pages.to(tl.int64) * cached.key_page_stride + places * cached.key_token_stride
            value_slots = key_slots
            if not cached.SAME_STRIDES:
                value_slots = pages.to(tl.int64) * cached.value_page_stride + places * cached.value_token_stride
            pages = next_pages
        else:
            key_slots = keys.to(tl.int64) * cached.key_token_stride
            value_slots = key_slots
            if not cached.SAME_STRIDES:
                value_slots = keys.to(tl.int64) * cached.value_token_stride
        live = (keys >= first_seen) & (keys < end_seen)
        k = load_columns(cached.key, key_slots, live, MASKED)
        scores = tl.dot(q, tl.trans(as_numbers(k, q.dtype, FLOAT8, NATIVE_FLOAT8)), input_precision=PRECISION)
        if cached.HEAD_TAIL:
            k_tail = load_columns(cached.key_tail, key_slots, live, MASKED)
            scores = tl.dot(
                queries.tail,
                tl.trans(as_numbers(k_tail, q.dtype, FLOAT8, NATIVE_FLOAT8)),
                scores,
                input_precision=PRECISION,
            )
        if scoring.HAS_SOFT_CAP:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1): right at both ends, where exp gives 0 and infinity.
            scores = scoring.soft_cap * (1.0 - 2.0 / (tl.exp2(scores * scoring.scale) + 1.0))
        elif scoring.HAS_SLOPES:
            scores = scores * scoring.scale
        if scoring.HAS_SLOPES:
            scores += queries.slopes[:, None] * (keys[None, :] - positions[:, None]).to(tl.float32)
        if MASKED:
            seen = sees(mask, keys[None, :], positions[:, None], live[None, :])
            scores = tl.where(seen, scores, float("-inf"))
        if scoring.HAS_SOFT_CAP or scoring.HAS_SLOPES:
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            weights = tl.exp2(scores - new_max[:, None])
        else:
            # The scale is positive: it is folded into one multiply-add with the subtraction.
            new_max = tl.maximum(row_max, tl.max(scores, 1) * scoring.scale)
            weights = tl.exp2(scores * scoring.scale - new_max[:, None])
        alpha = tl.exp2(row_max - new_max)
        row_sum = row_sum * alpha + tl.sum(weights, 1)
        row_max = new_max
        acc = acc * alpha[:, None]
        v = load_columns(cached.value, value_slots, live, MASKED)
        acc = tl.dot(weights.to(q.dtype), as_numbers(v, q.dtype, FLOAT8, NATIVE_FLOAT8), acc, input_precision=PRECISION)
        if cached.VALUE_TAIL:
            acc_tail = acc_tail * alpha[:, None]
            v_tail = load_columns(cached.value_tail, value_slots, live, MASKED)
            acc_tail = tl.dot(
                weights.to(q.dtype),
                as_numbers(v_tail, q.dtype, FLOAT8, NATIVE_FLOAT8),
                acc_tail,
                input_precision=PRECISION,
            )
    return Sums(acc, acc_tail, row_sum, row_max)


@triton.jit
def add_sinks(
    row_sum: tl.tensor, row_max: tl.tensor, sinks: tl.tensor, wanted: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """One more score that has no value, where wanted: returns row_sum, row_max and what acc is to be multiplied by.

    `sinks` [BLOCK_M] are natural, as the model has them.
    """
    scores = tl.where(wanted, sinks * LOG2E, LOWEST)
    new_max = tl.maximum(row_max, scores)
    alpha = tl.exp2(row_max - new_max)
    return row_sum * alpha + tl.where(wanted, tl.exp2(scores - new_max), 0.0), new_max, alpha


@triton.jit
def lse_of(row_sum: tl.tensor, row_max: tl.tensor) -> tl.tensor:
    """The natural logarithm of the sum of exponentiated scores; -inf where nothing was seen."""
    seen = row_sum > 0.0
    return tl.where(seen, (row_max + tl.log2(tl.where(seen, row_sum, 1.0))) * LN2, float("-inf"))


@triton.jit
def scale_of_scores(
    scale: tl.tensor, key_scale: tl.tensor, soft_cap: tl.tensor, head: tl.tensor, HAS_SOFT_CAP: tl.constexpr
) -> tl.tensor:
    """What a product of query and key is multiplied by: see `Scoring.scale`."""
    score_scale = scale
    if key_scale is not None:
        score_scale *= tl.load(key_scale + head)
    return score_scale * (2.0 * LOG2E) / soft_cap if HAS_SOFT_CAP else score_scale * LOG2E
