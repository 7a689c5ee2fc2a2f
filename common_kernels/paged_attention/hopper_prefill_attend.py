"""Two ways in which a warpgroup of the prefill kernel goes through its tiles; `hopper_prefill` draws both.

By turns with another one (`attend_in_turns`), or by itself with its scores half a tile ahead (`attend_ahead`).
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
from taut.common_kernels.gluon_assembly import rescaled, worked_out
from taut.common_kernels.hopper_mask import Mask, sees
from taut.common_kernels.paged_attention.hopper_ring import Ring
from taut.common_kernels.paged_attention.hopper_softmax import LOWEST, Scoring, cap_scores

WARPGROUP_M = gl.constexpr(64)  # queries times heads of a warpgroup


@aggregates_of(gl, gluon)
class Block:
    """A program's block of queries of a row, and the tiles that it goes through.

    Attributes:
        first_head: of PACK heads.
        first_query: the token of the first query.
        query_end: the token that follows the row's last query.
        first_position: the position of the first query in its row.
        length: keys of the row.
        start: the position of the first key of the first tile.
        tiles: how many there are, at least one.
        common_start: the first tile in which every query sees every key.
        common_end: the tile that follows the last such one.
        PACK: heads that share the program.
        WINDOWED: whether tiles ahead of the common ones may hide keys; the first one is masked anyway.
    """

    first_head: gl.tensor
    first_query: gl.tensor
    query_end: gl.tensor
    first_position: gl.tensor
    length: gl.tensor
    start: gl.tensor
    tiles: gl.tensor
    common_start: gl.tensor
    common_end: gl.tensor
    PACK: gl.constexpr
    WINDOWED: gl.constexpr


@aggregates_of(gl, gluon)
class Role:
    """What a warpgroup is told of itself.

    Attributes:
        WHICH: of the warpgroups that attend.
        AHEAD: whether each goes ahead by itself; else two go by turns.
    """

    WHICH: gl.constexpr
    AHEAD: gl.constexpr


@aggregates_of(gl, gluon)
class Warpgroup:
    """What one warpgroup has of a block: 64 queries times heads.

    Attributes:
        q: [64, HEAD_MAIN] shared memory.
        q_tail: [64, HEAD_TAIL] shared memory, of no meaning without a tail.
        positions: [64] of the queries in their row.
        slopes: [64] base 2, read if scores have slopes.
        WHICH: of the warpgroups.
    """

    q: gl.shared_memory_descriptor
    q_tail: gl.shared_memory_descriptor
    positions: gl.tensor
    slopes: gl.tensor
    WHICH: gl.constexpr


@gluon.jit
def multiply_keys(
    warpgroup: Warpgroup, ring: Ring, stage: gl.tensor, first: gl.constexpr, KEYS: gl.constexpr
) -> gl.tensor:
    """Start the products of a warpgroup's queries and some keys of a stage of the ring; not waited for."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    keys = ring.k.index(stage).slice(first, KEYS, dim=0)
    scores = gl.zeros([WARPGROUP_M, KEYS], gl.float32, layout=layout)
    scores = warpgroup_mma(warpgroup.q, keys.permute((1, 0)), scores, use_acc=False, is_async=True)
    if ring.HEAD_TAIL:
        keys = ring.k_tail.index(stage).slice(first, KEYS, dim=0)
        scores = warpgroup_mma(warpgroup.q_tail, keys.permute((1, 0)), scores, is_async=True)
    return scores


@gluon.jit
def weigh(
    products: gl.tensor,  # [64, KEYS] float32
    row_sum: gl.tensor,  # [64] sum of weights
    row_max: gl.tensor,  # [64] maximum of scores, base 2
    first_key: gl.tensor,  # the position of the first key
    warpgroup: Warpgroup,
    mask: Mask,
    length: gl.tensor,
    scoring: Scoring,
    MASKED: gl.constexpr,
) -> gl.tensor:
    """The weights of some keys, and of the online softmax the new sum, the new maximum, and the old output's alpha."""
    HAS_SLOPES: gl.constexpr = scoring.slopes is not None
    scores = products
    keys = first_key + gl.arange(0, products.shape[1], layout=gl.SliceLayout(0, products.type.layout))
    if scoring.HAS_SOFT_CAP:
        scores = cap_scores(scores, scoring)
    elif HAS_SLOPES:
        scores = scores * scoring.scale
    if HAS_SLOPES:
        scores += warpgroup.slopes[:, None] * (keys[None, :] - warpgroup.positions[:, None]).to(gl.float32)
    if MASKED:
        seen = sees(mask, keys[None, :], warpgroup.positions[:, None], keys[None, :] < length)
        scores = gl.where(seen, scores, float("-inf"))
    highest = gl.max(scores, 1)
    if scoring.HAS_SOFT_CAP or HAS_SLOPES:
        new_max = gl.maximum(row_max, highest)
        weights = gl.exp2(scores - new_max[:, None])
    else:
        # The scale is positive: it is folded into one multiply-add with the subtraction.
        new_max = gl.maximum(row_max, highest * scoring.scale)
        weights = gl.exp2(scores * scoring.scale - new_max[:, None])
    alpha = gl.exp2(row_max - new_max)
    return weights, row_sum * alpha + gl.sum(weights, 1), new_max, alpha


