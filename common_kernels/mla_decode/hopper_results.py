"""Where the results of `mla_decode` on Hopper go: the output, or scratch where an item is split; zeros to padding."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from taut.common_kernels.aggregates import aggregates_of
from taut.common_kernels.mla_decode.hopper_queries import Block, Heads
from taut.common_kernels.mla_decode.hopper_ring import HALF, LATENT
from taut.common_kernels.schedule.hopper_items import Item, Part


@aggregates_of(gl, gluon)
class Results:
    """Where results go.

    Attributes:
        out: [T, Hq, LATENT].
        lse: pointer to [T, Hq] float32, natural logarithms, if HAS_LSE.
        lse_token_stride: from a token to the next.
        lse_head_stride: from a head to the next.
        partials: pointer to [partials, HEAD_BLOCKS * BLOCK_M, LATENT] float32.
        partial_lses: pointer to [partials, HEAD_BLOCKS * BLOCK_M] float32.
        query_starts: pointer to [rows + 1].
        rows: of the step.
        tokens: T, with the padding of the batch.
        parts: how many parts the schedule has.
        HAS_LSE: whether the LSE is asked for.
    """

    out: Heads
    lse: gl.tensor
    lse_token_stride: gl.tensor
    lse_head_stride: gl.tensor
    partials: gl.tensor
    partial_lses: gl.tensor
    query_starts: gl.tensor
    rows: gl.tensor
    tokens: gl.tensor
    parts: gl.tensor
    HAS_LSE: gl.constexpr


@gluon.jit
def partial_of(part: Part, number: gl.tensor, item: Item) -> gl.tensor:
    """Where in scratch a part's result of an item, by its number, lies."""
    return item.first_partial + gl.where(number == part.first_item, part.first_split, 0)


@gluon.jit
def store_result(
    results: Results,
    block: Block,
    item: Item,
    partial: gl.tensor,
    first_m: gl.tensor,
    acc: gl.tensor,  # BLOCK_M by the HALF of one warpgroup, either way round, times what makes it the result
    lse: gl.tensor,  # [BLOCK_M] natural logarithm
    WARPGROUP: gl.constexpr,
    M_AXIS: gl.constexpr,
) -> None:
    """Write one half of an item's result to the output, or to scratch where the item is split."""
    out = results.out
    OF_M: gl.constexpr = gl.SliceLayout(1 - M_AXIS, acc.type.layout)
    OF_COLUMN: gl.constexpr = gl.SliceLayout(M_AXIS, acc.type.layout)
    m = first_m + gl.arange(0, block.BLOCK_M, layout=OF_M)
    column = WARPGROUP * HALF + gl.arange(0, HALF, layout=OF_COLUMN)
    query, head = m // block.HEADS, m % block.HEADS
    here = gl.expand_dims(query < item.queries, 1 - M_AXIS)
    lse_m = first_m + gl.arange(0, block.BLOCK_M, layout=lse.type.layout)
    lse_query = lse_m // block.HEADS
    if item.splits > 1:
        partial_m = partial.to(gl.int64) * (block.HEAD_BLOCKS * block.BLOCK_M)
        at = gl.expand_dims(m * LATENT, 1 - M_AXIS) + gl.expand_dims(column, M_AXIS)
        gl.store(results.partials + partial_m * LATENT + at, acc, mask=here)
        if WARPGROUP == 0:
            gl.store(results.partial_lses + partial_m + lse_m, lse, mask=lse_query < item.queries)
    elif item.splits == 1:
        at = (item.first_query + query).to(gl.int64) * out.token_stride + head.to(gl.int64) * out.head_stride
        at = gl.expand_dims(at, 1 - M_AXIS) + gl.expand_dims(column * out.column_stride, M_AXIS)
        addresses = out.start + at
        if out.SIXTEENS and M_AXIS == 0:
            addresses = gl.max_contiguous(gl.multiple_of(addresses, [1, 16]), [1, 8])
        gl.store(addresses, acc.to(out.start.dtype.element_ty), mask=here)
        if results.HAS_LSE and WARPGROUP == 0:
            lse_at = (item.first_query + lse_query).to(gl.int64) * results.lse_token_stride
            lse_at += (lse_m % block.HEADS).to(gl.int64) * results.lse_head_stride
            gl.store(results.lse + lse_at, lse, mask=lse_query < item.queries)


@gluon.jit
def fill_padding(results: Results, block: Block, begin: gl.tensor, WARPGROUP: gl.constexpr) -> None:
    """Zeros for the tokens of no row, the padding of a batch: those from `begin` on that are this part's."""
    out = results.out
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    first_m = gl.program_id(0) % block.HEAD_BLOCKS * block.BLOCK_M
    head = first_m + gl.arange(0, block.BLOCK_M, layout=gl.SliceLayout(1, WIDE))
    column = WARPGROUP * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(0, WIDE))
    at = (head.to(gl.int64) * out.head_stride)[:, None] + (column * out.column_stride)[None, :]
    zeros = gl.zeros([block.BLOCK_M, HALF], out.start.dtype.element_ty, layout=WIDE)
    for token in range(begin, results.tokens, results.parts):
        far = gl.cast(token, gl.int64)
        addresses = out.start + far * out.token_stride + at
        if out.SIXTEENS:
            addresses = gl.max_contiguous(gl.multiple_of(addresses, [1, 16]), [1, 8])
        gl.store(addresses, zeros, mask=(head < block.HEADS)[:, None])
        if results.HAS_LSE and WARPGROUP == 0:
            nothing = gl.full([block.BLOCK_M], float("-inf"), gl.float32, layout=gl.SliceLayout(1, WIDE))
            lse = results.lse + far * results.lse_token_stride + head.to(gl.int64) * results.lse_head_stride
            gl.store(lse, nothing, mask=head < block.HEADS)
