"""Absorbed MLA for few queries: the parts of a schedule, each with an equal share of the step's tiles of keys.

Every head reads the same latent vectors, so the queries of all heads (and of a few tokens of one row) lie on one axis
of the tiles; a tile of keys is read once and serves as keys and as values. Two forms of the same products:

* plain, scores [queries, keys] and result [queries, C]: for many queries, where 64 of them fill a matrix instruction;
* transposed, scores [keys, queries] and result [C, queries]: for few. Matrix instructions are 64 long on one axis and
  as short as 8 on the other, so that the keys take the long one. FlashMLA-ETAP (arXiv 2506.01969) describes the idea.

The softmax is the running one of FlashAttention-2 (arXiv 2307.08691), in powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from taut.common_kernels import base2
from taut.common_kernels.aggregates import aggregates_of
from taut.common_kernels.float8 import decode
from taut.common_kernels.schedule.triton_items import Schedule, load_first_item, load_item, load_part, tiles_of
from taut.common_kernels.triton_mask import Mask, sees

LN2 = tl.constexpr(base2.LN2)


@aggregates_of(tl, triton)
class Latents:
    """Where the latent vectors of a row lie.

    Attributes:
        cache: pointer: the cache's slot 0.
        table_row: pointer: the row's first page number.
        page_stride: of the cache.
        column_stride: of the cache.
        TOKEN_STRIDE: between the tokens of a page; one number for a model, and it makes addresses simple.
        FLOAT8: whether the cache holds e4m3, given as bytes.
    """

    cache: tl.tensor
    table_row: tl.tensor
    page_stride: tl.tensor
    column_stride: tl.tensor
    PAGE_SIZE: tl.constexpr
    TOKEN_STRIDE: tl.constexpr
    FLOAT8: tl.constexpr
    NATIVE_FLOAT8: tl.constexpr


@aggregates_of(tl, triton)
class Queries:
    """The queries of an item, one for each head and token.

    Attributes:
        nope: [BLOCK_M, LATENT], or transposed.
        pe: [BLOCK_M, ROPE], or transposed.
        positions: [BLOCK_M] in their row.
    """

    nope: tl.tensor
    pe: tl.tensor
    positions: tl.tensor
    LATENT: tl.constexpr
    ROPE: tl.constexpr
    TRANSPOSED: tl.constexpr


@aggregates_of(tl, triton)
class Sums:
    """What a pass of the online softmax has come to.

    Attributes:
        acc: [BLOCK_M, LATENT] float32, not yet divided, or transposed.
        row_max: [BLOCK_M] maximum of scores, base 2.
        row_sum: [BLOCK_M] sum of weights.
    """

    acc: tl.tensor
    row_max: tl.tensor
    row_sum: tl.tensor


@triton.jit
def load_columns(vectors: tl.tensor, columns: tl.tensor, cached: Latents, DTYPE: tl.constexpr) -> tl.tensor:
    """Columns of the vectors that begin at [BLOCK_N] addresses."""
    numbers = tl.load(vectors[:, None] + columns[None, :] * cached.column_stride)
    return decode(numbers, cached.NATIVE_FLOAT8, DTYPE) if cached.FLOAT8 else numbers.to(DTYPE)


@triton.jit
def page_numbers(cached: Latents, first: tl.tensor, end_key: tl.tensor, BLOCK_N: tl.constexpr) -> tl.tensor:
    """Page numbers of the tile whose first key is `first`: one if a tile lies in one page, or else one for each key."""
    if cached.PAGE_SIZE % BLOCK_N == 0:
        numbers = tl.load(cached.table_row + tl.maximum(tl.minimum(first, end_key - 1), 0) // cached.PAGE_SIZE)
    else:
        keys = first + tl.arange(0, BLOCK_N)
        numbers = tl.load(cached.table_row + tl.maximum(tl.minimum(keys, end_key - 1), 0) // cached.PAGE_SIZE)
    return numbers


@triton.jit
def attend_tiles(
    sums: Sums,
    queries: Queries,
    cached: Latents,
    mask: Mask,
    begin: tl.tensor,
    end: tl.tensor,
    first_key: tl.tensor,
    end_key: tl.tensor,
    scale: tl.tensor,  # of a product, to base 2
    BLOCK_N: tl.constexpr,
    SPREAD: tl.constexpr,
    LAST: tl.constexpr,  # whether positions past the end may occur
) -> Sums:
    """The sums after the tiles begin <= tile < end of one item."""
    acc, row_max, row_sum = sums.acc, sums.row_max, sums.row_sum
    nope, pe, positions = queries.nope, queries.pe, queries.positions
    DTYPE: tl.constexpr = nope.dtype
    PAGE_SIZE: tl.constexpr = cached.PAGE_SIZE
    TRANSPOSED: tl.constexpr = queries.TRANSPOSED
    key_ids = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, queries.LATENT)
    rope_columns = queries.LATENT + tl.arange(0, queries.ROPE)
    # The page numbers of a tile are read one tile ahead, so that no load of keys waits for them.
    page = page_numbers(cached, first_key + begin * BLOCK_N, end_key, BLOCK_N)
    for tile in range(begin, end):
        first = first_key + tile * BLOCK_N
        keys = first + key_ids
        if LAST:
            # Positions past the end read the last key once more, and their scores are masked: no other slot is read,
            # and a weight of zero meets a number, not what lies in a slot that is not in use.
            place = tl.minimum(keys, end_key - 1) % PAGE_SIZE
        elif PAGE_SIZE == BLOCK_N:
            place = key_ids
        elif PAGE_SIZE % BLOCK_N == 0:
            place = first % PAGE_SIZE + key_ids
        else:
            place = keys % PAGE_SIZE
        if PAGE_SIZE % BLOCK_N == 0:
            vectors = cached.cache + page.to(tl.int64) * cached.page_stride + place * cached.TOKEN_STRIDE
        else:
            vectors = cached.cache + (page.to(tl.int64) * cached.page_stride + place * cached.TOKEN_STRIDE)
        page = page_numbers(cached, first + BLOCK_N, end_key, BLOCK_N)
        latent = load_columns(vectors, columns, cached, DTYPE)
        rope = load_columns(vectors, rope_columns, cached, DTYPE)
        if TRANSPOSED:
            scores = tl.dot(rope, pe)
            scores = tl.dot(latent, nope, scores) * scale
            keys, seers = keys[:, None], positions[None, :]
        else:
            if SPREAD:
                # Of a product that another one follows, Triton gives every warp whole rows: with more warps than that
                # needs, they compute the same scores twice. A branch hides the one product from the other. It is always
                # taken; without a product on its other side, the layout of the weights would be drawn into it.
                if end_key > 0:
                    scores = tl.dot(pe, tl.trans(rope)) * scale + tl.dot(nope, tl.trans(latent)) * scale
                else:
                    scores = tl.dot(pe, tl.trans(rope)) * scale
            else:
                scores = tl.dot(pe, tl.trans(rope))
                scores = tl.dot(nope, tl.trans(latent), scores) * scale
            keys, seers = keys[None, :], positions[:, None]
        if LAST:
            scores = tl.where(keys < end_key, scores, float("-inf"))
        if mask.CAUSAL:
            scores = tl.where(sees(mask, keys, seers, True), scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 0 if TRANSPOSED else 1))
        base = new_max
        if mask.CAUSAL:  # a query may see nothing of a tile, and nothing before
            base = tl.where(new_max == float("-inf"), 0.0, new_max)
        alpha = tl.exp2(row_max - base)
        if TRANSPOSED:
            weights = tl.exp2(scores - base[None, :])
            row_sum = row_sum * alpha + tl.sum(weights, 0)
            acc = tl.dot(tl.trans(latent), weights.to(DTYPE), acc * alpha[None, :])
        else:
            weights = tl.exp2(scores - base[:, None])
            row_sum = row_sum * alpha + tl.sum(weights, 1)
            acc = tl.dot(weights.to(DTYPE), latent, acc * alpha[:, None])
        row_max = new_max
    return Sums(acc, row_max, row_sum)


@triton.jit(do_not_specialize=["rows", "tokens", "parts_count", "table_stride"])
def taut_mla_decode(
    q_nope: tl.tensor,
    q_pe: tl.tensor,
    cache: tl.tensor,
    table: tl.tensor,
    table_rows: tl.tensor,
    query_starts: tl.tensor,
    items: tl.tensor,
    parts: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    partials: tl.tensor,
    partial_lses: tl.tensor,
    cache_scale: tl.tensor,
    scale: tl.tensor,  # of the scores, times log2(e)
    rows: tl.tensor,
    tokens: tl.tensor,
    parts_count: tl.tensor,
    nope_token_stride: tl.tensor,
    nope_head_stride: tl.tensor,
    nope_stride: tl.tensor,
    pe_token_stride: tl.tensor,
    pe_head_stride: tl.tensor,
    pe_stride: tl.tensor,
    cache_page_stride: tl.tensor,
    cache_stride: tl.tensor,
    table_stride: tl.tensor,
    out_token_stride: tl.tensor,
    out_head_stride: tl.tensor,
    out_stride: tl.tensor,
    lse_token_stride: tl.tensor,
    lse_head_stride: tl.tensor,
    HEADS: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    CAUSAL: tl.constexpr,
    FLOAT8: tl.constexpr,
    NATIVE_FLOAT8: tl.constexpr,
    HAS_TABLE_ROWS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    SPREAD: tl.constexpr,  # whether the warps share out a tile's scores, not only its rows
    APART: tl.constexpr,  # whether an item's last tile has a loop of its own
    FAR: tl.constexpr,  # whether the heads of one token lie 2^31 elements apart
    EARLY: tl.constexpr,  # whether this kernel may start before the one ahead has ended, and the merge before this one
) -> None:
    """One program works through one part for one block of heads; see `triton_launch.mla_decode`."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()  # only now: the merge reads the schedule without waiting
    # Programs of one part stand side by side, so that they find each other's keys in the L2 cache.
    part = tl.program_id(0) // HEAD_BLOCKS
    head_block = tl.program_id(0) % HEAD_BLOCKS
    schedule = Schedule(items, parts)
    share = load_part(schedule, part)
    item = load_first_item(schedule, part)
    padding_start = tl.load(query_starts + rows)  # early, so that nothing waits for it at the end
    lanes = tl.arange(0, BLOCK_M)
    flat = head_block * BLOCK_M + lanes  # heads of the item's first query, then of its second, ...
    query, head = flat // HEADS, flat % HEADS
    if FAR:
        query, head = query.to(tl.int64), head.to(tl.int64)
    columns = tl.arange(0, LATENT)
    rope_columns = tl.arange(0, ROPE)
    if FLOAT8:
        stored_scale = tl.load(cache_scale)
        scale = scale * stored_scale

    mask = Mask(-1, -1, CAUSAL, False, False)
    for number in range(share.first_item, share.last_item + 1):
        # Of an empty row there are none, and its output is written all the same.
        key_tiles = tl.cdiv(item.end_key - item.first_key, BLOCK_N)
        begin = tl.where(number == share.first_item, share.first_tile, 0)
        is_last = number == share.last_item
        end = tl.where(is_last, share.end_tile, tiles_of(item, BLOCK_N))
        end = tl.minimum(end, key_tiles)

        live = query < item.queries
        position = item.first_position + query
        # One far address for an item, and near offsets from it.
        first_token = item.first_query.to(tl.int64)
        nope_rows = query * nope_token_stride + head * nope_head_stride
        pe_rows = query * pe_token_stride + head * pe_head_stride
        if TRANSPOSED:
            nope_at = nope_rows[None, :] + columns[:, None] * nope_stride
            pe_at = pe_rows[None, :] + rope_columns[:, None] * pe_stride
            q_here = live[None, :]
            acc = tl.zeros([LATENT, BLOCK_M], tl.float32)
        else:
            nope_at = nope_rows[:, None] + columns[None, :] * nope_stride
            pe_at = pe_rows[:, None] + rope_columns[None, :] * pe_stride
            q_here = live[:, None]
            acc = tl.zeros([BLOCK_M, LATENT], tl.float32)
        nope = tl.load(q_nope + first_token * nope_token_stride + nope_at, mask=q_here, other=0.0)
        pe = tl.load(q_pe + first_token * pe_token_stride + pe_at, mask=q_here, other=0.0)
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)

        table_row = item.row.to(tl.int64)
        if HAS_TABLE_ROWS:
            table_row = tl.load(table_rows + item.row).to(tl.int64)
        cached = Latents(
            cache, table + table_row * table_stride, cache_page_stride, cache_stride, PAGE_SIZE, TOKEN_STRIDE, FLOAT8,
            NATIVE_FLOAT8,
        )  # fmt: skip
        asked = Queries(nope, pe, position, LATENT, ROPE, TRANSPOSED)
        sums = Sums(acc, row_max, row_sum)
        rest = begin
        if APART:  # whole tiles by themselves: their addresses and scores need no care
            rest = tl.maximum(tl.minimum(end, (item.end_key - item.first_key) // BLOCK_N), begin)
            sums = attend_tiles(
                sums, asked, cached, mask, begin, rest, item.first_key, item.end_key, scale, BLOCK_N, SPREAD, False
            )
        if rest < end:
            sums = attend_tiles(
                sums, asked, cached, mask, rest, end, item.first_key, item.end_key, scale, BLOCK_N, SPREAD, True
            )

        row_max, row_sum = sums.row_max, sums.row_sum
        seen = row_sum > 0.0
        inverse = 1.0 / tl.where(seen, row_sum, 1.0)
        if FLOAT8:
            inverse = inverse * stored_scale
        natural = tl.where(seen, (row_max + tl.log2(row_sum)) * LN2, float("-inf"))
        acc = sums.acc * (inverse[None, :] if TRANSPOSED else inverse[:, None])
        if item.splits > 1:
            partial = item.first_partial + tl.where(number == share.first_item, share.first_split, 0)
            first_m = partial.to(tl.int64) * (HEAD_BLOCKS * BLOCK_M)
            tl.store(partial_lses + first_m + flat, natural, mask=live)
            if TRANSPOSED:
                acc_at = (flat * LATENT)[None, :] + columns[:, None]
            else:
                acc_at = (flat * LATENT)[:, None] + columns[None, :]
            tl.store(partials + first_m * LATENT + acc_at, acc, mask=q_here)
        elif item.splits == 1:
            if HAS_LSE:
                lse_at = query * lse_token_stride + head * lse_head_stride
                tl.store(lse + first_token * lse_token_stride + lse_at, natural, mask=live)
            out_rows = query * out_token_stride + head * out_head_stride
            if TRANSPOSED:
                out_at = out_rows[None, :] + columns[:, None] * out_stride
            else:
                out_at = out_rows[:, None] + columns[None, :] * out_stride
            tl.store(out + first_token * out_token_stride + out_at, acc.to(out.dtype.element_ty), mask=q_here)
        item = load_item(schedule, tl.minimum(number + 1, share.last_item))

    # Tokens of no row: the padding of a batch.
    for padding in range(padding_start + part, tokens, parts_count):
        padded = tl.cast(padding, tl.int64) * out_token_stride + head * out_head_stride
        zeros = tl.zeros([BLOCK_M, LATENT], out.dtype.element_ty)
        tl.store(out + padded[:, None] + columns[None, :] * out_stride, zeros, mask=(flat < HEADS)[:, None])
        if HAS_LSE:
            nothing = tl.full([BLOCK_M], float("-inf"), tl.float32)
            lses = lse + tl.cast(padding, tl.int64) * lse_token_stride + head * lse_head_stride
            tl.store(lses, nothing, mask=flat < HEADS)