@gluon.jit
def attend_tile(
    i: gl.tensor,  # the number of the tile, from 1 on
    acc: gl.tensor,
    row_sum: gl.tensor,
    row_max: gl.tensor,
    p: gl.tensor,  # the weights of the tile before, as the left operand of a product
    warpgroup: Warpgroup,
    ring: Ring,
    turns: gl.shared_memory_descriptor,
    block: Block,
    mask: Mask,
    scoring: Scoring,
    MASKED: gl.constexpr,
) -> gl.tensor:
    """Scores and weights of tile i, and meanwhile the output of tile i - 1: returns acc, row_sum, row_max, p."""
    STAGES: gl.constexpr = ring.STAGES
    BLOCK_N: gl.constexpr = ring.k.shape[1]
    stage = i % STAGES
    before = (i - 1) % STAGES
    mbarrier.wait(ring.k_full.index(stage), (i // STAGES) & 1)
    mbarrier.wait(ring.v_full.index(before), ((i - 1) // STAGES) & 1)
    if not ring.BOX:
        fence_async_shared()
    # Barrier `turns[w]` takes one arrival a tile, from the other warpgroup when it has issued its products. The first
    # warpgroup begins, so its wait for tile i is for the arrival of tile i - 1; the second's is for that of tile i.
    mbarrier.wait(turns.index(warpgroup.WHICH), (i & 1) ^ (warpgroup.WHICH ^ 1))
    scores = multiply_keys(warpgroup, ring, stage, 0, BLOCK_N)
    acc = warpgroup_mma(p, ring.v.index(before), acc, is_async=True)
    mbarrier.arrive(turns.index(warpgroup.WHICH ^ 1), count=1)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(ring.k_empty.index(stage), count=1)
    weights, row_sum, row_max, alpha = weigh(
        scores, row_sum, row_max, block.start + i * BLOCK_N, warpgroup, mask, block.length, scoring, MASKED
    )
    next_p = gl.convert_layout(weights.to(p.dtype), p.type.layout)
    row_sum = worked_out(row_sum)
    acc, _ = warpgroup_mma_wait(0, deps=[acc, p])  # the old weights are read until the product is done
    mbarrier.arrive(ring.v_empty.index(before), count=1)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
    return acc, row_sum, row_max, next_p


@gluon.jit
def attend_in_turns(
    warpgroup: Warpgroup,
    ring: Ring,
    turns: gl.shared_memory_descriptor,
    block: Block,
    mask: Mask,
    scoring: Scoring,
) -> gl.tensor:
    """All tiles, the two warpgroups by turns: returns the output, its last product under way, row_sum, row_max."""
    HEAD_MAIN: gl.constexpr = ring.v.shape[2]
    BLOCK_N: gl.constexpr = ring.k.shape[1]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_MAIN, 16])
    acc = gl.zeros([WARPGROUP_M, HEAD_MAIN], gl.float32, layout=o_layout)
    row_sum = gl.zeros([WARPGROUP_M], gl.float32, layout=gl.SliceLayout(1, s_layout))
    row_max = gl.full([WARPGROUP_M], LOWEST, gl.float32, layout=gl.SliceLayout(1, s_layout))

    # The first tile has no values of a tile before it to multiply; it is masked whatever it is.
    mbarrier.wait(ring.k_full.index(0), 0)
    if not ring.BOX:
        fence_async_shared()
    mbarrier.wait(turns.index(warpgroup.WHICH), warpgroup.WHICH ^ 1)
    scores = multiply_keys(warpgroup, ring, 0, 0, BLOCK_N)
    mbarrier.arrive(turns.index(warpgroup.WHICH ^ 1), count=1)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(ring.k_empty.index(0), count=1)
    weights, row_sum, row_max, _ = weigh(
        scores, row_sum, row_max, block.start, warpgroup, mask, block.length, scoring, True
    )
    p = gl.convert_layout(weights.to(warpgroup.q.dtype), gl.DotOperandLayout(0, o_layout, 2))
    if block.WINDOWED:
        for i in range(1, block.common_start):
            acc, row_sum, row_max, p = attend_tile(
                i, acc, row_sum, row_max, p, warpgroup, ring, turns, block, mask, scoring, True
            )
    for i in range(gl.maximum(block.common_start, 1), block.common_end):
        acc, row_sum, row_max, p = attend_tile(
            i, acc, row_sum, row_max, p, warpgroup, ring, turns, block, mask, scoring, False
        )
    for i in range(gl.maximum(block.common_end, 1), block.tiles):
        acc, row_sum, row_max, p = attend_tile(
            i, acc, row_sum, row_max, p, warpgroup, ring, turns, block, mask, scoring, True
        )

    last = block.tiles - 1
    mbarrier.wait(ring.v_full.index(last % ring.STAGES), (last // ring.STAGES) & 1)
    if not ring.BOX:
        fence_async_shared()
    acc = warpgroup_mma(p, ring.v.index(last % ring.STAGES), acc, is_async=True)
    return acc, row_sum, row_max


@gluon.jit
def attend_tile_ahead(
    i: gl.tensor,  # the number of the tile
    last: gl.tensor,  # the number of the last one
    acc: gl.tensor,  # the output, the product of the step before under way
    row_sum: gl.tensor,
    row_max: gl.tensor,
    scores: gl.tensor,  # of the tile's first step
    warpgroup: Warpgroup,
    ring: Ring,
    block: Block,
    mask: Mask,
    scoring: Scoring,
    FIRST: gl.constexpr,  # whether it is the first tile, ahead of which there is no output
    MASKED: gl.constexpr,
) -> gl.tensor:
    """The weights of tile i in two steps, and under each the output of the step before and the scores of the next.

    Returns acc, row_sum, row_max and the scores of the next tile's first step.
    """
    STAGES: gl.constexpr = ring.STAGES
    BLOCK_N: gl.constexpr = ring.k.shape[1]
    KEYS: gl.constexpr = BLOCK_N // 2  # of a step
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ring.v.shape[2], 16])
    for step in gl.static_range(2):
        # After the last step there is none. Its first one is multiplied again, for nothing: the keys still lie there.
        following = gl.minimum(i + step, last)
        if step == 1:
            mbarrier.wait(ring.k_full.index(following % STAGES), (following // STAGES) & 1)
            if not ring.BOX:
                fence_async_shared()
        next_scores = multiply_keys(warpgroup, ring, following % STAGES, (1 - step) * KEYS, KEYS)
        first_key = block.start + i * BLOCK_N + step * KEYS
        weights, row_sum, row_max, alpha = weigh(
            scores, row_sum, row_max, first_key, warpgroup, mask, block.length, scoring, MASKED
        )
        p = gl.convert_layout(weights.to(warpgroup.q.dtype), gl.DotOperandLayout(0, o_layout, 2))
        row_sum = worked_out(row_sum)
        if FIRST and step == 0:
            scores = warpgroup_mma_wait(0, deps=[next_scores])
        else:
            # The weights that the product of `acc` reads are not named: over the loop's edge they would be copied. The
            # assembler, which knows what reads them, gives their registers to nobody before this wait.
            scores, acc = warpgroup_mma_wait(0, deps=[next_scores, acc])
        if step == 0 and not FIRST:
            mbarrier.arrive(ring.k_empty.index((i - 1) % STAGES), count=1)
        acc = rescaled(acc, gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None])
        acc = warpgroup_mma(p, ring.v.index(i % STAGES).slice(step * KEYS, KEYS, dim=0), acc, is_async=True)
    return acc, row_sum, row_max, scores


@gluon.jit
def attend_ahead(warpgroup: Warpgroup, ring: Ring, block: Block, mask: Mask, scoring: Scoring) -> gl.tensor:
    """All tiles, in steps of half a tile, scores a step ahead; returns as `attend_in_turns`.

    Keys and values share the barriers of a stage.
    """
    HEAD_MAIN: gl.constexpr = ring.v.shape[2]
    KEYS: gl.constexpr = ring.k.shape[1] // 2
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_MAIN, 16])
    acc = gl.zeros([WARPGROUP_M, HEAD_MAIN], gl.float32, layout=o_layout)
    row_sum = gl.zeros([WARPGROUP_M], gl.float32, layout=gl.SliceLayout(1, s_layout))
    row_max = gl.full([WARPGROUP_M], LOWEST, gl.float32, layout=gl.SliceLayout(1, s_layout))

    mbarrier.wait(ring.k_full.index(0), 0)
    if not ring.BOX:
        fence_async_shared()
    scores = multiply_keys(warpgroup, ring, 0, 0, KEYS)
    scores = warpgroup_mma_wait(0, deps=[scores])
    last = block.tiles - 1
    acc, row_sum, row_max, scores = attend_tile_ahead(
        block.tiles * 0, last, acc, row_sum, row_max, scores, warpgroup, ring, block, mask, scoring, True, True
    )
    if block.WINDOWED:
        for i in range(1, block.common_start):
            acc, row_sum, row_max, scores = attend_tile_ahead(
                i, last, acc, row_sum, row_max, scores, warpgroup, ring, block, mask, scoring, False, True
            )
    for i in range(gl.maximum(block.common_start, 1), block.common_end):
        acc, row_sum, row_max, scores = attend_tile_ahead(
            i, last, acc, row_sum, row_max, scores, warpgroup, ring, block, mask, scoring, False, False
        )
    for i in range(gl.maximum(block.common_end, 1), block.tiles):
        acc, row_sum, row_max, scores = attend_tile_ahead(
            i, last, acc, row_sum, row_max, scores, warpgroup, ring, block, mask, scoring, False, True
        )
    return acc, row_sum, row_max
