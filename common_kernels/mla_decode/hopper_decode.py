"""The kernel of `mla_decode` on Hopper, in Gluon: two warpgroups compute, a third brings keys from memory.

The contract, the schedule, the scratch and the merge are those of the portable kernel, see `triton_launch`. What is new
is who does what when, and in which form. docs/hopper-mla-decode.md counts products and bytes, and draws both forms.

Each partition is a story of its own: the producer in `hopper_ring`, which also says where tiles lie; the two consumers
in `hopper_many_rows` (64 heads times queries a program) or in `hopper_few_rows` (8, 16 or 32). Both bring queries as
`hopper_queries` has it, weigh scores as `hopper_softmax`, and leave results as `hopper_results`. Every barrier is
explained where it is declared: who arrives, how often, and why nothing is written that is still read.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from taut.common_kernels.hopper_mask import Mask
from taut.common_kernels.mla_decode.hopper_few_rows import attend_few, make_few_exchange
from taut.common_kernels.mla_decode.hopper_many_rows import MANY, attend_many, make_many_exchange
from taut.common_kernels.mla_decode.hopper_queries import Block, Heads, make_queries
from taut.common_kernels.mla_decode.hopper_results import Results
from taut.common_kernels.mla_decode.hopper_ring import Cache, make_ring, produce, thread_barrier
from taut.common_kernels.mla_decode.hopper_softmax import Scoring
from taut.common_kernels.schedule.hopper_items import Schedule


@gluon.jit(do_not_specialize=["rows", "tokens", "parts_count", "table_stride"])
def taut_mla_decode(
    q_nope: gl.tensor,  # [T, Hq, LATENT]
    q_pe: gl.tensor,  # [T, Hq, ROPE]
    cache: gl.tensor,  # [pages, PAGE_SIZE, LATENT + ROPE]
    latent_boxes: gl.tensor,  # the cache as boxes of 64 keys and 256 columns; None where threads bring keys
    rope_boxes: gl.tensor,  # likewise, 64 columns
    table: gl.tensor,
    table_rows: gl.tensor,
    query_starts: gl.tensor,
    items: gl.tensor,
    parts: gl.tensor,
    out: gl.tensor,
    lse: gl.tensor,
    partials: gl.tensor,
    partial_lses: gl.tensor,
    cache_scale: gl.tensor,
    scale: gl.tensor,  # of the scores, times log2(e)
    rows: gl.tensor,
    tokens: gl.tensor,
    parts_count: gl.tensor,
    nope_token_stride: gl.tensor,
    nope_head_stride: gl.tensor,
    nope_column_stride: gl.tensor,
    pe_token_stride: gl.tensor,
    pe_head_stride: gl.tensor,
    pe_column_stride: gl.tensor,
    cache_page_stride: gl.tensor,
    cache_slot_stride: gl.tensor,
    page_slots: gl.tensor,  # from a page to the next one in memory, in slots; of use where boxes are
    table_stride: gl.tensor,
    out_token_stride: gl.tensor,
    out_head_stride: gl.tensor,
    out_column_stride: gl.tensor,
    lse_token_stride: gl.tensor,
    lse_head_stride: gl.tensor,
    HEADS: gl.constexpr,
    HEAD_BLOCKS: gl.constexpr,
    BLOCK_M: gl.constexpr,  # heads times queries of a program
    PAGE_SIZE: gl.constexpr,
    CAUSAL: gl.constexpr,
    BOXES: gl.constexpr,  # keys come in boxes
    GATHERS: gl.constexpr,  # keys come by asynchronous copies
    QUERY_SIXTEENS: gl.constexpr,  # every eight of a query's numbers begin at a multiple of 16 bytes, side by side
    OUT_SIXTEENS: gl.constexpr,  # likewise the output's
    FLOAT8: gl.constexpr,
    HAS_TABLE_ROWS: gl.constexpr,
    HAS_LSE: gl.constexpr,
    EARLY: gl.constexpr,  # whether this kernel and the merge are launched before the kernel ahead has ended
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,  # of a thread that computes; those that bring keys have what remains
) -> None:
    """One program works through one part for one block of heads times queries; see this module's text."""
    schedule = Schedule(items, parts)
    block = Block(HEADS, HEAD_BLOCKS, BLOCK_M)
    nope = Heads(q_nope, nope_token_stride, nope_head_stride, nope_column_stride, QUERY_SIXTEENS)
    pe = Heads(q_pe, pe_token_stride, pe_head_stride, pe_column_stride, QUERY_SIXTEENS)
    cache_of_layer = Cache(
        cache,
        latent_boxes,
        rope_boxes,
        table,
        table_rows,
        table_stride,
        cache_page_stride,
        cache_slot_stride,
        page_slots,
        PAGE_SIZE,
        HAS_TABLE_ROWS,
        FLOAT8,
    )
    mask = Mask(0, 0, CAUSAL, HAS_LEFT=False, HAS_RIGHT=False)
    scoring = Scoring(scale, cache_scale, mask, MAY_BE_EMPTY=CAUSAL, FLOAT8=FLOAT8)
    results = Results(
        Heads(out, out_token_stride, out_head_stride, out_column_stride, OUT_SIXTEENS),
        lse,
        lse_token_stride,
        lse_head_stride,
        partials,
        partial_lses,
        query_starts,
        rows,
        tokens,
        parts_count,
        HAS_LSE,
    )
    DTYPE: gl.constexpr = q_nope.dtype.element_ty
    ring = make_ring(DTYPE, STAGES, BOXES, GATHERS)
    queries = make_queries(nope, pe, BLOCK_M)
    exchange = make_many_exchange(ring) if BLOCK_M == MANY else make_few_exchange(BLOCK_M, DTYPE)
    fence_async_shared()
    thread_barrier()
    gl.warp_specialize(
        [
            (produce, (schedule, cache_of_layer, ring, HEAD_BLOCKS, EARLY)),
            (
                attend_many if BLOCK_M == MANY else attend_few,
                (schedule, block, queries, ring, scoring, exchange, results, 0, EARLY),
            ),
            (
                attend_many if BLOCK_M == MANY else attend_few,
                (schedule, block, queries, ring, scoring, exchange, results, 1, EARLY),
            ),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )
