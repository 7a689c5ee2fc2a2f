"""Long extends on Hopper: a block of queries, two or three warpgroups that attend, two warps or four that load.

Those that load fill a ring of shared memory with tiles: one warp brings keys and one values, for the place of a tile's
values is free later than that of its keys, and neither shall wait for the other. (Small pages: four warps gather both.)
Each of the attending warpgroups keeps 64 rows of queries, their scores and their output in registers, and multiplies
from the ring. They go one of two ways. By turns (`attend_in_turns`), two of them:

    keys      K0 K1 K2 ...
    values    V0 V1 V2 ...
    rows 0-63   QK0 | softmax 0 | QK1 PV0 | softmax 1 | QK2 PV1 | softmax 2 | ...
    rows 64-    ... QK0 | softmax 0 | QK1 PV0 | softmax 1 | ...

Within a warpgroup the products of the next tile are under way while the weights of this one are worked out; between
the two a token goes to and fro, so that one multiplies while the other exponentiates (FlashAttention-3, arXiv
2407.08608, section 3.1 and 3.2).

Heads of 64 leave registers free: there the scores run a step of half a tile ahead (`attend_ahead`), so that no softmax
waits for a product that was begun just before, no turns are taken, and a third warpgroup fits:

    each        QK0 | QK1     softmax 0 | QK2 PV0 softmax 1 | QK3 PV1 softmax 2 | ...        (0, 1, 2: steps)

(The deeper pipeline that FlashAttention-3 describes in its appendix B.3, for which whole tiles take too many.) Why each
barrier is right is said where it is made.
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

from taut.common_kernels.gluon_assembly import rescaled, worked_out
from taut.common_kernels.gluon_features import THREAD_BARRIERS, first_of
from taut.common_kernels.paged_attention.hopper_ring import (
    BOX_COLUMNS,
    GATHERING_WARPS,
    PIECE,
    as_boxes,
    gather_half,
    load_half,
    make_barriers,
    reinterpret,
)
from taut.common_kernels.paged_attention.hopper_softmax import (
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

thread_barrier = first_of(gl, THREAD_BARRIERS)


@gluon.jit
def row_of_block(query_starts: gl.tensor, rows: gl.tensor, block: gl.tensor, BLOCK: gl.constexpr) -> gl.tensor:
    """The row whose queries block number `block` holds, and its first block; see `triton_prefill.row_of_block`."""
    low = rows * 0
    high = rows
    while low < high:
        middle = (low + high + 1) // 2
        if gl.load(query_starts + middle) // BLOCK + middle <= block:
            low = middle
        else:
            high = middle - 1
    return low, gl.load(query_starts + low) // BLOCK + low


@gluon.jit
def place_of(program: gl.tensor, packs: gl.tensor, together: gl.tensor, blocks: gl.tensor) -> gl.tensor:
    """Which pack of heads and which block of queries a program serves; see `triton_prefill.place_of`."""
    first = program // (together * blocks) * together
    beside = gl.minimum(together, packs - first)
    place = program - first * blocks
    return first + place % beside, blocks - 1 - place // beside


@gluon.jit
def load_keys(
    start: gl.tensor,
    tiles: gl.tensor,
    key: gl.tensor,
    k_boxes: gl.shared_memory_descriptor,
    k_tail_boxes: gl.shared_memory_descriptor,
    k_full: gl.shared_memory_descriptor,
    k_free: gl.shared_memory_descriptor,
    table_row: gl.tensor,
    dead_page: gl.tensor,
    kv_head: gl.tensor,
    first_place: gl.tensor,
    first_seen: gl.tensor,
    end_seen: gl.tensor,
    PAGED: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BOX: gl.constexpr,
    HEAD_MAIN: gl.constexpr,
    HEAD_TAIL: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """The warp that has the copy engine bring keys; arguments as of `load_half`."""
    for i in range(tiles):
        load_half(
            i, start + i * BLOCK_N, key, k_boxes, k_tail_boxes, k_full.index(i % STAGES), k_free, table_row, dead_page,
            kv_head, first_place, first_seen, end_seen, PAGED, PAGE_SIZE, BLOCK_N, BOX, HEAD_MAIN, HEAD_TAIL, STAGES,
        )  # fmt: skip


@gluon.jit
def load_values(
    start: gl.tensor,
    tiles: gl.tensor,
    value: gl.tensor,
    v_boxes: gl.shared_memory_descriptor,
    v_pieces: gl.shared_memory_descriptor,  # the ring of values as pieces of 8 keys and 64 columns
    v_full: gl.shared_memory_descriptor,
    v_free: gl.shared_memory_descriptor,
    landed: gl.shared_memory_descriptor,  # [1, 1] shared memory: the barrier of values that are still to be cleared
    table_row: gl.tensor,
    dead_page: gl.tensor,
    kv_head: gl.tensor,
    first_place: gl.tensor,
    first_seen: gl.tensor,
    end_seen: gl.tensor,
    length: gl.tensor,
    PAGED: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BOX: gl.constexpr,
    HEAD_MAIN: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """The warp that has the copy engine bring values; arguments as of `load_half`."""
    last = tiles - 1
    for i in range(last):
        load_half(
            i, start + i * BLOCK_N, value, v_boxes, v_boxes, v_full.index(i % STAGES), v_free, table_row, dead_page,
            kv_head, first_place, first_seen, end_seen, PAGED, PAGE_SIZE, BLOCK_N, BOX, HEAD_MAIN, 0, STAGES,
        )  # fmt: skip
    # The last tile alone can reach past the row's keys. What lies there may be NaN, and a weight of zero times NaN is
    # no zero: of its values the others hear when this warp has cleared them.
    slot = last % STAGES
    load_half(
        last, start + last * BLOCK_N, value, v_boxes, v_boxes, landed.index(0), v_free, table_row, dead_page, kv_head,
        first_place, first_seen, end_seen, PAGED, PAGE_SIZE, BLOCK_N, BOX, HEAD_MAIN, 0, STAGES,
    )  # fmt: skip
    mbarrier.wait(landed.index(0), 0)
    clear_dead_values(v_pieces, slot, length - start - last * BLOCK_N, PAGED, BLOCK_N, BOX, HEAD_MAIN)
    fence_async_shared()
    thread_barrier()
    mbarrier.arrive(v_full.index(slot), count=1)


@gluon.jit
def clear_dead_values(
    v_pieces: gl.shared_memory_descriptor,
    slot: gl.tensor,
    alive: gl.tensor,  # keys of the slot's tile that the row has
    PAGED: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BOX: gl.constexpr,
    HEAD_MAIN: gl.constexpr,
) -> None:
    """One warp: zeros for the values of a tile past the row's end.

    Of pages in the box that holds it: those past that one were asked for by a number that there is not, and are zeros
    already. Where keys lie side by side the next row's follow.
    """
    KEYS: gl.constexpr = 8  # of a piece
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    rows = gl.arange(0, KEYS, layout=gl.SliceLayout(1, layout))
    stop = alive * 0 + BLOCK_N
    if PAGED:
        stop = gl.minimum(gl.cdiv(alive, BOX) * BOX, BLOCK_N)
    for piece in range(alive // KEYS, stop // KEYS):
        for block in gl.static_range(HEAD_MAIN // BOX_COLUMNS):
            values = v_pieces.index((slot * (HEAD_MAIN // BOX_COLUMNS) + block) * (BLOCK_N // KEYS) + piece)
            values.store(gl.where((piece * KEYS + rows < alive)[:, None], values.load(layout), 0.0))


@gluon.jit
def gather_tiles(
    start: gl.tensor,
    tiles: gl.tensor,
    key: gl.tensor,
    value: gl.tensor,
    k_ring: gl.shared_memory_descriptor,
    k_tail_ring: gl.shared_memory_descriptor,
    v_ring: gl.shared_memory_descriptor,
    k_full: gl.shared_memory_descriptor,
    k_free: gl.shared_memory_descriptor,
    v_full: gl.shared_memory_descriptor,
    v_free: gl.shared_memory_descriptor,
    table_row: gl.tensor,
    key_page_stride: gl.tensor,
    key_token_stride: gl.tensor,
    value_page_stride: gl.tensor,
    value_token_stride: gl.tensor,
    first_seen: gl.tensor,
    end_seen: gl.tensor,
    PAGE_SIZE: gl.constexpr,
    HEAD_TAIL: gl.constexpr,
    TOGETHER: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """The warps that gather keys and values; arguments as of `gather_half`.

    A tile's keys are asked for ahead of the values of the one before, whose place is free later; unless a slot is free
    together, for then they would wait for each other.
    """
    BLOCK_N: gl.constexpr = k_ring.shape[1]
    LATER: gl.constexpr = 0 if TOGETHER else 1
    for i in range(tiles + LATER):
        if i < tiles:
            gather_half(
                i, start + i * BLOCK_N, key, k_ring, k_tail_ring, k_full, k_free, table_row, key_page_stride,
                key_token_stride, first_seen, end_seen, PAGE_SIZE, HEAD_TAIL, STAGES,
            )  # fmt: skip
        if i >= LATER:
            gather_half(
                i - LATER, start + (i - LATER) * BLOCK_N, value, v_ring, v_ring, v_full, v_free, table_row,
                value_page_stride, value_token_stride, first_seen, end_seen, PAGE_SIZE, 0, STAGES,
            )  # fmt: skip


@gluon.jit
def load_queries(
    rows: gl.shared_memory_descriptor,  # [64, COLUMNS] shared memory
    query: gl.tensor,
    which: gl.constexpr,
    first_head: gl.tensor,
    first_query: gl.tensor,
    query_end: gl.tensor,
    query_token_stride: gl.tensor,
    query_head_stride: gl.tensor,
    PACK: gl.constexpr,
    FIRST_COLUMN: gl.constexpr,
    COLUMNS: gl.constexpr,
) -> None:
    """Some columns of the queries of one warpgroup; zeros where a row of the tile has no query."""
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    lanes = which * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, wide))
    tokens = first_query + lanes // PACK
    here = tokens < query_end
    addresses = query + tokens.to(gl.int64) * query_token_stride + (first_head + lanes % PACK) * query_head_stride
    columns = FIRST_COLUMN + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, wide))
    rows.store(gl.load(addresses[:, None] + columns[None, :], mask=here[:, None], other=0.0))


@gluon.jit
def multiply_keys(
    q_rows: gl.shared_memory_descriptor,
    q_tail_rows: gl.shared_memory_descriptor,
    k_ring: gl.shared_memory_descriptor,
    k_tail_ring: gl.shared_memory_descriptor,
    stage: gl.tensor,
    first: gl.constexpr,
    KEYS: gl.constexpr,
    HEAD_TAIL: gl.constexpr,
) -> gl.tensor:
    """Start the products of a warpgroup's queries and some keys of a slot of the ring; not waited for."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    keys = k_ring.index(stage).slice(first, KEYS, dim=0)
    scores = gl.zeros([64, KEYS], gl.float32, layout=layout)
    scores = warpgroup_mma(q_rows, keys.permute((1, 0)), scores, use_acc=False, is_async=True)
    if HEAD_TAIL:
        keys = k_tail_ring.index(stage).slice(first, KEYS, dim=0)
        scores = warpgroup_mma(q_tail_rows, keys.permute((1, 0)), scores, is_async=True)
    return scores


@gluon.jit
def weigh(
    products: gl.tensor,  # [64, BLOCK_N] float32
    total: gl.tensor,  # [64] sum of weights
    top: gl.tensor,  # [64] maximum of scores, base 2
    tile: gl.tensor,  # the position of its first key
    positions: gl.tensor,
    length: gl.tensor,
    row_slopes: gl.tensor,
    left: gl.tensor,
    right: gl.tensor,
    score_scale: gl.tensor,
    cap: gl.tensor,
    MASKED: gl.constexpr,
    CAUSAL: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    HAS_SOFT_CAP: gl.constexpr,
    HAS_SLOPES: gl.constexpr,
    BLOCK_N: gl.constexpr,
) -> gl.tensor:
    """The weights of a tile, and of the online softmax the new sum, the new maximum, and what decays the old output."""
    scores = products
    keys = tile + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, products.type.layout))
    if HAS_SOFT_CAP:
        scores = cap_scores(scores, score_scale, cap)
    elif HAS_SLOPES:
        scores = scores * score_scale
    if HAS_SLOPES:
        scores += row_slopes[:, None] * (keys[None, :] - positions[:, None]).to(gl.float32)
    if MASKED:
        seen = sees(keys[None, :], positions[:, None], length, left, right, CAUSAL, HAS_LEFT, HAS_RIGHT)
        scores = gl.where(seen, scores, float("-inf"))
    tops = gl.max(scores, 1)
    if HAS_SOFT_CAP or HAS_SLOPES:
        new_top = gl.maximum(top, tops)
        weights = gl.exp2(scores - new_top[:, None])
    else:
        # The scale is positive: it is folded into one multiply-add with the subtraction.
        new_top = gl.maximum(top, tops * score_scale)
        weights = gl.exp2(scores * score_scale - new_top[:, None])
    decay = gl.exp2(top - new_top)
    return weights, total * decay + gl.sum(weights, 1), new_top, decay


