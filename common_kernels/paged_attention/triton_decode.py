"""Few queries on many keys: the parts of a schedule, each with an equal share of the step's tiles of keys.

The query heads that share a key-value head stand together, one below another, so that every key is read once. A
program goes through its part's work items; an item that lies in one part is written to the output, and of one that is
split each part leaves its partial output and LSE in scratch. The last of an item's parts merges them, where an item has
few; where it has many, `merge_items` does, all over the device.
"""

from __future__ import annotations

import triton
import triton.language as tl

from taut.common_kernels.merge.triton_merge import combine
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
from taut.common_kernels.schedule.triton_items import Schedule, load_first_item, load_item, load_part, tiles_of
from taut.common_kernels.triton_mask import Mask, key_range, sees_any


@triton.jit(do_not_specialize=["tokens", "rows", "table_stride"])
def taut_decode(
    query: tl.tensor,  # [T, Hq, D]
    key: tl.tensor,  # [N, P, Hk, D]
    value: tl.tensor,  # [N, P, Hk, V]
    out: tl.tensor,  # [T, Hq, V]
    lse: tl.tensor,  # [T, Hq] or None
    partials: tl.tensor,  # [partials, QUERIES, Hq, V] float32
    partial_lses: tl.tensor,  # [partials, QUERIES, Hq] float32
    arrivals: tl.tensor,  # [items, head blocks] int32, zeros before and after, or None where `merge_items` follows
    key_scale: tl.tensor,  # [1] or [Hk], or None
    value_scale: tl.tensor,
    sinks: tl.tensor,  # [Hq] or None
    slopes: tl.tensor,  # [Hq] or None
    items: tl.tensor,  # the schedule
    parts: tl.tensor,
    query_starts: tl.tensor,  # [R + 1]
    table: tl.tensor,  # [*, pages]
    table_rows: tl.tensor,  # [R], or None
    tokens: tl.tensor,
    rows: tl.tensor,
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
    Q_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of one key-value head
    PACK: tl.constexpr,  # of them, how many share a program
    QUERIES: tl.constexpr,  # the most queries of an item
    MERGE_ROWS: tl.constexpr,  # a power of two, at least PACK
    MERGE_CHUNK: tl.constexpr,  # partials read together, where the last part merges
    EARLY: tl.constexpr,  # whether this kernel may start before the one ahead has ended
    RELEASES: tl.constexpr,  # whether this kernel lets the merge start before it has ended
    PADDING: tl.constexpr,  # whether queries past the last row are written here
    KEY_HEAD_SCALES: tl.constexpr,  # whether there is a scale for each head
    VALUE_HEAD_SCALES: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SAME_STRIDES: tl.constexpr,
    BLOCK_M: tl.constexpr,  # at least QUERIES * PACK
    BLOCK_N: tl.constexpr,  # keys of a round of the loop
    CUT: tl.constexpr,  # keys of a schedule tile; BLOCK_N is a multiple
    HEAD_MAIN: tl.constexpr,
    HEAD_TAIL: tl.constexpr,
    VALUE_MAIN: tl.constexpr,
    VALUE_TAIL: tl.constexpr,
    FLOAT8: tl.constexpr,  # whether the cache holds e4m3, given as bytes
    NATIVE_FLOAT8: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """One program works through one part for the packed heads of one key-value head; see `triton_launch.decode`."""
    PACKS: tl.constexpr = (GROUP + PACK - 1) // PACK
    VALUE_SIZE: tl.constexpr = VALUE_MAIN + VALUE_TAIL
    MERGE_QUERIES: tl.constexpr = MERGE_ROWS // PACK
    MERGE_COLUMNS: tl.constexpr = VALUE_MAIN * 2 if VALUE_TAIL else VALUE_MAIN
    merge_lanes = tl.arange(0, MERGE_ROWS)
    merge_columns = tl.arange(0, MERGE_COLUMNS)
    merge_group_heads = (tl.program_id(0) % PACKS) * PACK + merge_lanes % PACK
    merge_heads = tl.program_id(0) // PACKS * GROUP + merge_group_heads
    merge_ours = (merge_lanes // PACK < MERGE_QUERIES) & (merge_group_heads < GROUP)
    kv_head = tl.program_id(0) // PACKS
    part = tl.program_id(1)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    schedule = Schedule(items, parts)
    share = load_part(schedule, part)
    item = load_first_item(schedule, part)
    if PADDING:
        padding_start = tl.load(query_starts + rows)  # early, so that nothing waits for it at the end

    lanes = tl.arange(0, BLOCK_M)
    lane_query = lanes // PACK
    group_heads = (tl.program_id(0) % PACKS) * PACK + lanes % PACK
    heads = kv_head * GROUP + group_heads
    ours = (lane_query < QUERIES) & (group_heads < GROUP)
    columns = tl.arange(0, HEAD_MAIN)
    value_range = tl.arange(0, VALUE_MAIN)
    key_head = key + kv_head.to(tl.int64) * key_head_stride
    value_head = value + kv_head.to(tl.int64) * value_head_stride
    key_columns = key_head + columns * key_stride
    value_columns = value_head + value_range * value_stride
    key_tail_columns = key_columns
    value_tail_columns = value_columns
    if HEAD_TAIL:
        tail = HEAD_MAIN + tl.arange(0, HEAD_TAIL)
        key_tail_columns = key_head + tail * key_stride
    if VALUE_TAIL:
        value_tail_range = VALUE_MAIN + tl.arange(0, VALUE_TAIL)
        value_tail_columns = value_head + value_tail_range * value_stride
    score_scale = scale_of_scores(scale, key_scale, soft_cap, kv_head if KEY_HEAD_SCALES else 0, HAS_SOFT_CAP)
    mask = Mask(left, right, CAUSAL, HAS_LEFT, HAS_RIGHT)
    row_slopes = tl.zeros([BLOCK_M], tl.float32)
    if slopes is not None:
        row_slopes = tl.load(slopes + heads, mask=ours, other=0.0) * LOG2E
    scoring = Scoring(score_scale, soft_cap * LOG2E, HAS_SOFT_CAP, slopes is not None)

    for number in range(share.first_item, share.last_item + 1):
        next_item = load_item(schedule, tl.minimum(number + 1, share.last_item))  # early, too
        if table_rows is None:
            table_row = table + item.row.to(tl.int64) * table_stride
        else:
            table_row = table + tl.load(table_rows + item.row).to(tl.int64) * table_stride
        begin = tl.where(number == share.first_item, share.first_tile, 0)
        end = tl.where(number == share.last_item, share.end_tile, tiles_of(item, CUT))
        here = ours & (lane_query < item.queries)
        positions = item.first_position + lane_query
        query_tokens = (item.first_query + lane_query).to(tl.int64)

        query_rows = query + query_tokens * query_token_stride + heads * query_head_stride
        q = tl.load(query_rows[:, None] + columns[None, :] * query_stride, mask=here[:, None], other=0.0)
        q_tail = q
        if HEAD_TAIL:
            q_tail = tl.load(query_rows[:, None] + tail[None, :] * query_stride, mask=here[:, None], other=0.0)
        # The schedule may serve layers with other windows: what this mask does not see is left out here.
        first_seen, end_seen, _, _ = key_range(mask, item.first_position, item.queries, item.end_key)
        # All tiles are masked: it costs little beside reading them, and one loop keeps the loads flowing. Two loops,
        # one of them without masks, were slower for every shape of the benchmark.
        start = tl.maximum(item.first_key + begin * CUT, first_seen // CUT * CUT)
        stop = tl.minimum(item.first_key + end * CUT, end_seen)
        cached = Keys(
            key_columns, key_tail_columns, value_columns, value_tail_columns, table_row, key_page_stride,
            key_token_stride, value_page_stride, value_token_stride, first_seen, stop, True, PAGE_SIZE, SAME_STRIDES,
            HEAD_TAIL, VALUE_TAIL, FLOAT8, NATIVE_FLOAT8,
        )  # fmt: skip
        asked = Queries(q, q_tail, positions, row_slopes)
        sums = nothing_seen(BLOCK_M, VALUE_MAIN, VALUE_TAIL)
        if CUT < BLOCK_N and stop - start <= CUT:  # one round, and nothing to load ahead: it starts sooner
            sums = attend_tiles(sums, asked, cached, mask, scoring, start, stop, True, CUT, PRECISION, 1)
        else:
            sums = attend_tiles(sums, asked, cached, mask, scoring, start, stop, True, BLOCK_N, PRECISION, STAGES)
        acc, acc_tail, row_sum, row_max = sums.acc, sums.acc_tail, sums.row_sum, sums.row_max

        if (
            RELEASES and number == share.last_item
        ):  # from the start on, the programs of the merge were in the way of these
            tl.extra.cuda.gdc_launch_dependents()

        factor = tl.full([BLOCK_M], 1.0, tl.float32)
        if sinks is not None:
            sink_scores = tl.load(sinks + heads, mask=ours, other=0.0).to(tl.float32)
            wanted = sees_any(mask, positions, item.end_key) & (begin == 0)
            row_sum, row_max, factor = add_sinks(row_sum, row_max, sink_scores, wanted)
        factor = tl.where(row_sum > 0.0, factor / tl.where(row_sum > 0.0, row_sum, 1.0), 0.0)
        if value_scale is not None:
            factor *= tl.load(value_scale + (kv_head if VALUE_HEAD_SCALES else 0))
        acc *= factor[:, None]
        if VALUE_TAIL:
            acc_tail *= factor[:, None]
        if item.splits > 1:
            partial = (item.first_partial + tl.where(number == share.first_item, share.first_split, 0)).to(tl.int64)
            places = (partial * QUERIES + lane_query) * Q_HEADS + heads
            partial_rows = partials + places * VALUE_SIZE
            tl.store(partial_rows[:, None] + value_range[None, :], acc, mask=here[:, None])
            if VALUE_TAIL:
                tl.store(partial_rows[:, None] + value_tail_range[None, :], acc_tail, mask=here[:, None])
            tl.store(partial_lses + places, lse_of(row_sum, row_max), mask=here)
            if arrivals is not None:
                tl.debug_barrier()  # all threads' stores before the count
                arrived = arrivals + number * tl.num_programs(0) + tl.program_id(0)
                if tl.atomic_add(arrived, 1, sem="acq_rel") == item.splits - 1:
                    tl.store(arrived, 0)
                    for first in range(0, item.queries, MERGE_QUERIES):
                        merge_query = first + merge_lanes // PACK
                        merge_here = merge_ours & (merge_query < item.queries)
                        merge_places = (item.first_partial.to(tl.int64) * QUERIES + merge_query) * Q_HEADS + merge_heads
                        mixed, mixed_lse = combine(
                            partials + merge_places * VALUE_SIZE,
                            QUERIES * Q_HEADS * VALUE_SIZE,
                            merge_columns,
                            merge_columns < VALUE_SIZE,
                            partial_lses + merge_places,
                            QUERIES * Q_HEADS,
                            merge_here,
                            item.splits,
                            MERGE_CHUNK,
                            MERGE_ROWS,
                            MERGE_COLUMNS,
                        )
                        merge_tokens = (item.first_query + merge_query).to(tl.int64)
                        merge_out = out + merge_tokens * out_token_stride + merge_heads * out_head_stride
                        tl.store(
                            merge_out[:, None] + merge_columns[None, :] * out_stride,
                            mixed.to(out.dtype.element_ty),
                            mask=merge_here[:, None] & (merge_columns < VALUE_SIZE)[None, :],
                        )
                        if lse is not None:
                            merge_lses = lse + merge_tokens * lse_token_stride + merge_heads * lse_head_stride
                            tl.store(merge_lses, mixed_lse, mask=merge_here)
        else:
            out_rows = out + query_tokens * out_token_stride + heads * out_head_stride
            out_pointers = out_rows[:, None] + value_range[None, :] * out_stride
            tl.store(out_pointers, acc.to(out.dtype.element_ty), mask=here[:, None])
            if VALUE_TAIL:
                out_pointers = out_rows[:, None] + value_tail_range[None, :] * out_stride
                tl.store(out_pointers, acc_tail.to(out.dtype.element_ty), mask=here[:, None])
            if lse is not None:
                lses = lse + query_tokens * lse_token_stride + heads * lse_head_stride
                tl.store(lses, lse_of(row_sum, row_max), mask=here)
        item = next_item

    if PADDING:
        # Queries past the last row belong to no item: the parts share them out.
        for token in range(padding_start + part, tokens, tl.num_programs(1)):
            pad = ours & (lane_query == 0)
            pad_rows = out + tl.cast(token, tl.int64) * out_token_stride + heads * out_head_stride
            nothing = tl.zeros([BLOCK_M, VALUE_MAIN], out.dtype.element_ty)
            tl.store(pad_rows[:, None] + value_range[None, :] * out_stride, nothing, mask=pad[:, None])
            if VALUE_TAIL:
                nothing = tl.zeros([BLOCK_M, VALUE_TAIL], out.dtype.element_ty)
                tl.store(pad_rows[:, None] + value_tail_range[None, :] * out_stride, nothing, mask=pad[:, None])
            if lse is not None:
                lses = lse + tl.cast(token, tl.int64) * lse_token_stride + heads * lse_head_stride
                tl.store(lses, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=pad)
