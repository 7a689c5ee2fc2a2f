"""Who brings tiles in the prefill kernel: one warp keys and one values, or four warps that gather both."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from taut.common_kernels.gluon_features import THREAD_BARRIERS, first_of
from taut.common_kernels.paged_attention.hopper_prefill_attend import Block
from taut.common_kernels.paged_attention.hopper_ring import (
    BOX_COLUMNS,
    Cache,
    Row,
    gather_half,
    load_half,
    reinterpret,
)

thread_barrier = first_of(gl, THREAD_BARRIERS)

PIECE_KEYS = gl.constexpr(8)  # of a piece of a tile's values


@gluon.jit
def as_pieces(stages: gl.shared_memory_descriptor) -> gl.tensor:
    """Stages [STAGES, BLOCK_N, COLUMNS] as pieces of 8 keys and 64 columns, in the order of `as_boxes`."""
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    COUNT: gl.constexpr = stages.shape[0] * (stages.shape[2] // BOX_COLUMNS) * (stages.shape[1] // PIECE_KEYS)
    return reinterpret(stages, stages.dtype, [COUNT, PIECE_KEYS, BOX_COLUMNS], layout)


@gluon.jit
def load_keys(block: Block, row: Row, cache: Cache) -> None:
    """The warp that has the copy engine bring keys."""
    BLOCK_N: gl.constexpr = cache.BLOCK_N
    STAGES: gl.constexpr = cache.STAGES
    for i in range(block.tiles):
        load_half(i, block.start + i * BLOCK_N, cache.keys, cache.keys.full.index(i % STAGES), cache, row)


@gluon.jit
def load_values(
    block: Block,
    row: Row,
    cache: Cache,
    pieces: gl.shared_memory_descriptor,  # the ring's values as pieces, see `as_pieces`
    landed: gl.shared_memory_descriptor,  # [1, 1] the barrier of values that are still to be cleared
) -> None:
    """The warp that has the copy engine bring values."""
    BLOCK_N: gl.constexpr = cache.BLOCK_N
    STAGES: gl.constexpr = cache.STAGES
    last = block.tiles - 1
    for i in range(last):
        load_half(i, block.start + i * BLOCK_N, cache.values, cache.values.full.index(i % STAGES), cache, row)
    # The last tile alone can reach past the row's keys. What lies there may be NaN, and a weight of zero times NaN is
    # no zero: of its values the others hear when this warp has cleared them.
    stage = last % STAGES
    load_half(last, block.start + last * BLOCK_N, cache.values, landed.index(0), cache, row)
    mbarrier.wait(landed.index(0), 0)
    clear_dead_values(pieces, cache, stage, block.length - block.start - last * BLOCK_N)
    fence_async_shared()
    thread_barrier()
    mbarrier.arrive(cache.values.full.index(stage), count=1)


@gluon.jit
def clear_dead_values(
    pieces: gl.shared_memory_descriptor,
    cache: Cache,
    stage: gl.tensor,
    alive: gl.tensor,  # keys of the stage's tile that the row has
) -> None:
    """One warp: zeros for the values of a tile past the row's end.

    Of pages in the box that holds it: those past that one were asked for by a number that there is not, and are zeros
    already. Where keys lie side by side the next row's follow.
    """
    KEYS: gl.constexpr = PIECE_KEYS
    BLOCK_N: gl.constexpr = cache.BLOCK_N
    BLOCKS: gl.constexpr = cache.HEAD_MAIN // BOX_COLUMNS
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    keys = gl.arange(0, KEYS, layout=gl.SliceLayout(1, layout))
    stop = alive * 0 + BLOCK_N
    if cache.PAGED:
        stop = gl.minimum(gl.cdiv(alive, cache.BOX) * cache.BOX, BLOCK_N)
    for piece in range(alive // KEYS, stop // KEYS):
        for b in gl.static_range(BLOCKS):
            values = pieces.index((stage * BLOCKS + b) * (BLOCK_N // KEYS) + piece)
            values.store(gl.where((piece * KEYS + keys < alive)[:, None], values.load(layout), 0.0))


@gluon.jit
def gather_tiles(block: Block, cache: Cache, row: Row) -> None:
    """The warps that gather keys and values.

    A tile's keys are asked for ahead of the values of the one before, whose stage is empty later; unless a stage's
    keys and values are left together, for then they would wait for each other.
    """
    BLOCK_N: gl.constexpr = cache.BLOCK_N
    LATER: gl.constexpr = 0 if cache.TOGETHER else 1
    for i in range(block.tiles + LATER):
        if i < block.tiles:
            gather_half(i, block.start + i * BLOCK_N, cache.keys, cache, row)
        if i >= LATER:
            gather_half(i - LATER, block.start + (i - LATER) * BLOCK_N, cache.values, cache, row)