@gluon.jit
def attend_tile(
    i: gl.tensor,  # the number of the tile, from 1 on
    acc: gl.tensor,
    total: gl.tensor,
    top: gl.tensor,
    p: gl.tensor,  # the weights of the tile before, as the left operand of a product
    which: gl.constexpr,
    q_rows: gl.shared_memory_descriptor,
    q_tail_rows: gl.shared_memory_descriptor,
    k_ring: gl.shared_memory_descriptor,
    k_tail_ring: gl.shared_memory_descriptor,
    v_ring: gl.shared_memory_descriptor,
    k_full: gl.shared_memory_descriptor,
    k_free: gl.shared_memory_descriptor,
    v_full: gl.shared_memory_descriptor,
    v_free: gl.shared_memory_descriptor,
    turns: gl.shared_memory_descriptor,
    start: gl.tensor,
    positions: gl.tensor,
    length: gl.tensor,
    row_slopes: gl.tensor,
    left: gl.tensor,
    right: gl.tensor,
    score_scale: gl.tensor,
    cap: gl.tensor,
    MASKED: gl.constexpr,
    CAUSAL: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    HAS_SOFT_CAP: gl.constexpr,
    HAS_SLOPES: gl.constexpr,
    BOX: gl.constexpr,
    BLOCK_N: gl.constexpr,
    HEAD_TAIL: gl.constexpr,
    STAGES: gl.constexpr,
) -> gl.tensor:
    """Scores and weights of tile i, and meanwhile the output of tile i - 1: returns acc, total, top, p."""
    stage = i % STAGES
    before = (i - 1) % STAGES
    mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
    mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
    if not BOX:
        fence_async_shared()
    # Barrier `turns[w]` takes one arrival a tile, from the other warpgroup when it has issued its products. The first
    # warpgroup begins, so its wait for tile i is for the arrival of tile i - 1; the second's is for that of tile i.
    mbarrier.wait(turns.index(which), (i & 1) ^ (which ^ 1))
    scores = multiply_keys(q_rows, q_tail_rows, k_ring, k_tail_ring, stage, 0, BLOCK_N, HEAD_TAIL)
    acc = warpgroup_mma(p, v_ring.index(before), acc, is_async=True)
    mbarrier.arrive(turns.index(which ^ 1), count=1)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(k_free.index(stage), count=1)
    weights, total, top, decay = weigh(
        scores, total, top, start + i * BLOCK_N, positions, length, row_slopes, left, right, score_scale, cap,
        MASKED, CAUSAL, HAS_LEFT, HAS_RIGHT, HAS_SOFT_CAP, HAS_SLOPES, BLOCK_N,
    )  # fmt: skip
    next_p = gl.convert_layout(weights.to(p.dtype), p.type.layout)
    total = worked_out(total)
    acc, _ = warpgroup_mma_wait(0, deps=[acc, p])  # the old weights are read until the product is done
    mbarrier.arrive(v_free.index(before), count=1)
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, acc.type.layout))[:, None]
    return acc, total, top, next_p


