"""Few queries on many keys, on Hopper: the parts of a schedule, as `triton_decode`, with keys brought by other warps.

One warpgroup attends; one warp, or four where pages are small, bring keys and values into a ring. Both go through the
same part of the schedule, item after item, each at its own pace: the ring does not run dry between two items.

The products are turned round, so that heads, of which there are few, are columns of the matrix instructions (8 at
least) and keys are their 64 rows:

    scores [keys, heads] = keys [keys, D] x queries^T          output^T [V, heads] += values^T [V, keys] x weights

Keys and values are read from the ring where they lie; only the weights, BLOCK_N x heads of them, go through shared
memory on their way from one product to the other.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from taut.common_kernels.gluon_features import THREAD_BARRIERS, first_of
from taut.common_kernels.paged_attention.hopper_ring import (
    GATHERING_WARPS,
    PIECE,
    as_boxes,
    clear_dead_keys,
    gather_tile,
    load_tile,
    make_barriers,
)
from taut.common_kernels.paged_attention.hopper_softmax import (
    LN2,
    LOG2E,
    LOWEST,
    add_sinks,
    cap_scores,
    lse_of,
    query_range,
    scale_of_scores,
    sees,
    sees_any,
)
from taut.common_kernels.schedule.hopper_items import (
    Item,
    Part,
    Schedule,
    let_next_start,
    load_first_item,
    load_item,
    load_part,
    tiles_of,
    wait_for_kernel_ahead,
)

thread_barrier = first_of(gl, THREAD_BARRIERS)


@gluon.jit
def span_of(
    part: Part,
    number: gl.tensor,
    item: Item,
    left: gl.tensor,
    right: gl.tensor,
    CAUSAL: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    TILE: gl.constexpr,
    BLOCK_N: gl.constexpr,
) -> gl.tensor:
    """What a part does of an item, by its number.

    Returns the first position, how many tiles of BLOCK_N, and the positions between which keys are read.

    The schedule may serve layers with other windows: what this mask does not see is left out here.
    """
    begin = gl.where(number == part.first_item, part.first_tile, 0)
    end = gl.where(number == part.last_item, part.end_tile, tiles_of(item, TILE))
    first_seen, end_seen, _, _ = query_range(
        item.first_position, item.queries, item.end_key, left, right, CAUSAL, HAS_LEFT, HAS_RIGHT
    )
    start = gl.maximum(item.first_key + begin * TILE, first_seen // TILE * TILE)
    stop = gl.minimum(item.first_key + end * TILE, end_seen)
    tiles = gl.maximum(gl.cdiv(stop - start, BLOCK_N), 0)
    return start, tiles, first_seen, stop


@gluon.jit
def table_row_of(table: gl.tensor, table_rows: gl.tensor, row: gl.tensor, table_stride: gl.tensor) -> gl.tensor:
    """The address of a row's first page number."""
    if table_rows is None:
        address = table + row.to(gl.int64) * table_stride
    else:
        address = table + gl.load(table_rows + row).to(gl.int64) * table_stride
    return address


