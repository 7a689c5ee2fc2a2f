"""`mla_decode` on the device: programs that work through the parts of a schedule, then one merge of what was split.

Every head reads the same latent vectors, so the queries of all heads (and of a few tokens of one row) lie on one axis
of the tiles; a tile of keys is read once and serves as keys and as values. Two forms of the same products:

* plain, scores [rows, keys] and result [rows, C]: for many rows, where 64 of them fill a matrix instruction;
* transposed, scores [keys, rows] and result [C, rows]: for few rows. Matrix instructions are 64 long on one axis and as
  short as 8 on the other, so that the keys take the long one. FlashMLA-ETAP (arXiv 2506.01969) describes the idea.

The softmax is the running one of FlashAttention-2 (arXiv 2307.08691), in powers of two.

What a tile table tells this operation (see `tiles`): facts `rows` (heads times queries that share keys), `rank` (C)
and `cache_bytes` (of an element); numbers `keys` and `rows` of a tile, `transposed` (0 or 1), `warps`, `stages` of
the pipeline, `programs` that share a multiprocessor, `share`, the least tiles worth a part of their own, `apart` (0
or 1), whether the last tile of an item has a loop of its own, so that the others need no masks, `spare`, the tiles
that it takes as long to begin another item as to work through, and `spread` (0 or 1, may be left out for 0), whether
the warps share out the scores of a plain tile, where there are more of them than whole rows occupy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from taut.common_kernels.float8 import decode
from taut.common_kernels.merge.triton_launch import merge_items
from taut.common_kernels.schedule.reference import ScheduleShape, most_items, parts_that_fit
from taut.common_kernels.schedule.triton_launch import launch_options, load_first_item, load_item, load_part, tiles_of
from taut.common_kernels.tiles import table_for
from taut.common_kernels.workspace import ScheduledWorkspace, device_facts

if TYPE_CHECKING:
    from torch import Tensor

    from taut.common_kernels.kernels import Workspace
    from taut.common_kernels.problem import Problem
    from taut.common_kernels.step import Step
    from taut.common_kernels.tiles import Tile, TileTable

LN2 = tl.constexpr(0.6931471805599453)
LOG2_E = 1.4426950408889634
ROWS_AT_ONCE = 64  # the most heads times queries in one tile


@triton.jit
def _read_keys(
    vectors: tl.tensor,
    columns: tl.tensor,
    stride: tl.tensor,
    QUANTISED: tl.constexpr,
    NATIVE: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    """Columns of the vectors that begin at [KEYS] addresses."""
    keys = tl.load(vectors[:, None] + columns[None, :] * stride)
    return decode(keys, NATIVE, DTYPE) if QUANTISED else keys.to(DTYPE)


@triton.jit
def _page_numbers(
    pages: tl.tensor,
    first: tl.tensor,
    key_ids: tl.tensor,
    end_key: tl.tensor,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
) -> tl.tensor:
    """Page numbers of the tile whose first key is `first`: one if a tile lies in one page, or else one for each key."""
    if PAGE % KEYS == 0:
        numbers = tl.load(pages + tl.maximum(tl.minimum(first, end_key - 1), 0) // PAGE)
    else:
        numbers = tl.load(pages + tl.maximum(tl.minimum(first + key_ids, end_key - 1), 0) // PAGE)
    return numbers


@triton.jit
def _attend_tiles(
    acc: tl.tensor,  # [ROWS, LATENT] float32, or transposed
    top: tl.tensor,  # [ROWS] the largest score so far, times log2(e)
    total: tl.tensor,  # [ROWS] the sum of the weights so far
    nope: tl.tensor,  # [ROWS, LATENT], or transposed
    pe: tl.tensor,
    cache: tl.tensor,
    cache_stride_page: tl.tensor,
    cache_stride_d: tl.tensor,
    pages: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    first_key: tl.tensor,
    end_key: tl.tensor,
    position: tl.tensor,  # [ROWS]
    scale: tl.tensor,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE: tl.constexpr,
    PLACE_STRIDE: tl.constexpr,
    KEYS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    CAUSAL: tl.constexpr,
    QUANTISED: tl.constexpr,
    NATIVE: tl.constexpr,
    SPREAD: tl.constexpr,
    LAST: tl.constexpr,  # whether positions past the end may occur
) -> tl.tensor:
    """Attention over the tiles begin <= tile < end of one item: acc, top, total."""
    DTYPE: tl.constexpr = nope.dtype
    key_ids = tl.arange(0, KEYS)
    columns = tl.arange(0, LATENT)
    rope_columns = LATENT + tl.arange(0, ROPE)
    # The page numbers of a tile are read one tile ahead, so that no load of keys waits for them.
    page = _page_numbers(pages, first_key + begin * KEYS, key_ids, end_key, PAGE, KEYS)
    for tile in range(begin, end):
        first = first_key + tile * KEYS
        keys_at = first + key_ids
        if LAST:
            # Positions past the end read the last key once more, and their scores are masked: no other slot is read,
            # and a weight of zero meets a number, not what lies in a slot that is not in use.
            place = tl.minimum(keys_at, end_key - 1) % PAGE
        elif PAGE == KEYS:
            place = key_ids
        elif PAGE % KEYS == 0:
            place = first % PAGE + key_ids
        else:
            place = keys_at % PAGE
        if PAGE % KEYS == 0:
            vectors = cache + page.to(tl.int64) * cache_stride_page + place * PLACE_STRIDE
        else:
            vectors = cache + (page.to(tl.int64) * cache_stride_page + place * PLACE_STRIDE)
        page = _page_numbers(pages, first + KEYS, key_ids, end_key, PAGE, KEYS)
        latent = _read_keys(vectors, columns, cache_stride_d, QUANTISED, NATIVE, DTYPE)
        rope = _read_keys(vectors, rope_columns, cache_stride_d, QUANTISED, NATIVE, DTYPE)
        if TRANSPOSED:
            scores = tl.dot(rope, pe)
            scores = tl.dot(latent, nope, scores) * scale
            if LAST:
                scores = tl.where((keys_at < end_key)[:, None], scores, float("-inf"))
            if CAUSAL:
                scores = tl.where(keys_at[:, None] <= position[None, :], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 0))
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
            if LAST:
                scores = tl.where((keys_at < end_key)[None, :], scores, float("-inf"))
            if CAUSAL:
                scores = tl.where(keys_at[None, :] <= position[:, None], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
        base = new_top
        if CAUSAL:  # a query may see nothing of a tile, and nothing before
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
        fade = tl.exp2(top - base)
        if TRANSPOSED:
            weights = tl.exp2(scores - base[None, :])
            total = total * fade + tl.sum(weights, 0)
            acc = tl.dot(tl.trans(latent), weights.to(DTYPE), acc * fade[None, :])
        else:
            weights = tl.exp2(scores - base[:, None])
            total = total * fade + tl.sum(weights, 1)
            acc = tl.dot(weights.to(DTYPE), latent, acc * fade[:, None])
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=["step_rows", "tokens", "parts_count", "table_stride"])
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
    step_rows: tl.tensor,
    tokens: tl.tensor,
    parts_count: tl.tensor,
    nope_stride_t: tl.tensor,
    nope_stride_h: tl.tensor,
    nope_stride_d: tl.tensor,
    pe_stride_t: tl.tensor,
    pe_stride_h: tl.tensor,
    pe_stride_d: tl.tensor,
    cache_stride_page: tl.tensor,
    cache_stride_d: tl.tensor,
    table_stride: tl.tensor,
    out_stride_t: tl.tensor,
    out_stride_h: tl.tensor,
    out_stride_d: tl.tensor,
    lse_stride_t: tl.tensor,
    lse_stride_h: tl.tensor,
    HEADS: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE: tl.constexpr,
    PLACE_STRIDE: tl.constexpr,  # between the tokens of a page; one number for a model, and it makes addresses simple
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    CAUSAL: tl.constexpr,
    QUANTISED: tl.constexpr,
    NATIVE: tl.constexpr,
    HAS_TABLE_ROWS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    SPREAD: tl.constexpr,  # whether the warps share out a tile's scores, not only its rows
    APART: tl.constexpr,  # whether an item's last tile has a loop of its own
    FAR: tl.constexpr,  # whether the heads of one token lie 2^31 elements apart
    OVERLAPPED: tl.constexpr,  # whether this kernel and the merge are launched before the kernel ahead has ended
) -> None:
    """One program works through one part for one block of heads; see `mla_decode`."""
    if OVERLAPPED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()  # only now: the merge reads the schedule without waiting
    # Programs of one part stand side by side, so that they find each other's keys in the L2 cache.
    part = tl.program_id(0) // HEAD_BLOCKS
    head_block = tl.program_id(0) % HEAD_BLOCKS
    first_item, first_tile, last_item, end_tile, split = load_part(parts, part)
    row, first_query, queries, first_position, first_key, end_key, splits, first_partial = load_first_item(parts, part)
    padding_start = tl.load(query_starts + step_rows)  # early, so that nothing waits for it at the end
    row_ids = tl.arange(0, ROWS)
    flat = head_block * ROWS + row_ids  # heads of the item's first query, then of its second, ...
    query, head = flat // HEADS, flat % HEADS
    if FAR:
        query, head = query.to(tl.int64), head.to(tl.int64)
    columns = tl.arange(0, LATENT)
    rope_columns = tl.arange(0, ROPE)
    if QUANTISED:
        stored_scale = tl.load(cache_scale)
        scale = scale * stored_scale

    for item in range(first_item, last_item + 1):
        key_tiles = tl.cdiv(end_key - first_key, KEYS)  # none for an empty row, whose output is written all the same
        begin = tl.where(item == first_item, first_tile, 0)
        end = tl.where(item == last_item, end_tile, tiles_of(queries, first_key, end_key, KEYS))
        end = tl.minimum(end, key_tiles)

        live = query < queries
        position = first_position + query
        # One far address for an item, and near offsets from it.
        first_token = first_query.to(tl.int64)
        nope_rows = query * nope_stride_t + head * nope_stride_h
        pe_rows = query * pe_stride_t + head * pe_stride_h
        if TRANSPOSED:
            nope_at = nope_rows[None, :] + columns[:, None] * nope_stride_d
            pe_at = pe_rows[None, :] + rope_columns[:, None] * pe_stride_d
            q_here = live[None, :]
            acc = tl.zeros([LATENT, ROWS], tl.float32)
        else:
            nope_at = nope_rows[:, None] + columns[None, :] * nope_stride_d
            pe_at = pe_rows[:, None] + rope_columns[None, :] * pe_stride_d
            q_here = live[:, None]
            acc = tl.zeros([ROWS, LATENT], tl.float32)
        nope = tl.load(q_nope + first_token * nope_stride_t + nope_at, mask=q_here, other=0.0)
        pe = tl.load(q_pe + first_token * pe_stride_t + pe_at, mask=q_here, other=0.0)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)

        table_row = row.to(tl.int64)
        if HAS_TABLE_ROWS:
            table_row = tl.load(table_rows + row).to(tl.int64)
        pages = table + table_row * table_stride
        rest = begin
        if APART:  # whole tiles by themselves: their addresses and scores need no care
            rest = tl.maximum(tl.minimum(end, (end_key - first_key) // KEYS), begin)
            acc, top, total = _attend_tiles(
                acc,
                top,
                total,
                nope,
                pe,
                cache,
                cache_stride_page,
                cache_stride_d,
                pages,
                begin,
                rest,
                first_key,
                end_key,
                position,
                scale,
                LATENT,
                ROPE,
                PAGE,
                PLACE_STRIDE,
                KEYS,
                TRANSPOSED,
                CAUSAL,
                QUANTISED,
                NATIVE,
                SPREAD,
                False,
            )
        if rest < end:
            acc, top, total = _attend_tiles(
                acc,
                top,
                total,
                nope,
                pe,
                cache,
                cache_stride_page,
                cache_stride_d,
                pages,
                rest,
                end,
                first_key,
                end_key,
                position,
                scale,
                LATENT,
                ROPE,
                PAGE,
                PLACE_STRIDE,
                KEYS,
                TRANSPOSED,
                CAUSAL,
                QUANTISED,
                NATIVE,
                SPREAD,
                True,
            )

        seen_any = total > 0.0
        inverse = 1.0 / tl.where(seen_any, total, 1.0)
        if QUANTISED:
            inverse = inverse * stored_scale
        natural = tl.where(seen_any, (top + tl.log2(total)) * LN2, float("-inf"))
        acc = acc * (inverse[None, :] if TRANSPOSED else inverse[:, None])
        if splits > 1:
            slot = first_partial + tl.where(item == first_item, split, 0)
            first_row = slot.to(tl.int64) * (HEAD_BLOCKS * ROWS)
            tl.store(partial_lses + first_row + flat, natural, mask=live)
            if TRANSPOSED:
                acc_at = (flat * LATENT)[None, :] + columns[:, None]
            else:
                acc_at = (flat * LATENT)[:, None] + columns[None, :]
            tl.store(partials + first_row * LATENT + acc_at, acc, mask=q_here)
        elif splits == 1:
            if HAS_LSE:
                lse_at = query * lse_stride_t + head * lse_stride_h
                tl.store(lse + first_token * lse_stride_t + lse_at, natural, mask=live)
            out_rows = query * out_stride_t + head * out_stride_h
            if TRANSPOSED:
                out_at = out_rows[None, :] + columns[:, None] * out_stride_d
            else:
                out_at = out_rows[:, None] + columns[None, :] * out_stride_d
            tl.store(out + first_token * out_stride_t + out_at, acc.to(out.dtype.element_ty), mask=q_here)
        row, first_query, queries, first_position, first_key, end_key, splits, first_partial = load_item(
            items, tl.minimum(item + 1, last_item)
        )

    # Tokens of no row: the padding of a batch.
    for padding in range(padding_start + part, tokens, parts_count):
        padded = tl.cast(padding, tl.int64) * out_stride_t + head * out_stride_h
        zeros = tl.zeros([ROWS, LATENT], out.dtype.element_ty)
        tl.store(out + padded[:, None] + columns[None, :] * out_stride_d, zeros, mask=(flat < HEADS)[:, None])
        if HAS_LSE:
            nothing = tl.full([ROWS], float("-inf"), tl.float32)
            tl.store(lse + tl.cast(padding, tl.int64) * lse_stride_t + head * lse_stride_h, nothing, mask=flat < HEADS)


@dataclass(frozen=True)
class MlaTile:
    """How `mla_decode` is cut for one problem on one device.

    Args:
        block: queries in a work item.
        head_blocks: programs that the heads of an item are cut into.
        tile: what the tile table says.
    """

    block: int
    head_blocks: int
    tile: Tile


def mla_tile(
    table: TileTable, heads: int, rank: int, cache_bytes: int, max_query: int, operation: str = "mla_decode"
) -> MlaTile:
    """The tile of a problem; a pure function.

    Args:
        table: of the device.
        heads: Hq.
        rank: C.
        cache_bytes: bytes of a cached element.
        max_query: the most queries of a row; 0 for no bound.
        operation: under which name the table has it.
    """
    room = max(1, ROWS_AT_ONCE // heads)
    block = min(room, max_query) if max_query else room
    tile = table.tile(operation, {"rows": block * heads, "rank": rank, "cache_bytes": cache_bytes})
    if tile["rows"] < block * heads:  # the table's tile holds fewer queries, or a part of the heads of one
        block = max(1, tile["rows"] // heads)
    return MlaTile(block, triton.cdiv(block * heads, tile["rows"]), tile)


class MlaWorkspace(ScheduledWorkspace):
    """The workspace of `mla_decode`.

    Args:
        cut: how the problem is cut.
        heads: Hq.
        rank: C.
        max_rows: the most rows of a step.
        max_tokens: the most queries of a step.
        max_query: the most queries of a row; 0 for no bound.
        multiprocessors: of the device.
        native_float8: see `DeviceFacts`.
        overlapped: whether the device can start a kernel before the one ahead of it has ended.
        device: where everything lies.
    """

    def __init__(
        self,
        cut: MlaTile,
        rank: int,
        max_rows: int,
        max_tokens: int,
        max_query: int,
        multiprocessors: int,
        native_float8: str,
        overlapped: bool,
        device: torch.device | str,
    ) -> None:
        tile = cut.tile
        shape = ScheduleShape(
            parts=parts_that_fit(multiprocessors, tile["programs"], cut.head_blocks),
            max_items=most_items(max_rows, max_tokens, cut.block, max_query),
            tile=tile["keys"],
            block=cut.block,
            minimum_share=tile["share"],
            spare=tile["spare"],
        )
        super().__init__(shape, max_rows, cut.head_blocks * tile["rows"], rank, device)
        self.cut = cut
        self.native_float8 = native_float8
        self.overlapped = overlapped
        self.one = torch.ones(1, device=device)  # the scale of a cache that comes without


def mla_workspace(
    problem: Problem, max_rows: int, max_tokens: int, device: str, table_path: str | None = None
) -> MlaWorkspace:
    """A workspace of `mla_decode`; see `Kernels.workspace`. `table_path` names a tile table to use instead."""
    facts = device_facts(device)
    table = table_for(facts.target, facts.shared_memory, table_path)
    cache_bytes = getattr(torch, problem.cache_dtype).itemsize
    cut = mla_tile(table, problem.q_heads, problem.value_size, cache_bytes, problem.max_query)
    return MlaWorkspace(
        cut,
        problem.value_size,
        max_rows,
        max_tokens,
        problem.max_query,
        facts.multiprocessors,
        facts.native_float8,
        facts.dependent_launch,
        device,
    )


def mla_decode(
    q_nope: Tensor,
    q_pe: Tensor,
    cache: Tensor,
    step: Step,
    out: Tensor,
    *,
    scale: float,
    causal: bool = True,
    lse: Tensor | None = None,
    cache_scale: Tensor | None = None,
    workspace: Workspace | None = None,
) -> None:
    """See `Kernels.mla_decode`. Needs a workspace made by `workspace` and prepared for `step`."""
    if not isinstance(workspace, MlaWorkspace):
        raise TypeError("mla_decode of the provider `triton` needs the workspace that its `workspace` makes")
    tokens, heads, rank = q_nope.shape
    cut, tile, schedule, scratch = workspace.cut, workspace.cut.tile, workspace.schedule, workspace.scratch
    quantised = cache.dtype.itemsize == 1
    taut_mla_decode[(schedule.shape.parts * cut.head_blocks,)](
        q_nope,
        q_pe,
        cache.view(torch.uint8) if quantised else cache,
        step.pages.table,
        step.pages.rows if step.pages.rows is not None else step.lengths,
        step.query_starts,
        schedule.items,
        schedule.parts,
        out,
        lse if lse is not None else scratch.lses,
        scratch.partials,
        scratch.lses,
        cache_scale if cache_scale is not None else workspace.one,
        scale * LOG2_E,
        step.rows,
        tokens,
        schedule.shape.parts,
        *q_nope.stride(),
        *q_pe.stride(),
        cache.stride(0),
        cache.stride(2),
        step.pages.table.stride(0),
        *out.stride(),
        *(lse.stride() if lse is not None else (0, 0)),
        HEADS=heads,
        HEAD_BLOCKS=cut.head_blocks,
        LATENT=rank,
        ROPE=q_pe.shape[-1],
        PAGE=step.pages.page_size,
        PLACE_STRIDE=cache.stride(1),
        ROWS=tile["rows"],
        KEYS=tile["keys"],
        TRANSPOSED=bool(tile["transposed"]),
        CAUSAL=causal and step.max_query > 1,
        QUANTISED=quantised,
        NATIVE=workspace.native_float8,
        HAS_TABLE_ROWS=step.pages.rows is not None,
        HAS_LSE=lse is not None,
        SPREAD=bool(tile.get("spread", 0)),
        APART=bool(tile["apart"]),
        FAR=heads * max(*q_nope.stride(), *q_pe.stride(), *out.stride()) >= 2**31,
        OVERLAPPED=workspace.overlapped,
        num_warps=tile["warps"],
        num_stages=tile["stages"],
        **launch_options(workspace.overlapped),
    )
    merge_items(workspace, out, lse, cut.block * heads, workspace.overlapped)
