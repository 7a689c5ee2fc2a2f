"""`mla_decode` on Hopper for few rows: 8, 16 or 32 heads times queries a program, and tiles shared out in turn.

The products are turned round, scores [keys, rows] and result [columns, rows], since a matrix instruction is 64 long on
one axis and as short as 8 on the other; FlashMLA-ETAP (arXiv 2506.01969) describes the idea. The result is small enough
for one warpgroup, so each works on every other tile by itself, with a maximum of its own, and they add up what they
have at the end of an item. A half of a stage is `empty` when the warpgroup that works on its tile has done with it.
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

from taut.common_kernels.aggregates import aggregates_of
from taut.common_kernels.mla_decode.hopper_queries import Block, Queries, anew, load_queries
from taut.common_kernels.mla_decode.hopper_results import Results, fill_padding, partial_of, store_result
from taut.common_kernels.mla_decode.hopper_ring import (
    BLOCK_N,
    HALF,
    Ring,
    clear_past,
    stage_of,
    thread_barrier,
    tiles_between,
    wait_for_keys,
)
from taut.common_kernels.mla_decode.hopper_softmax import (
    LN2,
    Scoring,
    Weighing,
    base_of,
    hide_unseen,
    scales_of,
    weighing_of,
)
from taut.common_kernels.schedule.hopper_items import (
    Schedule,
    load_first_item,
    load_item,
    load_part,
    wait_for_kernel_ahead,
)


@aggregates_of(gl, gluon)
class Exchange:
    """Where weights lie, and what the two warpgroups tell each other at the end of an item.

    Attributes:
        weights: shared memory [2, BLOCK_M, BLOCK_N], of each warpgroup, which alone reads them.
        row_maxes: shared memory [4, BLOCK_M], of even and odd items, of each warpgroup. Who writes there for the item
            after next has passed `totalled` for the next one, at which the other arrived after it had read.
        row_sums: likewise.
        totalled: barrier: two arrivals an item, one of each warpgroup, when it has done all tiles. No queries of the
            item are read any more.
        half: shared memory [HALF, BLOCK_M], one place for both ways in turn: warpgroup 1 gives its left half, 0 takes
            it and gives its right half. 1 takes that before it gives again.
        left_given: barrier, one arrival an item.
        right_given: barrier, one arrival an item.
    """

    weights: gl.shared_memory_descriptor
    row_maxes: gl.shared_memory_descriptor
    row_sums: gl.shared_memory_descriptor
    totalled: gl.shared_memory_descriptor
    half: gl.shared_memory_descriptor
    left_given: gl.shared_memory_descriptor
    right_given: gl.shared_memory_descriptor


@aggregates_of(gl, gluon)
class Sums:
    """What a warpgroup has of an item so far.

    Attributes:
        left: [HALF, BLOCK_M] values times weights, the left half of their columns.
        right: the right half.
        row_max: [BLOCK_M] the largest score.
        weights: [BLOCK_N, BLOCK_M] of each key's place in a tile; added up over the keys at the end.
    """

    left: gl.tensor
    right: gl.tensor
    row_max: gl.tensor
    weights: gl.tensor


@gluon.jit
def make_few_exchange(BLOCK_M: gl.constexpr, DTYPE: gl.constexpr) -> Exchange:
    """An exchange in shared memory."""
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    VECTOR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    TURNED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0, 1])
    exchange = Exchange(
        weights=gl.allocate_shared_memory(DTYPE, [2, BLOCK_M, BLOCK_N], TILE),
        row_sums=gl.allocate_shared_memory(gl.float32, [4, BLOCK_M], VECTOR),
        row_maxes=gl.allocate_shared_memory(gl.float32, [4, BLOCK_M], VECTOR),
        totalled=gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
        half=gl.allocate_shared_memory(gl.float32, [HALF, BLOCK_M], TURNED),
        left_given=gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
        right_given=gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
    )
    mbarrier.init(exchange.totalled, count=2)
    mbarrier.init(exchange.left_given, count=1)
    mbarrier.init(exchange.right_given, count=1)
    return exchange


@gluon.jit
def attend_few(
    schedule: Schedule,
    block: Block,
    queries: Queries,
    ring: Ring,
    scoring: Scoring,
    exchange: Exchange,
    results: Results,
    WARPGROUP: gl.constexpr,
    EARLY: gl.constexpr,
) -> None:
    """One of the two warpgroups that compute, each on every other tile by itself; then they add up what they have."""
    if EARLY:
        wait_for_kernel_ahead()
    BLOCK_M: gl.constexpr = block.BLOCK_M
    TURNED: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    OF_M: gl.constexpr = gl.SliceLayout(0, TURNED)
    part_number = gl.program_id(0) // block.HEAD_BLOCKS
    part = load_part(schedule, part_number)
    item = load_first_item(schedule, part_number)
    padding_start = gl.load(results.query_starts + results.rows)  # early, so that nothing waits for it at the end
    scale, result_scale = scales_of(scoring)
    done = 0  # tiles of the part's earlier items
    for number in range(part.first_item, part.last_item + 1):
        turn = number - part.first_item
        begin, end = tiles_between(part, number, item)
        first_m = anew(gl.program_id(0) % block.HEAD_BLOCKS * BLOCK_M)
        load_queries(queries, block, item, first_m, turn, WARPGROUP)

        weighing = weighing_of(scoring, scale, block, item, first_m, OF_M)
        sums = Sums(
            gl.zeros([HALF, BLOCK_M], gl.float32, layout=TURNED),
            gl.zeros([HALF, BLOCK_M], gl.float32, layout=TURNED),
            gl.full([BLOCK_M], float("-inf"), gl.float32, layout=OF_M),
            gl.zeros([BLOCK_N, BLOCK_M], gl.float32, layout=TURNED),
        )
        for tile in range(begin + ((done + WARPGROUP) & 1), end, 2):
            n = done + tile - begin
            first = item.first_key + tile * BLOCK_N
            sums = add_tile(sums, queries, ring, exchange.weights.index(WARPGROUP), weighing, n, first)
        done += end - begin

        factor, lse = factor_of(sums, result_scale, exchange, turn, WARPGROUP)
        partial = partial_of(part, number, item)
        acc = add_halves(sums, factor, exchange, turn, WARPGROUP)
        store_result(results, block, item, partial, first_m, acc, lse, WARPGROUP, 1)
        item = load_item(schedule, gl.minimum(number + 1, part.last_item))
    fill_padding(results, block, padding_start + part_number, WARPGROUP)


@gluon.jit
def add_tile(
    sums: Sums,
    queries: Queries,
    ring: Ring,
    weights_at: gl.shared_memory_descriptor,  # [BLOCK_M, BLOCK_N] of this warpgroup
    weighing: Weighing,
    n: gl.tensor,
    first: gl.tensor,
) -> Sums:
    """Tile n, which begins at position `first`: its scores, its weights, its values."""
    stage = stage_of(ring, n)
    scores = gl.zeros_like(sums.weights)
    wait_for_keys(ring.left.full.index(stage.index), stage.phase, ring.GATHERS)
    left = ring.left.keys.index(stage.index)
    started = warpgroup_mma(left, queries.left.permute((1, 0)), scores, use_acc=False, is_async=True)
    wait_for_keys(ring.right.full.index(stage.index), stage.phase, ring.GATHERS)
    right = ring.right.keys.index(stage.index)
    started = warpgroup_mma(right, queries.right.permute((1, 0)), started, is_async=True)
    started = warpgroup_mma(ring.rope.index(stage.index), queries.rope.permute((1, 0)), started, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[started]) * weighing.scale
    if first + BLOCK_N > weighing.seen_by_all:
        scores = hide_unseen(weighing, scores, first, 1)
        if ring.BOXES:
            clear_past(left, weighing.end_key - first)
            clear_past(right, weighing.end_key - first)
    row_max = gl.maximum(sums.row_max, gl.max(scores, 0))
    base = base_of(row_max, weighing.MAY_BE_EMPTY)
    alpha = gl.exp2(sums.row_max - base)[None, :]
    weights = gl.exp2(scores - base[None, :])
    all_weights = sums.weights * alpha + weights
    weights_at = weights_at.permute((1, 0))
    weights_at.store(weights.to(weights_at.dtype))
    fence_async_shared()
    thread_barrier()
    started_left = warpgroup_mma(left.permute((1, 0)), weights_at, sums.left * alpha, is_async=True)
    started_right = warpgroup_mma(right.permute((1, 0)), weights_at, sums.right * alpha, is_async=True)
    left_sum = warpgroup_mma_wait(1, deps=[started_left])
    thread_barrier()
    mbarrier.arrive(ring.left.empty.index(stage.index), count=1)
    right_sum = warpgroup_mma_wait(0, deps=[started_right])
    thread_barrier()
    mbarrier.arrive(ring.right.empty.index(stage.index), count=1)
    return Sums(left_sum, right_sum, row_max, all_weights)


@gluon.jit
def factor_of(
    sums: Sums, result_scale: gl.tensor, exchange: Exchange, turn: gl.tensor, WARPGROUP: gl.constexpr
) -> gl.tensor:
    """What makes this warpgroup's sums its share of an item's result [1, BLOCK_M], and the item's LSE [BLOCK_M]."""
    OF_M: gl.constexpr = sums.row_max.type.layout
    row_sum = gl.sum(sums.weights, 0)
    own, others = (turn & 1) * 2 + WARPGROUP, (turn & 1) * 2 + 1 - WARPGROUP
    exchange.row_maxes.index(own).store(sums.row_max)
    exchange.row_sums.index(own).store(row_sum)
    thread_barrier()
    mbarrier.arrive(exchange.totalled, count=1)
    mbarrier.wait(exchange.totalled, turn & 1)
    others_max = exchange.row_maxes.index(others).load(OF_M)
    row_max = gl.maximum(sums.row_max, others_max)
    base = base_of(row_max, True)  # both are -inf in a row without keys
    alpha = gl.exp2(sums.row_max - base)
    row_sum = row_sum * alpha + exchange.row_sums.index(others).load(OF_M) * gl.exp2(others_max - base)
    seen_any = row_sum > 0.0
    row_sum = gl.where(seen_any, row_sum, 1.0)
    factor = (alpha * result_scale / row_sum)[None, :]
    return factor, gl.where(seen_any, (row_max + gl.log2(row_sum)) * LN2, float("-inf"))


@gluon.jit
def add_halves(
    sums: Sums, factor: gl.tensor, exchange: Exchange, turn: gl.tensor, WARPGROUP: gl.constexpr
) -> gl.tensor:
    """[HALF, BLOCK_M] of an item's result: the left half in warpgroup 0, the right half in 1."""
    place = exchange.half
    LAYOUT: gl.constexpr = sums.left.type.layout
    if WARPGROUP == 0:
        mbarrier.wait(exchange.left_given, turn & 1)
        acc = sums.left * factor + place.load(LAYOUT)
        thread_barrier()
        place.store(sums.right * factor)
        thread_barrier()
        mbarrier.arrive(exchange.right_given, count=1)
    else:
        place.store(sums.left * factor)
        thread_barrier()
        mbarrier.arrive(exchange.left_given, count=1)
        mbarrier.wait(exchange.right_given, turn & 1)
        acc = sums.right * factor + place.load(LAYOUT)
        thread_barrier()
    return acc