@gluon.jit
def load_part_of_keys(
    key: gl.tensor,  # a descriptor, or, gathered, a pointer to the cache's slot 0 of this head
    value: gl.tensor,
    k_slots: gl.shared_memory_descriptor,  # boxes, or, gathered, slots
    k_tail_slots: gl.shared_memory_descriptor,
    v_slots: gl.shared_memory_descriptor,
    k_full: gl.shared_memory_descriptor,
    v_full: gl.shared_memory_descriptor,
    free: gl.shared_memory_descriptor,
    schedule: Schedule,
    part_number: gl.tensor,
    table: gl.tensor,
    table_rows: gl.tensor,
    dead_page: gl.tensor,
    kv_head: gl.tensor,
    left: gl.tensor,
    right: gl.tensor,
    key_page_stride: gl.tensor,
    key_token_stride: gl.tensor,
    value_page_stride: gl.tensor,
    value_token_stride: gl.tensor,
    table_stride: gl.tensor,
    CAUSAL: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    BOX: gl.constexpr,
    BLOCK_N: gl.constexpr,
    TILE: gl.constexpr,
    HEAD_MAIN: gl.constexpr,
    HEAD_TAIL: gl.constexpr,
    STAGES: gl.constexpr,
    DEPENDENT: gl.constexpr,
) -> None:
    """The partition that fills the ring, with the tiles of all items of a part, one behind another."""
    if DEPENDENT:
        wait_for_kernel_ahead()
    part = load_part(schedule, part_number)
    item = load_first_item(schedule, part_number)
    loaded = part_number * 0  # tiles of items before
    for number in range(part.first_item, part.last_item + 1):
        table_row = table_row_of(table, table_rows, item.row, table_stride)
        start, tiles, first_seen, stop = span_of(
            part, number, item, left, right, CAUSAL, HAS_LEFT, HAS_RIGHT, TILE, BLOCK_N,
        )  # fmt: skip
        for i in range(tiles):
            if BOX:
                load_tile(
                    loaded + i, start + i * BLOCK_N, key, value, k_slots, k_tail_slots, v_slots, k_full, v_full, free,
                    table_row, dead_page, kv_head, first_seen, stop, PAGE_SIZE, BLOCK_N, BOX, HEAD_MAIN, HEAD_TAIL,
                    STAGES,
                )  # fmt: skip
            else:
                gather_tile(
                    loaded + i, start + i * BLOCK_N, key, value, k_slots, k_tail_slots, v_slots, k_full, v_full, free,
                    table_row, key_page_stride, key_token_stride, value_page_stride, value_token_stride,
                    first_seen, stop, PAGE_SIZE, HEAD_TAIL, STAGES,
                )  # fmt: skip
        loaded += tiles
        # Not ahead of the tiles, whose begin it would put off: the ring is full, and no slot free for a while.
        item = load_item(schedule, gl.minimum(number + 1, part.last_item))


@gluon.jit
def load_queries(
    query: gl.tensor,
    first_query: gl.tensor,
    queries: gl.tensor,
    kv_head: gl.tensor,
    first_group_head: gl.tensor,
    query_token_stride: gl.tensor,
    query_head_stride: gl.tensor,
    GROUP: gl.constexpr,
    PACK: gl.constexpr,
    ROWS: gl.constexpr,
    FIRST_COLUMN: gl.constexpr,
    COLUMNS: gl.constexpr,
) -> gl.tensor:
    """Some columns of an item's queries [ROWS, COLUMNS], in registers; row r is query r // PACK and head r % PACK."""
    LANES: gl.constexpr = COLUMNS // 8 if COLUMNS < 256 else 32
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    lanes = gl.arange(0, ROWS, layout=gl.SliceLayout(1, wide))
    group_heads = first_group_head + lanes % PACK
    here = (lanes // PACK < queries) & (group_heads < GROUP)
    addresses = (
        query
        + (first_query + lanes // PACK).to(gl.int64) * query_token_stride
        + (kv_head * GROUP + group_heads) * query_head_stride
    )
    columns = FIRST_COLUMN + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, wide))
    return gl.load(addresses[:, None] + columns[None, :], mask=here[:, None], other=0.0)


@gluon.jit
def mix_partials(
    partials: gl.tensor,
    partial_lses: gl.tensor,
    first_partial: gl.tensor,
    splits: gl.tensor,
    queries: gl.tensor,  # [ROWS] of the item
    heads: gl.tensor,  # [ROWS]
    here: gl.tensor,  # [ROWS]
    columns: gl.tensor,  # [V]
    Q_HEADS: gl.constexpr,
    QUERIES: gl.constexpr,
    VALUE_SIZE: gl.constexpr,
) -> gl.tensor:
    """The output [ROWS, V] float32 and the LSEs [ROWS] of an item that is split; few partials, one after another."""
    places = (first_partial.to(gl.int64) * QUERIES + queries) * Q_HEADS + heads
    top = gl.load(partial_lses + places, mask=here, other=0.0) * LOG2E
    mixed = gl.load((partials + places * VALUE_SIZE)[:, None] + columns[None, :], mask=here[:, None], other=0.0)
    total = gl.where(top > float("-inf"), 1.0, 0.0)
    for _ in range(1, splits):
        places += QUERIES * Q_HEADS
        score = gl.load(partial_lses + places, mask=here, other=0.0) * LOG2E
        numbers = gl.load((partials + places * VALUE_SIZE)[:, None] + columns[None, :], mask=here[:, None], other=0.0)
        new_top = gl.maximum(top, score)
        base = gl.where(new_top == float("-inf"), 0.0, new_top)
        decay = gl.exp2(top - base)
        weight = gl.exp2(score - base)
        mixed = mixed * decay[:, None] + numbers * weight[:, None]
        total = total * decay + weight
        top = new_top
    seen = total > 0.0
    safe = gl.where(seen, total, 1.0)
    return mixed / safe[:, None], gl.where(seen, (top + gl.log2(safe)) * LN2, float("-inf"))


