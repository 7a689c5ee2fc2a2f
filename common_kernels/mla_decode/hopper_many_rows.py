"""`mla_decode` on Hopper for many rows: 64 heads times queries a program, shared out between two warpgroups.

This is FlashMLA's division of labour (its "seesaw"). The result, 64 x 512 in float32, fills the registers of two
warpgroups: 0 sums up the left half of the values, 1 the right half. The tiles of an item are scored in turn, even ones
by warpgroup 0, odd ones by 1, each once; whoever scores a tile hands over its weights, in shared memory, with the
running maximum they are relative to. So warpgroup 0 weighs one tile while the matrix unit scores the next one for
warpgroup 1, and the other way round.

    warpgroup 0:  scores(0) | weigh(0) | left(0) | left(1)             | scores(2) | ...
    warpgroup 1:  scores(1)            | right(0), meanwhile weigh(1)  | right(1)  | scores(3) | ...
                                 ^ weights(0) are handed over    ^ weights(1)

Who arrives at the barriers of the ring, and why nothing is written that is still read:

* `empty` of a half, one arrival a tile after the last product that reads it: of warpgroup 0 for the left half and of 1
  for the right one. The other warpgroup reads a half only to score, and that has ended when it hands over the weights,
  which this one has waited for (or it is the one that scores).
* The weights lie where the tile's columns of rope were, which only the scores read. Those are filled anew with the
  right half, and that is asked for after the left half: by then both halves' products have ended, one of which read
  the weights. The maxima lie in a place of their tile's stage, which is filled anew only after both have read them.
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
from taut.common_kernels.gluon_assembly import worked_out
from taut.common_kernels.mla_decode.hopper_queries import Block, Queries, anew, load_queries
from taut.common_kernels.mla_decode.hopper_results import Results, fill_padding, partial_of, store_result
from taut.common_kernels.mla_decode.hopper_ring import (
    BLOCK_N,
    HALF,
    ROPE,
    Half,
    Ring,
    Stage,
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

MANY = gl.constexpr(64)  # BLOCK_M, as many as a matrix instruction has
# Which tile it is: tiles are worked through in pairs, and the last one may have to go by itself.
EVEN = gl.constexpr(0)
ODD = gl.constexpr(1)
LAST = gl.constexpr(2)


@aggregates_of(gl, gluon)
class Exchange:
    """What the two warpgroups tell each other.

    Attributes:
        weights: shared memory [2, MANY, BLOCK_N], of the tile in each stage: the ring's columns of rope.
        row_maxes: shared memory [2, MANY], what these weights are relative to.
        weighed: barriers [2, 1]: a tile's weights are there. One arrival a tile, of the warpgroup that scores it.
        row_sums: shared memory [4, MANY], of even and odd items, of each warpgroup. Who writes there for the item after
            next has passed `totalled` for the next one, at which the other arrived after it had read.
        totalled: barrier: two arrivals an item, one of each warpgroup, when it has done all tiles. No queries of the
            item are read any more.
    """

    weights: gl.shared_memory_descriptor
    row_maxes: gl.shared_memory_descriptor
    weighed: gl.shared_memory_descriptor
    row_sums: gl.shared_memory_descriptor
    totalled: gl.shared_memory_descriptor


@aggregates_of(gl, gluon)
class HandOver:
    """The place where one tile's weights are handed over; see `Exchange`.

    Attributes:
        weights: shared memory [MANY, BLOCK_N].
        row_max: shared memory [MANY].
        weighed: barrier [1].
    """

    weights: gl.shared_memory_descriptor
    row_max: gl.shared_memory_descriptor
    weighed: gl.shared_memory_descriptor


@aggregates_of(gl, gluon)
class Sums:
    """What a warpgroup has of an item so far.

    Attributes:
        acc: [MANY, HALF] values times weights.
        row_max: [MANY] the largest score.
        row_sum: [MANY] weights of the tiles that this warpgroup scored.
    """

    acc: gl.tensor
    row_max: gl.tensor
    row_sum: gl.tensor


@gluon.jit
def make_many_exchange(ring: Ring) -> Exchange:
    """An exchange in shared memory, part of which is the ring's."""
    gl.static_assert(ring.STAGES == 2, "tiles of many rows lie in two stages, one for each warpgroup")
    gl.static_assert(MANY == BLOCK_N and BLOCK_N == ROPE, "weights take the place of a tile's columns of rope")
    VECTOR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    exchange = Exchange(
        weights=ring.rope,
        row_maxes=gl.allocate_shared_memory(gl.float32, [2, MANY], VECTOR),
        weighed=gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout()),
        row_sums=gl.allocate_shared_memory(gl.float32, [4, MANY], VECTOR),
        totalled=gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
    )
    mbarrier.init(exchange.totalled, count=2)
    for stage in gl.static_range(2):
        mbarrier.init(exchange.weighed.index(stage), count=1)
    return exchange


