"""Long extends: one program for a block of queries of one row and one head, or a few heads that share their keys."""

from __future__ import annotations

import triton
import triton.language as tl

from taut.common_kernels.paged_attention.triton_softmax import (
    LOG2E,
    Keys,
    Queries,
    Scoring,
    add_sinks,
    attend_tiles,
    lse_of,
    nothing_seen,
    scale_of_scores,
)
from taut.common_kernels.triton_mask import Mask, key_range, sees_any


@triton.jit
def row_of_block(query_starts: tl.tensor, rows: tl.tensor, block: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """The row whose queries block number `block` holds, and the number of its first block.

    Row r begins with block `query_starts[r] // BLOCK + r`, which leaves it at least as many blocks as it fills. Row
    `rows` is the padding past the last row.
    """
    low = rows * 0
    high = rows
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(query_starts + middle) // BLOCK + middle <= block:
            low = middle
        else:
            high = middle - 1
    return low, tl.load(query_starts + low) // BLOCK + low


@triton.jit
def place_of(program: tl.tensor, packs: tl.tensor, together: tl.tensor, blocks: tl.tensor) -> tl.tensor:
    """Which pack of heads and which block of queries a program serves; see `triton_launch.heads_together`.

    So many packs run side by side, and their last blocks come first: under a causal mask they are the longest.
    """
    first = program // (together * blocks) * together
    beside = tl.minimum(together, packs - first)
    place = program - first * blocks
    return first + place % beside, blocks - 1 - place // beside


@triton.jit(
    do_not_specialize=["tokens", "rows", "packs", "together", "table_stride", "lse_token_stride", "lse_head_stride"],
    do_not_specialize_on_alignment=["lengths"],  # a chunk's begin anywhere in a table of all chunks
)
def taut_prefill(
    query: tl.tensor,  # [T, Hq, D]
    key: tl.tensor,  # [N, P, Hk, D]; contiguous: [K, Hk, D]
    value: tl.tensor,
    out: tl.tensor,  # [T, Hq, V]
    lse: tl.tensor,  # [T, Hq] or None
    key_scale: tl.tensor,  # [1] or [Hk], or None
    value_scale: tl.tensor,
    sinks: tl.tensor,  # [Hq] or None
    slopes: tl.tensor,  # [Hq] or None
    query_starts: tl.tensor,  # [R + 1]
    lengths: tl.tensor,  # [R]; contiguous: key_starts [R + 1]
    table: tl.tensor,  # [*, pages], or None
    table_rows: tl.tensor,  # [R], or None
    tokens: tl.tensor,
    rows: tl.tensor,
    packs: tl.tensor,  # packs of heads
    together: tl.tensor,  # of them, how many run side by side
    scale: tl.tensor,
    soft_cap: tl.tensor,
    left: tl.tensor,
    right: tl.tensor,
    query_token_stride: tl.tensor,
    query_head_stride: tl.tensor,
    query_stride: tl.tensor,
    key_page_stride: tl.tensor,
    key_token_stride: tl.tensor,
    key_head_stride: tl.tensor,
    key_stride: tl.tensor,
    value_page_stride: tl.tensor,
    value_token_stride: tl.tensor,
    value_head_stride: tl.tensor,
    value_stride: tl.tensor,
    out_token_stride: tl.tensor,
    out_head_stride: tl.tensor,
    out_stride: tl.tensor,
    lse_token_stride: tl.tensor,
    lse_head_stride: tl.tensor,
    table_stride: tl.tensor,
    GROUP: tl.constexpr,  # query heads of one key-value head
    PACK: tl.constexpr,  # of them, how many share a program
    MORE_THAN: tl.constexpr,  # rows with no more queries than this are left to another kernel
    KEY_HEAD_SCALES: tl.constexpr,  # whether there is a scale for each head
    VALUE_HEAD_SCALES: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    PAGED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SAME_STRIDES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_MAIN: tl.constexpr,
    HEAD_TAIL: tl.constexpr,
    VALUE_MAIN: tl.constexpr,
    VALUE_TAIL: tl.constexpr,
    FLOAT8: tl.constexpr,  # whether the cache holds e4m3, given as bytes
    NATIVE_FLOAT8: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """One program attends for one block of queries of a row and PACK of its heads; see `triton_launch.prefill`."""
    PACKS: tl.constexpr = (GROUP + PACK - 1) // PACK
    QUERIES: tl.constexpr = BLOCK_M // PACK
    pack, block = place_of(tl.program_id(0), packs, together, tl.num_programs(0) // packs)
    kv_head = pack // PACKS
    row, first_block = row_of_block(query_starts, rows, block, QUERIES)
    row_start = tl.load(query_starts + row)
    row_end = tokens
    length = 0
    if row < rows:
        row_end = tl.load(query_starts + row + 1)
        length = tl.load(lengths + row)
        if not PAGED:
            length = tl.load(lengths + row + 1) - length
    first_query = row_start + (block - first_block) * QUERIES
    if first_query >= row_end:
        return
    if (row < rows) & (row_end - row_start <= MORE_THAN):
        return

    lanes = tl.arange(0, BLOCK_M)
    query_tokens = first_query + lanes // PACK
    group_heads = (pack % PACKS) * PACK + lanes % PACK
    heads = kv_head * GROUP + group_heads
    ours = (query_tokens < row_end) & (lanes // PACK < QUERIES) & (group_heads < GROUP)
    first_position = length - (row_end - first_query)
    positions = first_position + lanes // PACK
    queries = tl.minimum(row_end - first_query, QUERIES)

    query_rows = query + query_tokens.to(tl.int64) * query_token_stride + heads * query_head_stride
    columns = tl.arange(0, HEAD_MAIN)
    q = tl.load(query_rows[:, None] + columns[None, :] * query_stride, mask=ours[:, None], other=0.0)
    q_tail = q
    key_head = key + kv_head.to(tl.int64) * key_head_stride
    value_head = value + kv_head.to(tl.int64) * value_head_stride
    if not PAGED:
        first_key = tl.load(lengths + row).to(tl.int64)
        key_head += first_key * key_token_stride
        value_head += first_key * value_token_stride
    key_columns = key_head + columns * key_stride
    key_tail_columns = key_columns
    if HEAD_TAIL:
        tail = HEAD_MAIN + tl.arange(0, HEAD_TAIL)
        q_tail = tl.load(query_rows[:, None] + tail[None, :] * query_stride, mask=ours[:, None], other=0.0)
        key_tail_columns = key_head + tail * key_stride
    value_columns = value_head + tl.arange(0, VALUE_MAIN) * value_stride
    value_tail_columns = value_columns
    if VALUE_TAIL:
        value_tail_columns = value_head + (VALUE_MAIN + tl.arange(0, VALUE_TAIL)) * value_stride
    sums = nothing_seen(BLOCK_M, VALUE_MAIN, VALUE_TAIL)

    table_row = table
    if PAGED:
        if table_rows is None:
            table_row = table + row.to(tl.int64) * table_stride
        else:
            # The padding past the last row has no entry; its length of 0 keeps the table from being read.
            table_row = table + tl.load(table_rows + row, mask=row < rows, other=0).to(tl.int64) * table_stride
    mask = Mask(left, right, CAUSAL, HAS_LEFT, HAS_RIGHT)
    HAS_SLOPES: tl.constexpr = slopes is not None
    score_scale = scale_of_scores(scale, key_scale, soft_cap, kv_head if KEY_HEAD_SCALES else 0, HAS_SOFT_CAP)
    scoring = Scoring(score_scale, soft_cap * LOG2E, HAS_SOFT_CAP, HAS_SLOPES)
    row_slopes = sums.row_max  # of no meaning without slopes
    if HAS_SLOPES:
        row_slopes = tl.load(slopes + heads, mask=ours, other=0.0) * LOG2E

    first_seen, end_seen, first_common, end_common = key_range(mask, first_position, queries, length)
    cached = Keys(
        key_columns, key_tail_columns, value_columns, value_tail_columns, table_row, key_page_stride, key_token_stride,
        value_page_stride, value_token_stride, first_seen, end_seen, PAGED, PAGE_SIZE, SAME_STRIDES, HEAD_TAIL,
        VALUE_TAIL, FLOAT8, NATIVE_FLOAT8,
    )  # fmt: skip
    asked = Queries(q, q_tail, positions, row_slopes)
    # Tiles: some keys hidden from some query (only with a window), then all seen by all, then some hidden again.
    start = first_seen // BLOCK_N * BLOCK_N
    common_end = tl.maximum(end_common // BLOCK_N * BLOCK_N, start)
    common_start = start
    if HAS_LEFT:
        common_start = tl.minimum(tl.cdiv(first_common, BLOCK_N) * BLOCK_N, tl.maximum(end_seen, start))
        common_end = tl.maximum(common_end, common_start)
        sums = attend_tiles(sums, asked, cached, mask, scoring, start, common_start, True, BLOCK_N, PRECISION, STAGES)
    sums = attend_tiles(sums, asked, cached, mask, scoring, common_start, common_end, False, BLOCK_N, PRECISION, STAGES)
    sums = attend_tiles(sums, asked, cached, mask, scoring, common_end, end_seen, True, BLOCK_N, PRECISION, STAGES)
    acc, acc_tail, row_sum, row_max = sums.acc, sums.acc_tail, sums.row_sum, sums.row_max

    factor = tl.full([BLOCK_M], 1.0, tl.float32)
    if sinks is not None:
        sink_scores = tl.load(sinks + heads, mask=ours, other=0.0).to(tl.float32)
        row_sum, row_max, factor = add_sinks(row_sum, row_max, sink_scores, sees_any(mask, positions, length))
    factor = tl.where(row_sum > 0.0, factor / tl.where(row_sum > 0.0, row_sum, 1.0), 0.0)
    if value_scale is not None:
        factor *= tl.load(value_scale + (kv_head if VALUE_HEAD_SCALES else 0))
    out_rows = out + query_tokens.to(tl.int64) * out_token_stride + heads * out_head_stride
    out_columns = tl.arange(0, VALUE_MAIN) * out_stride
    tl.store(
        out_rows[:, None] + out_columns[None, :], (acc * factor[:, None]).to(out.dtype.element_ty), mask=ours[:, None]
    )
    if VALUE_TAIL:
        out_columns = (VALUE_MAIN + tl.arange(0, VALUE_TAIL)) * out_stride
        tl.store(
            out_rows[:, None] + out_columns[None, :],
            (acc_tail * factor[:, None]).to(out.dtype.element_ty),
            mask=ours[:, None],
        )
    if lse is not None:
        lses = lse + query_tokens.to(tl.int64) * lse_token_stride + heads * lse_head_stride
        tl.store(lses, lse_of(row_sum, row_max), mask=ours)