@gluon.jit
def attend_in_turns(
    which: gl.constexpr,
    q_rows: gl.shared_memory_descriptor,
    q_tail_rows: gl.shared_memory_descriptor,
    k_ring: gl.shared_memory_descriptor,
    k_tail_ring: gl.shared_memory_descriptor,
    v_ring: gl.shared_memory_descriptor,
    k_full: gl.shared_memory_descriptor,
    k_free: gl.shared_memory_descriptor,
    v_full: gl.shared_memory_descriptor,
    v_free: gl.shared_memory_descriptor,
    turns: gl.shared_memory_descriptor,
    start: gl.tensor,
    tiles: gl.tensor,
    common_start: gl.tensor,
    common_end: gl.tensor,
    positions: gl.tensor,
    length: gl.tensor,
    row_slopes: gl.tensor,
    left: gl.tensor,
    right: gl.tensor,
    score_scale: gl.tensor,
    cap: gl.tensor,
    CAUSAL: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    HAS_SOFT_CAP: gl.constexpr,
    HAS_SLOPES: gl.constexpr,
    BOX: gl.constexpr,
    BLOCK_N: gl.constexpr,
    HEAD_TAIL: gl.constexpr,
    STAGES: gl.constexpr,
) -> gl.tensor:
    """All tiles, the two warpgroups by turns: returns the output, its last product under way, and total and top."""
    HEAD_MAIN: gl.constexpr = q_rows.shape[1]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_MAIN, 16])
    acc = gl.zeros([64, HEAD_MAIN], gl.float32, layout=o_layout)
    total = gl.zeros([64], gl.float32, layout=gl.SliceLayout(1, s_layout))
    top = gl.full([64], LOWEST, gl.float32, layout=gl.SliceLayout(1, s_layout))

    # The first tile has no values of a tile before it to multiply; it is masked whatever it is.
    mbarrier.wait(k_full.index(0), 0)
    if not BOX:
        fence_async_shared()
    mbarrier.wait(turns.index(which), which ^ 1)
    scores = multiply_keys(q_rows, q_tail_rows, k_ring, k_tail_ring, 0, 0, BLOCK_N, HEAD_TAIL)
    mbarrier.arrive(turns.index(which ^ 1), count=1)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_free.index(0), count=1)
    weights, total, top, _ = weigh(
        scores, total, top, start, positions, length, row_slopes, left, right, score_scale, cap,
        True, CAUSAL, HAS_LEFT, HAS_RIGHT, HAS_SOFT_CAP, HAS_SLOPES, BLOCK_N,
    )  # fmt: skip
    p = gl.convert_layout(weights.to(q_rows.dtype), gl.DotOperandLayout(0, o_layout, 2))
    if HAS_LEFT:
        for i in range(1, common_start):
            acc, total, top, p = attend_tile(
                i, acc, total, top, p, which, q_rows, q_tail_rows, k_ring, k_tail_ring, v_ring, k_full, k_free, v_full,
                v_free, turns, start, positions, length, row_slopes, left, right, score_scale, cap,
                True, CAUSAL, HAS_LEFT, HAS_RIGHT, HAS_SOFT_CAP, HAS_SLOPES, BOX, BLOCK_N, HEAD_TAIL, STAGES,
            )  # fmt: skip
    for i in range(gl.maximum(common_start, 1), common_end):
        acc, total, top, p = attend_tile(
            i, acc, total, top, p, which, q_rows, q_tail_rows, k_ring, k_tail_ring, v_ring, k_full, k_free, v_full,
            v_free, turns, start, positions, length, row_slopes, left, right, score_scale, cap,
            False, CAUSAL, HAS_LEFT, HAS_RIGHT, HAS_SOFT_CAP, HAS_SLOPES, BOX, BLOCK_N, HEAD_TAIL, STAGES,
        )  # fmt: skip
    for i in range(gl.maximum(common_end, 1), tiles):
        acc, total, top, p = attend_tile(
            i, acc, total, top, p, which, q_rows, q_tail_rows, k_ring, k_tail_ring, v_ring, k_full, k_free, v_full,
            v_free, turns, start, positions, length, row_slopes, left, right, score_scale, cap,
            True, CAUSAL, HAS_LEFT, HAS_RIGHT, HAS_SOFT_CAP, HAS_SLOPES, BOX, BLOCK_N, HEAD_TAIL, STAGES,
        )  # fmt: skip

    last = tiles - 1
    mbarrier.wait(v_full.index(last % STAGES), (last // STAGES) & 1)
    if not BOX:
        fence_async_shared()
    acc = warpgroup_mma(p, v_ring.index(last % STAGES), acc, is_async=True)
    return acc, total, top


@gluon.jit
def attend_tile_ahead(
    i: gl.tensor,  # the number of the tile
    last: gl.tensor,  # the number of the last one
    acc: gl.tensor,  # the output, the product of the step before under way
    total: gl.tensor,
    top: gl.tensor,
    scores: gl.tensor,  # of the tile's first step
    q_rows: gl.shared_memory_descriptor,
    k_ring: gl.shared_memory_descriptor,
    v_ring: gl.shared_memory_descriptor,
    full: gl.shared_memory_descriptor,
    free: gl.shared_memory_descriptor,
    start: gl.tensor,
    positions: gl.tensor,
    length: gl.tensor,
    row_slopes: gl.tensor,
    left: gl.tensor,
    right: gl.tensor,
    score_scale: gl.tensor,
    cap: gl.tensor,
    FIRST: gl.constexpr,  # whether it is the first tile, ahead of which there is no output
    MASKED: gl.constexpr,
    CAUSAL: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    HAS_SOFT_CAP: gl.constexpr,
    HAS_SLOPES: gl.constexpr,
    BOX: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
) -> gl.tensor:
    """The weights of tile i in two steps, and under each the output of the step before and the scores of the next.

    Returns acc, total, top and the scores of the next tile's first step.
    """
    KEYS: gl.constexpr = BLOCK_N // 2  # of a step
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, q_rows.shape[1], 16])
    for step in gl.static_range(2):
        # After the last step there is none. Its first one is multiplied again, for nothing: the keys still lie there.
        following = gl.minimum(i + step, last)
        if step == 1:
            mbarrier.wait(full.index(following % STAGES), (following // STAGES) & 1)
            if not BOX:
                fence_async_shared()
        next_scores = multiply_keys(q_rows, q_rows, k_ring, k_ring, following % STAGES, (1 - step) * KEYS, KEYS, 0)
        weights, total, top, decay = weigh(
            scores, total, top, start + i * BLOCK_N + step * KEYS, positions, length, row_slopes, left, right,
            score_scale, cap, MASKED, CAUSAL, HAS_LEFT, HAS_RIGHT, HAS_SOFT_CAP, HAS_SLOPES, KEYS,
        )  # fmt: skip
        p = gl.convert_layout(weights.to(q_rows.dtype), gl.DotOperandLayout(0, o_layout, 2))
        total = worked_out(total)
        if FIRST and step == 0:
            scores = warpgroup_mma_wait(0, deps=[next_scores])
        else:
            # The weights that the product of `acc` reads are not named: over the loop's edge they would be copied. The
            # assembler, which knows what reads them, gives their registers to nobody before this wait.
            scores, acc = warpgroup_mma_wait(0, deps=[next_scores, acc])
        if step == 0 and not FIRST:
            mbarrier.arrive(free.index((i - 1) % STAGES), count=1)
        acc = rescaled(acc, gl.convert_layout(decay, gl.SliceLayout(1, o_layout))[:, None])
        acc = warpgroup_mma(p, v_ring.index(i % STAGES).slice(step * KEYS, KEYS, dim=0), acc, is_async=True)
    return acc, total, top, scores


@gluon.jit
def attend_ahead(
    q_rows: gl.shared_memory_descriptor,
    k_ring: gl.shared_memory_descriptor,
    v_ring: gl.shared_memory_descriptor,
    full: gl.shared_memory_descriptor,
    free: gl.shared_memory_descriptor,
    start: gl.tensor,
    tiles: gl.tensor,
    common_start: gl.tensor,
    common_end: gl.tensor,
    positions: gl.tensor,
    length: gl.tensor,
    row_slopes: gl.tensor,
    left: gl.tensor,
    right: gl.tensor,
    score_scale: gl.tensor,
    cap: gl.tensor,
    CAUSAL: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    HAS_SOFT_CAP: gl.constexpr,
    HAS_SLOPES: gl.constexpr,
    BOX: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
) -> gl.tensor:
    """All tiles, in steps of half a tile, scores a step ahead; returns as `attend_in_turns`."""
    HEAD_MAIN: gl.constexpr = q_rows.shape[1]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N // 2, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_MAIN, 16])
    acc = gl.zeros([64, HEAD_MAIN], gl.float32, layout=o_layout)
    total = gl.zeros([64], gl.float32, layout=gl.SliceLayout(1, s_layout))
    top = gl.full([64], LOWEST, gl.float32, layout=gl.SliceLayout(1, s_layout))

    mbarrier.wait(full.index(0), 0)
    if not BOX:
        fence_async_shared()
    scores = multiply_keys(q_rows, q_rows, k_ring, k_ring, 0, 0, BLOCK_N // 2, 0)
    scores = warpgroup_mma_wait(0, deps=[scores])
    last = tiles - 1
    acc, total, top, scores = attend_tile_ahead(
        tiles * 0, last, acc, total, top, scores, q_rows, k_ring, v_ring, full, free, start, positions, length,
        row_slopes, left, right, score_scale, cap, True, True, CAUSAL, HAS_LEFT, HAS_RIGHT, HAS_SOFT_CAP,
        HAS_SLOPES, BOX, BLOCK_N, STAGES,
    )  # fmt: skip
    if HAS_LEFT:
        for i in range(1, common_start):
            acc, total, top, scores = attend_tile_ahead(
                i, last, acc, total, top, scores, q_rows, k_ring, v_ring, full, free, start, positions, length,
                row_slopes, left, right, score_scale, cap, False, True, CAUSAL, HAS_LEFT, HAS_RIGHT, HAS_SOFT_CAP,
                HAS_SLOPES, BOX, BLOCK_N, STAGES,
            )  # fmt: skip
    for i in range(gl.maximum(common_start, 1), common_end):
        acc, total, top, scores = attend_tile_ahead(
            i, last, acc, total, top, scores, q_rows, k_ring, v_ring, full, free, start, positions, length,
            row_slopes, left, right, score_scale, cap, False, False, CAUSAL, HAS_LEFT, HAS_RIGHT, HAS_SOFT_CAP,
            HAS_SLOPES, BOX, BLOCK_N, STAGES,
        )  # fmt: skip
    for i in range(gl.maximum(common_end, 1), tiles):
        acc, total, top, scores = attend_tile_ahead(
            i, last, acc, total, top, scores, q_rows, k_ring, v_ring, full, free, start, positions, length,
            row_slopes, left, right, score_scale, cap, False, True, CAUSAL, HAS_LEFT, HAS_RIGHT, HAS_SOFT_CAP,
            HAS_SLOPES, BOX, BLOCK_N, STAGES,
        )  # fmt: skip
    return acc, total, top


@gluon.jit
def attend(
    which: gl.constexpr,  # of the warpgroups
    q: gl.shared_memory_descriptor,  # [WARPGROUPS, 64, HEAD_MAIN] shared memory
    q_tail: gl.shared_memory_descriptor,  # [WARPGROUPS, 64, HEAD_TAIL]
    k_ring: gl.shared_memory_descriptor,  # [STAGES, BLOCK_N, HEAD_MAIN]
    k_tail_ring: gl.shared_memory_descriptor,
    v_ring: gl.shared_memory_descriptor,  # [STAGES, BLOCK_N, HEAD_MAIN]
    k_full: gl.shared_memory_descriptor,
    k_free: gl.shared_memory_descriptor,
    v_full: gl.shared_memory_descriptor,
    v_free: gl.shared_memory_descriptor,
    turns: gl.shared_memory_descriptor,
    query: gl.tensor,
    out: gl.tensor,
    lse: gl.tensor,
    sinks: gl.tensor,
    slopes: gl.tensor,
    first_head: gl.tensor,
    first_query: gl.tensor,
    query_end: gl.tensor,
    first_position: gl.tensor,
    length: gl.tensor,
    start: gl.tensor,
    tiles: gl.tensor,
    common_start: gl.tensor,  # tiles in which every query sees every key
    common_end: gl.tensor,
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
    PACK: gl.constexpr,
    CAUSAL: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    HAS_SOFT_CAP: gl.constexpr,
    BOX: gl.constexpr,
    BLOCK_N: gl.constexpr,
    HEAD_MAIN: gl.constexpr,
    HEAD_TAIL: gl.constexpr,
    AHEAD: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """One warpgroup: 64 rows of queries against all tiles, and their output."""
    ROWS: gl.constexpr = 64
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N // 2 if AHEAD else BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_MAIN, 16])
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    HAS_SLOPES: gl.constexpr = slopes is not None

    q_rows = q.index(which)
    load_queries(
        q_rows, query, which, first_head, first_query, query_end, query_token_stride,
        query_head_stride, PACK, 0, HEAD_MAIN,
    )  # fmt: skip
    q_tail_rows = q_rows
    if HEAD_TAIL:
        q_tail_rows = q_tail.index(which)
        load_queries(
            q_tail_rows, query, which, first_head, first_query, query_end, query_token_stride,
            query_head_stride, PACK, HEAD_MAIN, HEAD_TAIL,
        )  # fmt: skip
    fence_async_shared()
    thread_barrier()  # every thread's rows are there before the first product reads them

    lanes = which * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
    positions = first_position + lanes // PACK
    row_slopes = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, s_layout))
    if HAS_SLOPES:
        row_slopes = gl.load(slopes + first_head + lanes % PACK) * LOG2E

    if AHEAD:
        acc, total, top = attend_ahead(
            q_rows, k_ring, v_ring, k_full, k_free, start, tiles, common_start, common_end, positions, length,
            row_slopes, left, right, score_scale, cap, CAUSAL, HAS_LEFT, HAS_RIGHT, HAS_SOFT_CAP, HAS_SLOPES, BOX,
            BLOCK_N, STAGES,
        )  # fmt: skip
    else:
        acc, total, top = attend_in_turns(
            which, q_rows, q_tail_rows, k_ring, k_tail_ring, v_ring, k_full, k_free, v_full, v_free, turns, start,
            tiles, common_start, common_end, positions, length, row_slopes, left, right, score_scale, cap, CAUSAL,
            HAS_LEFT, HAS_RIGHT, HAS_SOFT_CAP, HAS_SLOPES, BOX, BLOCK_N, HEAD_TAIL, STAGES,
        )  # fmt: skip

    factor = gl.full([ROWS], 1.0, gl.float32, layout=gl.SliceLayout(1, s_layout))
    heads = first_head + lanes % PACK
    query_tokens = first_query + lanes // PACK
    ours = query_tokens < query_end
    if sinks is not None:
        sink_scores = gl.load(sinks + heads, mask=ours, other=0.0).to(gl.float32)
        wanted = sees_any(positions, length, left, right, CAUSAL, HAS_LEFT, HAS_RIGHT)
        total, top, factor = add_sinks(total, top, sink_scores, wanted)
    factor = gl.where(total > 0.0, factor / gl.where(total > 0.0, total, 1.0), 0.0)
    if lse is not None:
        lses = lse + query_tokens.to(gl.int64) * lse_token_stride + heads * lse_head_stride
        gl.store(lses, lse_of(total, top), mask=ours)
    factor = gl.convert_layout(factor, gl.SliceLayout(1, o_layout))
    acc = warpgroup_mma_wait(0, deps=[acc])

    # The output goes through the queries' shared memory, which this warpgroup alone has read, into whole lines.
    q_rows.store((acc * factor[:, None]).to(q.dtype))
    thread_barrier()
    wide_lanes = which * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, wide))
    wide_tokens = first_query + wide_lanes // PACK
    out_rows = out + wide_tokens.to(gl.int64) * out_token_stride + (first_head + wide_lanes % PACK) * out_head_stride
    columns = gl.arange(0, HEAD_MAIN, layout=gl.SliceLayout(0, wide))
    gl.store(out_rows[:, None] + columns[None, :], q_rows.load(wide), mask=(wide_tokens < query_end)[:, None])