@gluon.jit
def fill_padding(
    out: gl.tensor,
    lse: gl.tensor,
    first: gl.tensor,
    tokens: gl.tensor,
    step: gl.tensor,
    kv_head: gl.tensor,
    first_group_head: gl.tensor,
    out_token_stride: gl.tensor,
    out_head_stride: gl.tensor,
    lse_token_stride: gl.tensor,
    lse_head_stride: gl.tensor,
    GROUP: gl.constexpr,
    PACK: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
) -> None:
    """Zeros, and -inf as LSE, for queries first, first + step, ... < tokens, which belong to no row."""
    LANES: gl.constexpr = COLUMNS // 8 if COLUMNS < 256 else 32
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    lanes = gl.arange(0, ROWS, layout=gl.SliceLayout(1, wide))
    group_heads = first_group_head + lanes
    heads = kv_head * GROUP + group_heads
    ours = (lanes < PACK) & (group_heads < GROUP)
    columns = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, wide))
    for token in range(first, tokens, step):
        rows = out + gl.cast(token, gl.int64) * out_token_stride + heads * out_head_stride
        nothing = gl.zeros([ROWS, COLUMNS], out.dtype.element_ty, layout=wide)
        gl.store(rows[:, None] + columns[None, :], nothing, mask=ours[:, None])
        if lse is not None:
            lses = lse + gl.cast(token, gl.int64) * lse_token_stride + heads * lse_head_stride
            gl.store(lses, gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, wide)), mask=ours)