@gluon.jit
def hand_over_at(exchange: Exchange, stage: Stage) -> HandOver:
    """Where the weights of the tile in a stage are handed over."""
    index = stage.index
    return HandOver(exchange.weights.index(index), exchange.row_maxes.index(index), exchange.weighed.index(index))


@gluon.jit
def attend_many(
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
    """One of the two warpgroups that compute: 0 sums up the left half of the values, 1 the right half."""
    if EARLY:
        wait_for_kernel_ahead()
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    OF_M: gl.constexpr = gl.SliceLayout(1, SCORES)
    half = ring.left if WARPGROUP == 0 else ring.right
    part_number = gl.program_id(0) // block.HEAD_BLOCKS
    part = load_part(schedule, part_number)
    item = load_first_item(schedule, part_number)
    padding_start = gl.load(results.query_starts + results.rows)  # early, so that nothing waits for it at the end
    scale, result_scale = scales_of(scoring)
    n = 0
    for number in range(part.first_item, part.last_item + 1):
        turn = number - part.first_item
        begin, end = tiles_between(part, number, item)
        first_m = anew(gl.program_id(0) % block.HEAD_BLOCKS * block.BLOCK_M)
        load_queries(queries, block, item, first_m, turn, WARPGROUP)

        weighing = weighing_of(scoring, scale, block, item, first_m, OF_M)
        sums = Sums(
            gl.zeros([MANY, HALF], gl.float32, layout=SUMS),
            gl.full([MANY], float("-inf"), gl.float32, layout=OF_M),
            gl.zeros([MANY], gl.float32, layout=OF_M),
        )
        first = item.first_key + begin * BLOCK_N
        for _ in range((end - begin) // 2):
            even, odd = stage_of(ring, n), stage_of(ring, n + 1)
            if WARPGROUP == 0:
                sums = add_own(sums, queries, ring, half, exchange, weighing, even, first, EVEN)
                sums = add_others(sums, ring, half, exchange, weighing, odd, first, ODD)
            else:
                sums = add_others_and_own(sums, queries, ring, half, exchange, weighing, even, odd, first)
            first += 2 * BLOCK_N
            n += 2
        if (end - begin) % 2 == 1:  # an even tile that no odd one follows
            even = stage_of(ring, n)
            if WARPGROUP == 0:
                sums = add_own(sums, queries, ring, half, exchange, weighing, even, first, LAST)
            else:
                sums = add_others(sums, ring, half, exchange, weighing, even, first, LAST)
            n += 1

        exchange.row_sums.index((turn & 1) * 2 + WARPGROUP).store(sums.row_sum)
        thread_barrier()
        mbarrier.arrive(exchange.totalled, count=1)
        mbarrier.wait(exchange.totalled, turn & 1)
        row_sum = sums.row_sum + exchange.row_sums.index((turn & 1) * 2 + 1 - WARPGROUP).load(OF_M)

        seen_any = row_sum > 0.0
        row_sum = gl.where(seen_any, row_sum, 1.0)
        acc = rescale(sums.acc, result_scale / row_sum)
        lse = gl.where(seen_any, (sums.row_max + gl.log2(row_sum)) * LN2, float("-inf"))
        partial = partial_of(part, number, item)
        store_result(results, block, item, partial, first_m, acc, lse, WARPGROUP, 0)
        item = load_item(schedule, gl.minimum(number + 1, part.last_item))
    fill_padding(results, block, padding_start + part_number, WARPGROUP)


@gluon.jit
def add_own(
    sums: Sums,
    queries: Queries,
    ring: Ring,
    half: Half,
    exchange: Exchange,
    weighing: Weighing,
    stage: Stage,
    first: gl.tensor,
    WHICH: gl.constexpr,
) -> Sums:
    """A tile whose scores are this warpgroup's, one thing after another."""
    SCORES: gl.constexpr = sums.row_max.type.layout.parent
    place = hand_over_at(exchange, stage)
    values, empty = half.keys.index(stage.index), half.empty.index(stage.index)
    keys_here = keys_of(weighing, first, WHICH)
    started = start_scores(queries, ring, stage, SCORES)
    scores = warpgroup_mma_wait(0, deps=[started])
    weights, row_max, alpha = weigh(weighing, scores, sums.row_max, first)
    row_sum = sums.row_sum * alpha + gl.sum(weights, 1)
    weights = weights.to(place.weights.dtype)
    hand_over(place, weights, row_max)
    acc = add_weighted(rescale(sums.acc, alpha), weights, values, empty, keys_here, ring.BOXES)
    return Sums(acc, row_max, row_sum)


@gluon.jit
def add_others(
    sums: Sums,
    ring: Ring,
    half: Half,
    exchange: Exchange,
    weighing: Weighing,
    stage: Stage,
    first: gl.tensor,
    WHICH: gl.constexpr,
) -> Sums:
    """A tile whose weights the other warpgroup hands over."""
    started, row_max, row_sum = start_others(sums, ring, half, exchange, weighing, stage, first, WHICH)
    acc = warpgroup_mma_wait(0, deps=[started])
    thread_barrier()
    mbarrier.arrive(half.empty.index(stage.index), count=1)
    return Sums(acc, row_max, row_sum)


@gluon.jit
def add_others_and_own(
    sums: Sums,
    queries: Queries,
    ring: Ring,
    half: Half,
    exchange: Exchange,
    weighing: Weighing,
    even: Stage,
    odd: Stage,
    first: gl.tensor,  # of the first of the two
) -> Sums:
    """An even tile, whose weights the other warpgroup hands over, and the odd one after it, scored here.

    The scores of the odd tile are computed while the other warpgroup weighs those of the even one, and the even tile's
    values are summed up while this one weighs.
    """
    SCORES: gl.constexpr = sums.row_max.type.layout.parent
    started = start_scores(queries, ring, odd, SCORES)
    scores = warpgroup_mma_wait(0, deps=[started])
    started, row_max, row_sum = start_others(sums, ring, half, exchange, weighing, even, first, EVEN)
    weights, row_max, alpha = weigh(weighing, scores, row_max, first + BLOCK_N)
    row_sum = worked_out(row_sum * alpha + gl.sum(weights, 1))
    weights = weights.to(exchange.weights.dtype)
    hand_over(hand_over_at(exchange, odd), weights, row_max)
    acc = warpgroup_mma_wait(0, deps=[started])
    thread_barrier()
    mbarrier.arrive(half.empty.index(even.index), count=1)
    acc = rescale(acc, alpha)
    values, empty = half.keys.index(odd.index), half.empty.index(odd.index)
    keys_here = keys_of(weighing, first, ODD)
    acc = add_weighted(acc, weights, values, empty, keys_here, ring.BOXES)
    return Sums(acc, row_max, row_sum)


@gluon.jit
def keys_of(weighing: Weighing, first: gl.tensor, WHICH: gl.constexpr) -> gl.tensor:
    """How many keys there are from a tile's first one on, where that may be fewer than BLOCK_N.

    Args:
        weighing: of the item.
        first: the position that the tile, or the pair of tiles that it is of, begins at.
        WHICH: EVEN or ODD, the first or second of a pair; LAST, by itself.
    """
    if WHICH == LAST:
        keys_here = weighing.end_key - first
    else:
        keys_here = BLOCK_N if WHICH == EVEN else weighing.end_key - first - BLOCK_N
    return keys_here


@gluon.jit
def start_scores(queries: Queries, ring: Ring, stage: Stage, LAYOUT: gl.constexpr) -> gl.tensor:
    """Ask for the products of all queries with a tile's keys, half by half as these come in; to be waited for."""
    scores = gl.zeros([MANY, BLOCK_N], gl.float32, layout=LAYOUT)
    wait_for_keys(ring.left.full.index(stage.index), stage.phase, ring.GATHERS)
    left = ring.left.keys.index(stage.index)
    scores = warpgroup_mma(queries.left, left.permute((1, 0)), scores, use_acc=False, is_async=True)
    wait_for_keys(ring.right.full.index(stage.index), stage.phase, ring.GATHERS)
    right = ring.right.keys.index(stage.index)
    scores = warpgroup_mma(queries.right, right.permute((1, 0)), scores, is_async=True)
    rope = ring.rope.index(stage.index)
    return warpgroup_mma(queries.rope, rope.permute((1, 0)), scores, is_async=True)


@gluon.jit
def weigh(weighing: Weighing, scores: gl.tensor, row_max: gl.tensor, first: gl.tensor) -> gl.tensor:
    """Weights of a tile's keys, the new maximum, and what rescales that which was summed before."""
    scores = scores * weighing.scale
    if first + BLOCK_N > weighing.seen_by_all:
        scores = hide_unseen(weighing, scores, first, 0)
    new_max = gl.maximum(row_max, gl.max(scores, 1))
    base = base_of(new_max, weighing.MAY_BE_EMPTY)
    return gl.exp2(scores - base[:, None]), new_max, gl.exp2(row_max - base)


@gluon.jit
def hand_over(place: HandOver, weights: gl.tensor, row_max: gl.tensor) -> None:
    """Let the other warpgroup have a tile's weights and the maximum that they are relative to."""
    thread_barrier()  # all have waited for the scores: nobody reads the tile's columns of rope any more
    place.row_max.store(row_max)
    place.weights.store(weights)
    fence_async_shared()  # the other warpgroup's matrix instructions read them
    thread_barrier()
    mbarrier.arrive(place.weighed, count=1)


@gluon.jit
def rescale(acc: gl.tensor, alpha: gl.tensor) -> gl.tensor:
    """`acc` times a factor of each of its rows."""
    return acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]


@gluon.jit
def add_weighted(
    acc: gl.tensor,
    weights: gl.tensor,
    values: gl.shared_memory_descriptor,
    empty: gl.shared_memory_descriptor,
    keys_here: gl.tensor,
    BOXES: gl.constexpr,
) -> gl.tensor:
    """Add a tile's values, weighted from registers; then its half is empty."""
    if BOXES:
        clear_past(values, keys_here)
    own = gl.convert_layout(weights, gl.DotOperandLayout(0, acc.type.layout, 2))
    started = warpgroup_mma(own, values, acc, is_async=True)
    acc, own = warpgroup_mma_wait(0, deps=[started, own])
    thread_barrier()
    mbarrier.arrive(empty, count=1)
    return acc


@gluon.jit
def start_others(
    sums: Sums,
    ring: Ring,
    half: Half,
    exchange: Exchange,
    weighing: Weighing,
    stage: Stage,
    first: gl.tensor,
    WHICH: gl.constexpr,
) -> gl.tensor:
    """Begin to add a tile's values with the other warpgroup's weights: acc, to be waited for, maximum, sum."""
    place = hand_over_at(exchange, stage)
    values, full = half.keys.index(stage.index), half.full.index(stage.index)
    keys_here = keys_of(weighing, first, WHICH)
    mbarrier.wait(place.weighed, stage.phase)
    wait_for_keys(full, stage.phase, ring.GATHERS)
    row_max = place.row_max.load(sums.row_max.type.layout)
    alpha = gl.exp2(sums.row_max - base_of(row_max, weighing.MAY_BE_EMPTY))
    if ring.BOXES:
        clear_past(values, keys_here)
    started = warpgroup_mma(place.weights, values, rescale(sums.acc, alpha), is_async=True)
    return started, row_max, sums.row_sum * alpha