@gluon.jit
def attend_as(
    which: gl.constexpr,
    others: gl.tuple,
    PACK: gl.constexpr,
    CAUSAL: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    HAS_SOFT_CAP: gl.constexpr,
    BOX: gl.constexpr,
    BLOCK_N: gl.constexpr,
    HEAD_MAIN: gl.constexpr,
    HEAD_TAIL: gl.constexpr,
    AHEAD: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """`attend` as one of the warpgroups."""
    attend(
        which, *others, PACK, CAUSAL, HAS_LEFT, HAS_RIGHT, HAS_SOFT_CAP, BOX, BLOCK_N, HEAD_MAIN, HEAD_TAIL, AHEAD,
        STAGES,
    )  # fmt: skip


@gluon.jit(
    do_not_specialize=[
        "tokens",
        "rows",
        "packs",
        "together",
        "pages",
        "table_stride",
        "lse_token_stride",
        "lse_head_stride",
    ],
    do_not_specialize_on_alignment=["lengths"],  # a chunk's begin anywhere in a table of all chunks
)
def taut_prefill(
    query: gl.tensor,  # [T, Hq, D]
    key: gl.tensor,  # [N, P, Hk, D] if gathered, else a descriptor of [N, Hk, P, D]; contiguous: of [1, Hk, K, D]
    value: gl.tensor,
    out: gl.tensor,  # [T, Hq, V]
    lse: gl.tensor,  # [T, Hq] or None
    sinks: gl.tensor,  # [Hq] or None
    slopes: gl.tensor,  # [Hq] or None
    query_starts: gl.tensor,  # [R + 1]
    lengths: gl.tensor,  # [R]; contiguous: key_starts [R + 1]
    table: gl.tensor,  # [*, pages], or None
    table_rows: gl.tensor,  # [R], or None
    tokens: gl.tensor,
    rows: gl.tensor,
    packs: gl.tensor,  # packs of heads
    together: gl.tensor,  # of them, how many run side by side
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
    GROUP: gl.constexpr,  # query heads of one key-value head
    PACK: gl.constexpr,  # of them, how many share a program; a power of two that divides GROUP
    MORE_THAN: gl.constexpr,  # rows with no more queries than this are left to another kernel
    CAUSAL: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    HAS_SOFT_CAP: gl.constexpr,
    PAGED: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    BOX: gl.constexpr,  # keys of a box of the copy engine, 0 where the keys are gathered
    BLOCK_N: gl.constexpr,
    HEAD_MAIN: gl.constexpr,
    HEAD_TAIL: gl.constexpr,
    WARPGROUPS: gl.constexpr,  # that attend, of 64 rows each; two, or where scores run ahead three
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,  # of a thread that attends
    LOAD_REGISTERS: gl.constexpr,  # of a thread that loads
) -> None:
    """One program attends for one block of queries of a row and PACK of its heads; see `hopper_launch.prefill`."""
    AHEAD: gl.constexpr = HEAD_MAIN == 64
    gl.static_assert(WARPGROUPS == 2 or AHEAD, "three warpgroups cannot attend by turns")
    BLOCK_M: gl.constexpr = 64 * WARPGROUPS
    QUERIES: gl.constexpr = BLOCK_M // PACK
    PACKS: gl.constexpr = GROUP // PACK
    pack, block = place_of(gl.program_id(0), packs, together, gl.num_programs(0) // packs)
    kv_head = pack // PACKS
    first_head = kv_head * GROUP + pack % PACKS * PACK
    row, first_block = row_of_block(query_starts, rows, block, QUERIES)
    row_start = gl.load(query_starts + row)
    row_end = tokens
    length = tokens * 0
    first_place = tokens * 0
    if row < rows:
        row_end = gl.load(query_starts + row + 1)
        length = gl.load(lengths + row)
        if not PAGED:
            first_place = length
            length = gl.load(lengths + row + 1) - length
    first_query = row_start + (block - first_block) * QUERIES
    if first_query >= row_end:
        return
    if (row < rows) & (row_end - row_start <= MORE_THAN):
        return
    first_position = length - (row_end - first_query)
    queries = gl.minimum(row_end - first_query, QUERIES)
    table_row = query_starts  # of no meaning without a table
    if PAGED:
        table_row = table
        if row < rows:
            if table_rows is None:
                table_row = table + row.to(gl.int64) * table_stride
            else:
                table_row = table + gl.load(table_rows + row).to(gl.int64) * table_stride

    first_seen, end_seen, first_common, end_common = query_range(
        first_position, queries, length, left, right, CAUSAL, HAS_LEFT, HAS_RIGHT
    )
    # Tiles: some keys hidden from some query (only with a window), then all seen by all, then some hidden again. At
    # least one, in which nothing may be seen: then what is written is what a row without keys gets.
    start = first_seen // BLOCK_N * BLOCK_N
    tiles = gl.maximum(gl.cdiv(end_seen - start, BLOCK_N), 1)
    common_start = gl.cdiv(first_common - start, BLOCK_N)
    common_end = gl.maximum(end_common // BLOCK_N - start // BLOCK_N, common_start)
    common_start = gl.minimum(common_start, tiles)
    common_end = gl.minimum(common_end, tiles)

    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    DTYPE: gl.constexpr = out.dtype.element_ty
    q = gl.allocate_shared_memory(DTYPE, [WARPGROUPS, 64, HEAD_MAIN], layout)
    k_ring = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, HEAD_MAIN], layout)
    v_ring = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, HEAD_MAIN], layout)
    q_tail = q
    k_tail_ring = k_ring
    if HEAD_TAIL:
        q_tail = gl.allocate_shared_memory(DTYPE, [WARPGROUPS, 64, HEAD_TAIL], layout)
        k_tail_ring = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, HEAD_TAIL], layout)
    k_full, k_free, v_full, v_free = make_barriers(WARPGROUPS, BOX, AHEAD, AHEAD, STAGES)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for warpgroup in gl.static_range(2):
        mbarrier.init(turns.index(warpgroup), count=1)
    landed = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(landed.index(0), count=1)
    fence_async_shared()
    thread_barrier()

    score_scale = scale_of_scores(scale, soft_cap, HAS_SOFT_CAP)
    cap = soft_cap * LOG2E
    attends = (
        q, q_tail, k_ring, k_tail_ring, v_ring, k_full, k_free, v_full, v_free, turns, query, out, lse, sinks, slopes,
        first_head, first_query, row_end, first_position, length, start, tiles, common_start, common_end,
        score_scale, cap, left, right, query_token_stride, query_head_stride, out_token_stride, out_head_stride,
        lse_token_stride, lse_head_stride,
    )  # fmt: skip
    if BOX:
        k_boxes = as_boxes(k_ring, BLOCK_N, BOX, HEAD_MAIN, STAGES)
        v_boxes = as_boxes(v_ring, BLOCK_N, BOX, HEAD_MAIN, STAGES)
        k_tail_boxes = k_boxes
        if HEAD_TAIL:
            k_tail_boxes = as_boxes(k_tail_ring, BLOCK_N, BOX, HEAD_TAIL, STAGES)
        PIECES: gl.constexpr = STAGES * (HEAD_MAIN // BOX_COLUMNS) * (BLOCK_N // 8)
        v_pieces = reinterpret(v_ring, DTYPE, [PIECES, 8, BOX_COLUMNS], layout)
        if WARPGROUPS == 3:
            gl.warp_specialize(
                [
                    (attend_as, (
                        0, attends, PACK, CAUSAL, HAS_LEFT, HAS_RIGHT, HAS_SOFT_CAP, BOX, BLOCK_N, HEAD_MAIN,
                        HEAD_TAIL, AHEAD, STAGES,
                    )),
                    (attend_as, (
                        1, attends, PACK, CAUSAL, HAS_LEFT, HAS_RIGHT, HAS_SOFT_CAP, BOX, BLOCK_N, HEAD_MAIN,
                        HEAD_TAIL, AHEAD, STAGES,
                    )),
                    (attend_as, (
                        2, attends, PACK, CAUSAL, HAS_LEFT, HAS_RIGHT, HAS_SOFT_CAP, BOX, BLOCK_N, HEAD_MAIN,
                        HEAD_TAIL, AHEAD, STAGES,
                    )),
                    (load_keys, (
                        start, tiles, key, k_boxes, k_tail_boxes, k_full, k_free, table_row, pages, kv_head,
                        first_place, first_seen, end_seen, PAGED, PAGE_SIZE, BLOCK_N, BOX, HEAD_MAIN, HEAD_TAIL,
                        STAGES,
                    )),
                    (load_values, (
                        start, tiles, value, v_boxes, v_pieces, v_full, v_free, landed, table_row, pages, kv_head,
                        first_place, first_seen, end_seen, length, PAGED, PAGE_SIZE, BLOCK_N, BOX, HEAD_MAIN, STAGES,
                    )),
                ],
                [4, 4, 1, 1],
                [REGISTERS, REGISTERS, LOAD_REGISTERS, LOAD_REGISTERS],
            )  # fmt: skip
        else:
            gl.warp_specialize(
                [
                    (attend_as, (
                        0, attends, PACK, CAUSAL, HAS_LEFT, HAS_RIGHT, HAS_SOFT_CAP, BOX, BLOCK_N, HEAD_MAIN,
                        HEAD_TAIL, AHEAD, STAGES,
                    )),
                    (attend_as, (
                        1, attends, PACK, CAUSAL, HAS_LEFT, HAS_RIGHT, HAS_SOFT_CAP, BOX, BLOCK_N, HEAD_MAIN,
                        HEAD_TAIL, AHEAD, STAGES,
                    )),
                    (load_keys, (
                        start, tiles, key, k_boxes, k_tail_boxes, k_full, k_free, table_row, pages, kv_head,
                        first_place, first_seen, end_seen, PAGED, PAGE_SIZE, BLOCK_N, BOX, HEAD_MAIN, HEAD_TAIL,
                        STAGES,
                    )),
                    (load_values, (
                        start, tiles, value, v_boxes, v_pieces, v_full, v_free, landed, table_row, pages, kv_head,
                        first_place, first_seen, end_seen, length, PAGED, PAGE_SIZE, BLOCK_N, BOX, HEAD_MAIN, STAGES,
                    )),
                ],
                [4, 1, 1],
                [REGISTERS, LOAD_REGISTERS, LOAD_REGISTERS],
            )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (attend_as, (
                    0, attends, PACK, CAUSAL, HAS_LEFT, HAS_RIGHT, HAS_SOFT_CAP, BOX, BLOCK_N, HEAD_MAIN,
                    HEAD_TAIL, AHEAD, STAGES,
                )),
                (attend_as, (
                    1, attends, PACK, CAUSAL, HAS_LEFT, HAS_RIGHT, HAS_SOFT_CAP, BOX, BLOCK_N, HEAD_MAIN,
                    HEAD_TAIL, AHEAD, STAGES,
                )),
                (gather_tiles, (
                    start, tiles, key + kv_head.to(gl.int64) * key_head_stride * PIECE,
                    value + kv_head.to(gl.int64) * value_head_stride * PIECE, k_ring, k_tail_ring, v_ring, k_full,
                    k_free, v_full, v_free, table_row, key_page_stride, key_token_stride, value_page_stride,
                    value_token_stride, first_seen, end_seen, PAGE_SIZE, HEAD_TAIL, AHEAD, STAGES,
                )),
            ],
            [4, GATHERING_WARPS],
            [REGISTERS, LOAD_REGISTERS],
        )  # fmt: skip
