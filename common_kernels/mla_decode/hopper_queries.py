"""The queries of `mla_decode` on Hopper: which of them a program works for, and how they come into shared memory.

A program works for BLOCK_M pairs of a query and a head: the heads of an item's first query, then those of its second,
and so on, in HEAD_BLOCKS programs of so many each. `first_m` is where a program's begin among those of the item.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from taut.common_kernels.aggregates import aggregates_of
from taut.common_kernels.mla_decode.hopper_ring import HALF, ROPE, thread_barrier
from taut.common_kernels.schedule.hopper_items import Item


@aggregates_of(gl, gluon)
class Block:
    """What of an item one program works for.

    Attributes:
        HEADS: Hq.
        HEAD_BLOCKS: programs that an item's queries and heads are shared among.
        BLOCK_M: queries times heads of a program.
    """

    HEADS: gl.constexpr
    HEAD_BLOCKS: gl.constexpr
    BLOCK_M: gl.constexpr


@aggregates_of(gl, gluon)
class Heads:
    """A tensor [T, Hq, D], queries or the output.

    Attributes:
        start: pointer.
        token_stride: from a token to the next, in elements.
        head_stride: from a head to the next.
        column_stride: from an element of a head to the next.
        SIXTEENS: every eight elements of a head begin at a multiple of 16 bytes, and stand in a row.
    """

    start: gl.tensor
    token_stride: gl.tensor
    head_stride: gl.tensor
    column_stride: gl.tensor
    SIXTEENS: gl.constexpr


@aggregates_of(gl, gluon)
class Queries:
    """The queries of a step, and where those of an item lie in shared memory.

    Attributes:
        nope: [T, Hq, LATENT].
        pe: [T, Hq, ROPE].
        left: shared memory [BLOCK_M, HALF], the first half of the columns; brought by the first warpgroup.
        right: the same of the second half, by the second warpgroup.
        rope: shared memory [BLOCK_M, ROPE], brought by the second warpgroup.
        ready: barrier: two arrivals an item, one of each warpgroup. The queries of the item before are not read any
            more then: both have arrived where all of its tiles are done.
    """

    nope: Heads
    pe: Heads
    left: gl.shared_memory_descriptor
    right: gl.shared_memory_descriptor
    rope: gl.shared_memory_descriptor
    ready: gl.shared_memory_descriptor


@gluon.jit
def make_queries(nope: Heads, pe: Heads, BLOCK_M: gl.constexpr) -> Queries:
    """Room for an item's queries in shared memory."""
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    DTYPE: gl.constexpr = nope.start.dtype.element_ty
    left = gl.allocate_shared_memory(DTYPE, [BLOCK_M, HALF], TILE)
    right = gl.allocate_shared_memory(DTYPE, [BLOCK_M, HALF], TILE)
    rope = gl.allocate_shared_memory(DTYPE, [BLOCK_M, ROPE], TILE)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=2)
    return Queries(nope, pe, left, right, rope, ready)


@gluon.jit
def anew(number: gl.tensor) -> gl.tensor:
    """The same number, of which the compiler knows nothing: what is computed from it is not kept from item to item.

    It would keep the addresses of queries and results in registers that the tiles' loop needs.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def load_queries(
    queries: Queries, block: Block, item: Item, first_m: gl.tensor, turn: gl.tensor, WARPGROUP: gl.constexpr
) -> None:
    """Bring an item's queries, half of the columns by each warpgroup, and wait for what the other one brings."""
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    NARROW: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    if WARPGROUP == 0:
        queries.left.store(read_heads(queries.nope, block, item, first_m, 0, HALF, WIDE))
    else:
        queries.right.store(read_heads(queries.nope, block, item, first_m, HALF, HALF, WIDE))
        queries.rope.store(read_heads(queries.pe, block, item, first_m, 0, ROPE, NARROW))
    fence_async_shared()  # matrix instructions read it
    thread_barrier()
    mbarrier.arrive(queries.ready, count=1)
    mbarrier.wait(queries.ready, turn & 1)


@gluon.jit
def read_heads(
    heads: Heads,
    block: Block,
    item: Item,
    first_m: gl.tensor,
    FIRST_COLUMN: gl.constexpr,
    COLUMNS: gl.constexpr,
    LAYOUT: gl.constexpr,
) -> gl.tensor:
    """[BLOCK_M, COLUMNS] of an item's queries; zeros where there is no query."""
    m = first_m + gl.arange(0, block.BLOCK_M, layout=gl.SliceLayout(1, LAYOUT))
    query = m // block.HEADS
    at = (item.first_query + query).to(gl.int64) * heads.token_stride
    at += (m % block.HEADS).to(gl.int64) * heads.head_stride
    column = FIRST_COLUMN + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
    here = (query < item.queries)[:, None]
    addresses = heads.start + at[:, None] + (column * heads.column_stride)[None, :]
    if heads.SIXTEENS:  # said here: a partition of other warps than the first knows nothing of the kernel's arguments
        addresses = gl.max_contiguous(gl.multiple_of(addresses, [1, 16]), [1, 8])
    return gl.load(addresses, mask=here, other=0.0)