@gluon.jit
def by_warp(tile: gl.tensor) -> gl.tensor:
    """A tile [BLOCK_N, ROWS] as turned products lay it out: [BLOCK_N / 64, 4 warps, 16, ROWS]."""
    BLOCK_N: gl.constexpr = tile.shape[0]
    ROWS: gl.constexpr = tile.shape[1]
    return gl.reshape(tile, [BLOCK_N // 64, 4, 16, ROWS])


@gluon.jit
def known_to_all(found: gl.tensor) -> gl.tensor:
    """What each warp has found, [4 warps, ROWS], in such a layout that every thread has it of all four.

    So a reduction over keys waits for other warps once. The compiler's own has one of them work out the result and the
    others wait for that, too.
    """
    return gl.convert_layout(found, gl.BlockedLayout([4, 2], [8, 4], [4, 1], [1, 0]))


@gluon.jit
def max_over_keys(tile: gl.tensor) -> gl.tensor:
    """The maxima [ROWS] of a tile [BLOCK_N, ROWS]."""
    found = gl.max(gl.max(by_warp(tile), 2), 0)
    return gl.convert_layout(gl.max(known_to_all(found), 0), gl.SliceLayout(0, tile.type.layout))


@gluon.jit
def sum_over_keys(tile: gl.tensor) -> gl.tensor:
    """The sums [ROWS] of a tile [BLOCK_N, ROWS]."""
    found = gl.sum(gl.sum(by_warp(tile), 2), 0)
    return gl.convert_layout(gl.sum(known_to_all(found), 0), gl.SliceLayout(0, tile.type.layout))


@gluon.jit
def attend_part(
    q_smem: gl.shared_memory_descriptor,  # [ROWS, HEAD_MAIN] shared memory
    q_tail_smem: gl.shared_memory_descriptor,
    p_smem: gl.shared_memory_descriptor,  # [ROWS, BLOCK_N] shared memory: the weights of a tile
    k_ring: gl.shared_memory_descriptor,  # [STAGES, BLOCK_N, HEAD_MAIN]
    k_tail_ring: gl.shared_memory_descriptor,
    v_ring: gl.shared_memory_descriptor,  # [STAGES, BLOCK_N, HEAD_MAIN]
    k_full: gl.shared_memory_descriptor,
    v_full: gl.shared_memory_descriptor,
    free: gl.shared_memory_descriptor,
    query: gl.tensor,
    out: gl.tensor,
    lse: gl.tensor,
    partials: gl.tensor,
    partial_lses: gl.tensor,
    arrivals: gl.tensor,
    sinks: gl.tensor,
    slopes: gl.tensor,
    schedule: Schedule,
    part_number: gl.tensor,
    query_starts: gl.tensor,
    tokens: gl.tensor,
    rows: gl.tensor,
    kv_head: gl.tensor,
    first_group_head: gl.tensor,
    score_scale: gl.tensor,
    cap: gl.tensor,
    left: gl.tensor,
    right: gl.tensor,
    query_token_stride: gl.tensor,
    query_head_stride: gl.tensor,
    out_token_stride: gl.tensor,
    out_head_stride: gl.tensor,
    lse_token_stride: gl.tensor,
    lse_head_stride: gl.tensor,
    Q_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    PACK: gl.constexpr,
    QUERIES: gl.constexpr,
    OVERLAPPED: gl.constexpr,
    PADDING: gl.constexpr,
    CAUSAL: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    HAS_SOFT_CAP: gl.constexpr,
    BOX: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    TILE: gl.constexpr,
    HEAD_MAIN: gl.constexpr,
    HEAD_TAIL: gl.constexpr,
    STAGES: gl.constexpr,
    DEPENDENT: gl.constexpr,
) -> None:
    """The warpgroup that attends, item after item of a part, and then fills what belongs to no row."""
    if DEPENDENT:
        wait_for_kernel_ahead()
    if PADDING:
        padding_start = gl.load(query_starts + rows)  # early, so that nothing waits for it at the end
    turned: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])  # [keys or V, ROWS]
    by_key: gl.constexpr = gl.SliceLayout(1, turned)
    by_row: gl.constexpr = gl.SliceLayout(0, turned)
    LANES: gl.constexpr = HEAD_MAIN // 8 if HEAD_MAIN < 256 else 32
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])  # [ROWS, V]
    HAS_SLOPES: gl.constexpr = slopes is not None

    part = load_part(schedule, part_number)
    item = load_first_item(schedule, part_number)

    lanes = gl.arange(0, ROWS, layout=by_row)
    lane_query = lanes // PACK
    group_heads = first_group_head + lanes % PACK
    heads = kv_head * GROUP + group_heads
    ours = (lane_query < QUERIES) & (group_heads < GROUP)
    row_slopes = gl.zeros([ROWS], gl.float32, layout=by_row)
    if HAS_SLOPES:
        row_slopes = gl.load(slopes + heads, mask=ours, other=0.0) * LOG2E
    wide_lanes = gl.arange(0, ROWS, layout=gl.SliceLayout(1, wide))
    wide_query = wide_lanes // PACK
    wide_group_heads = first_group_head + wide_lanes % PACK
    wide_heads = kv_head * GROUP + wide_group_heads
    wide_columns = gl.arange(0, HEAD_MAIN, layout=gl.SliceLayout(0, wide))

    q = load_queries(
        query, item.first_query, item.queries, kv_head, first_group_head, query_token_stride, query_head_stride,
        GROUP, PACK, ROWS, 0, HEAD_MAIN,
    )  # fmt: skip
    q_tail = q
    if HEAD_TAIL:
        q_tail = load_queries(
            query, item.first_query, item.queries, kv_head, first_group_head, query_token_stride, query_head_stride,
            GROUP, PACK, ROWS, HEAD_MAIN, HEAD_TAIL,
        )  # fmt: skip
    attended = part_number * 0  # tiles of items before
    for number in range(part.first_item, part.last_item + 1):
        # Every product on the queries of the item before has been waited for by all threads.
        thread_barrier()
        q_smem.store(q)
        if HEAD_TAIL:
            q_tail_smem.store(q_tail)
        fence_async_shared()
        thread_barrier()
        next_item = load_item(schedule, gl.minimum(number + 1, part.last_item))
        q = load_queries(  # early: it is wanted after the last tile of this item
            query, next_item.first_query, next_item.queries, kv_head, first_group_head, query_token_stride,
            query_head_stride, GROUP, PACK, ROWS, 0, HEAD_MAIN,
        )  # fmt: skip
        if HEAD_TAIL:
            q_tail = load_queries(
                query, next_item.first_query, next_item.queries, kv_head, first_group_head, query_token_stride,
                query_head_stride, GROUP, PACK, ROWS, HEAD_MAIN, HEAD_TAIL,
            )  # fmt: skip
        start, tiles, _, stop = span_of(
            part, number, item, left, right, CAUSAL, HAS_LEFT, HAS_RIGHT, TILE, BLOCK_N,
        )  # fmt: skip
        positions = item.first_position + lane_query
        here = ours & (lane_query < item.queries)
        acc = gl.zeros([HEAD_MAIN, ROWS], gl.float32, layout=turned)
        totals = gl.zeros([BLOCK_N, ROWS], gl.float32, layout=turned)  # of each key's place: added up at the end
        top = gl.full([ROWS], LOWEST, gl.float32, layout=by_row)

        for i in range(tiles):
            slot = (attended + i) % STAGES
            phase = ((attended + i) // STAGES) & 1
            tile = start + i * BLOCK_N
            keys = tile + gl.arange(0, BLOCK_N, layout=by_key)
            mbarrier.wait(k_full.index(slot), phase)
            if not BOX:
                fence_async_shared()
            scores = gl.zeros([BLOCK_N, ROWS], gl.float32, layout=turned)
            scores = warpgroup_mma(k_ring.index(slot), q_smem.permute((1, 0)), scores, use_acc=False, is_async=True)
            if HEAD_TAIL:
                scores = warpgroup_mma(k_tail_ring.index(slot), q_tail_smem.permute((1, 0)), scores, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[scores])

            scores = cap_scores(scores, score_scale, cap) if HAS_SOFT_CAP else scores * score_scale
            if HAS_SLOPES:
                scores += row_slopes[None, :] * (keys[:, None] - positions[None, :]).to(gl.float32)
            # All tiles are masked: it costs little beside reading them.
            seen = sees(keys[:, None], positions[None, :], stop, left, right, CAUSAL, HAS_LEFT, HAS_RIGHT)
            scores = gl.where(seen, scores, float("-inf"))
            new_top = gl.maximum(top, max_over_keys(scores))
            weights = gl.exp2(scores - new_top[None, :])
            decay = gl.exp2(top - new_top)
            totals = totals * decay[None, :] + weights
            top = new_top
            # Every product on the weights of the tile before has been waited for by all threads: they arrived at
            # `free` together.
            p_smem.permute((1, 0)).store(weights.to(q_smem.dtype))

            mbarrier.wait(v_full.index(slot), phase)
            v_tile = v_ring.index(slot)
            if BOX:  # noqa: SIM102 - the outer one is the compiler's
                if tile + BLOCK_N > item.end_key:
                    clear_dead_keys(v_tile, tile, item.end_key)
            fence_async_shared()  # the weights; what was gathered, or cleared
            thread_barrier()
            acc = acc * decay[None, :]
            acc = warpgroup_mma(v_tile.permute((1, 0)), p_smem.permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(free.index(slot), count=1)
        attended += tiles

        if OVERLAPPED and number == part.last_item:
            let_next_start()

        total = sum_over_keys(totals)
        factor = gl.full([ROWS], 1.0, gl.float32, layout=by_row)
        if sinks is not None:
            sink_scores = gl.load(sinks + heads, mask=ours, other=0.0).to(gl.float32)
            wanted = sees_any(positions, item.end_key, left, right, CAUSAL, HAS_LEFT, HAS_RIGHT)
            # An item's sinks count once: in the part that has its first tile.
            has_first = (number != part.first_item) | (part.first_tile == 0)
            total, top, factor = add_sinks(total, top, sink_scores, wanted & has_first)
        factor = gl.where(total > 0.0, factor / gl.where(total > 0.0, total, 1.0), 0.0)
        result = gl.convert_layout(gl.permute(acc * factor[None, :], (1, 0)), wide)  # [ROWS, V]
        wide_here = (wide_query < item.queries) & (wide_group_heads < GROUP)
        if item.splits > 1:
            # Scratch grows with the programs that run at once (`most_partials`): 32 bits are enough for its offsets.
            partial = item.first_partial + gl.where(number == part.first_item, part.first_split, 0)
            wide_places = (partial * QUERIES + wide_query) * Q_HEADS + wide_heads
            rows_of_partial = partials + wide_places * HEAD_MAIN
            gl.store(rows_of_partial[:, None] + wide_columns[None, :], result, mask=wide_here[:, None])
            places = (partial * QUERIES + lane_query) * Q_HEADS + heads
            gl.store(partial_lses + places, lse_of(total, top), mask=here)
            if arrivals is not None:
                thread_barrier()  # all threads' stores before the count
                arrived = arrivals + number * gl.num_programs(0) + gl.program_id(0)
                if gl.atomic_add(arrived, 1, sem="acq_rel") == item.splits - 1:
                    gl.store(arrived, 0)
                    mixed, mixed_lse = mix_partials(
                        partials, partial_lses, item.first_partial, item.splits, wide_query, wide_heads, wide_here,
                        wide_columns, Q_HEADS, QUERIES, HEAD_MAIN,
                    )  # fmt: skip
                    merged_rows = (
                        out
                        + (item.first_query + wide_query).to(gl.int64) * out_token_stride
                        + wide_heads * out_head_stride
                    )
                    numbers = mixed.to(out.dtype.element_ty)
                    gl.store(merged_rows[:, None] + wide_columns[None, :], numbers, mask=wide_here[:, None])
                    if lse is not None:
                        merged_lses = (
                            lse
                            + (item.first_query + wide_query).to(gl.int64) * lse_token_stride
                            + wide_heads * lse_head_stride
                        )
                        gl.store(merged_lses, mixed_lse, mask=wide_here)
        else:
            out_rows = (
                out + (item.first_query + wide_query).to(gl.int64) * out_token_stride + wide_heads * out_head_stride
            )
            numbers = result.to(out.dtype.element_ty)
            gl.store(out_rows[:, None] + wide_columns[None, :], numbers, mask=wide_here[:, None])
            if lse is not None:
                lses = lse + (item.first_query + lane_query).to(gl.int64) * lse_token_stride + heads * lse_head_stride
                gl.store(lses, lse_of(total, top), mask=here)
        item = next_item

    if PADDING:
        # Queries past the last row belong to no item: the parts share them out.
        fill_padding(
            out, lse, padding_start + part_number, tokens, gl.num_programs(1), kv_head, first_group_head,
            out_token_stride, out_head_stride, lse_token_stride, lse_head_stride, GROUP, PACK, ROWS, HEAD_MAIN,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["tokens", "rows", "pages", "table_stride"])
def taut_decode(
    query: gl.tensor,  # [T, Hq, D]
    key: gl.tensor,  # a descriptor of [N, Hk, P, D], boxes [1, 1, BOX, 64]; gathered: the cache [N, P, Hk, D]
    value: gl.tensor,
    out: gl.tensor,  # [T, Hq, V]
    lse: gl.tensor,  # [T, Hq] or None
    partials: gl.tensor,  # [partials, QUERIES, Hq, V] float32
    partial_lses: gl.tensor,  # [partials, QUERIES, Hq] float32
    arrivals: gl.tensor,  # [items, head blocks] int32, zeros before and after, or None where `merge_items` follows
    sinks: gl.tensor,  # [Hq] or None
    slopes: gl.tensor,  # [Hq] or None
    items: gl.tensor,  # the schedule
    parts: gl.tensor,
    query_starts: gl.tensor,  # [R + 1]
    table: gl.tensor,  # [*, pages]
    table_rows: gl.tensor,  # [R], or None
    tokens: gl.tensor,
    rows: gl.tensor,
    pages: gl.tensor,  # N, and so the number of a page that there is not
    scale: gl.tensor,
    soft_cap: gl.tensor,
    left: gl.tensor,
    right: gl.tensor,
    query_token_stride: gl.tensor,
    query_head_stride: gl.tensor,
    key_page_stride: gl.tensor,  # of keys and values in pieces of 8 elements
    key_token_stride: gl.tensor,
    key_head_stride: gl.tensor,
    value_page_stride: gl.tensor,
    value_token_stride: gl.tensor,
    value_head_stride: gl.tensor,
    out_token_stride: gl.tensor,
    out_head_stride: gl.tensor,
    lse_token_stride: gl.tensor,
    lse_head_stride: gl.tensor,
    table_stride: gl.tensor,
    Q_HEADS: gl.constexpr,
    GROUP: gl.constexpr,  # query heads of one key-value head
    PACK: gl.constexpr,  # of them, how many share a program
    QUERIES: gl.constexpr,  # the most queries of an item
    DEPENDENT: gl.constexpr,  # whether the kernel ahead may still run when this one starts
    OVERLAPPED: gl.constexpr,  # whether the merge is launched so that it may start before this kernel has ended
    PADDING: gl.constexpr,  # whether queries past the last row are written here
    CAUSAL: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    HAS_SOFT_CAP: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    BOX: gl.constexpr,  # keys of a box of the copy engine, 0 where the keys are gathered
    ROWS: gl.constexpr,  # at least QUERIES * PACK
    BLOCK_N: gl.constexpr,  # keys of a tile of the ring
    TILE: gl.constexpr,  # keys of a tile of the schedule; BLOCK_N is a multiple of it, and it of BOX
    HEAD_MAIN: gl.constexpr,
    HEAD_TAIL: gl.constexpr,
    STAGES: gl.constexpr,
    LOAD_REGISTERS: gl.constexpr,  # of a thread that loads
) -> None:
    """One program works through one part for the packed heads of one key-value head; see `hopper_launch.decode`."""
    PACKS: gl.constexpr = (GROUP + PACK - 1) // PACK
    LOAD_WARPS: gl.constexpr = 1 if BOX else GATHERING_WARPS
    gl.static_assert(BOX == 0 or TILE % BOX == 0, "a part may begin amid a box")
    kv_head = gl.program_id(0) // PACKS
    first_group_head = gl.program_id(0) % PACKS * PACK
    schedule = Schedule(items, parts)
    part_number = gl.program_id(1)

    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    DTYPE: gl.constexpr = out.dtype.element_ty
    q_smem = gl.allocate_shared_memory(DTYPE, [ROWS, HEAD_MAIN], layout)
    p_smem = gl.allocate_shared_memory(DTYPE, [ROWS, BLOCK_N], layout)
    k_ring = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, HEAD_MAIN], layout)
    v_ring = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, HEAD_MAIN], layout)
    q_tail_smem = q_smem
    k_tail_ring = k_ring
    if HEAD_TAIL:
        q_tail_smem = gl.allocate_shared_memory(DTYPE, [ROWS, HEAD_TAIL], layout)
        k_tail_ring = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, HEAD_TAIL], layout)
    k_full, free, v_full, _ = make_barriers(1, BOX, False, True, STAGES)
    fence_async_shared()
    thread_barrier()

    score_scale = scale_of_scores(scale, soft_cap, HAS_SOFT_CAP)
    cap = soft_cap * LOG2E
    if BOX:
        k_slots = as_boxes(k_ring, BLOCK_N, BOX, HEAD_MAIN, STAGES)
        v_slots = as_boxes(v_ring, BLOCK_N, BOX, HEAD_MAIN, STAGES)
        k_tail_slots = k_slots
        if HEAD_TAIL:
            k_tail_slots = as_boxes(k_tail_ring, BLOCK_N, BOX, HEAD_TAIL, STAGES)
        key_head = key
        value_head = value
    else:
        k_slots = k_ring
        v_slots = v_ring
        k_tail_slots = k_tail_ring
        key_head = key + kv_head.to(gl.int64) * key_head_stride * PIECE
        value_head = value + kv_head.to(gl.int64) * value_head_stride * PIECE
    gl.warp_specialize(
        [
            (attend_part, (
                q_smem, q_tail_smem, p_smem, k_ring, k_tail_ring, v_ring, k_full, v_full, free, query, out,
                lse, partials, partial_lses, arrivals, sinks, slopes, schedule, part_number, query_starts, tokens, rows,
                kv_head, first_group_head, score_scale, cap, left, right, query_token_stride, query_head_stride,
                out_token_stride, out_head_stride, lse_token_stride, lse_head_stride, Q_HEADS, GROUP, PACK, QUERIES,
                OVERLAPPED, PADDING, CAUSAL, HAS_LEFT, HAS_RIGHT, HAS_SOFT_CAP, BOX, ROWS, BLOCK_N, TILE, HEAD_MAIN,
                HEAD_TAIL, STAGES, DEPENDENT,
            )),
            (load_part_of_keys, (
                key_head, value_head, k_slots, k_tail_slots, v_slots, k_full, v_full, free, schedule,
                part_number, table, table_rows, pages, kv_head, left, right, key_page_stride, key_token_stride,
                value_page_stride, value_token_stride, table_stride, CAUSAL, HAS_LEFT, HAS_RIGHT, PAGE_SIZE, BOX,
                BLOCK_N, TILE, HEAD_MAIN, HEAD_TAIL, STAGES, DEPENDENT,
            )),
        ],
        [LOAD_WARPS],
        [LOAD_REGISTERS],
    )  # fmt: skip
