"""`mla_decode` on the device: programs that work through the parts of a schedule, then one merge of what was split.

Every head reads the same latent vectors, so the queries of all heads (and of a few tokens of one row) lie on one axis
of the tiles; a tile of keys is read once and serves as keys and as values. Two forms of the same products:

* plain, scores [rows, keys] and result [rows, C]: for many rows, where 64 of them fill a matrix instruction;
* transposed, scores [keys, rows] and result [C, rows]: for few rows. Matrix instructions are 64 long on one axis and as
  short as 8 on the other, so that the keys take the long one. FlashMLA-ETAP (arXiv 2506.01969) describes the idea.

The softmax is the running one of FlashAttention-2 (arXiv 2307.08691), in powers of two.

What a tile table tells this operation (see `tiles`): facts `rows` (heads times queries that share keys), `rank` (C) and
`cache_bytes` (of an element); numbers `keys` and `rows` of a tile, `transposed` (0 or 1), `warps`, `stages` of the
pipeline, `programs` that share a multiprocessor, and `share`, the least tiles worth a part of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from taut.common_kernels.float8 import decode
from taut.common_kernels.merge.triton_kernel import merge_items
from taut.common_kernels.schedule.reference import ScheduleShape, most_items, parts_that_fit
from taut.common_kernels.schedule.triton_kernel import load_item, load_part, tiles_of
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
    cache: tl.tensor,
    slots: tl.tensor,  # [KEYS] offsets of the keys' first elements
    columns: tl.tensor,
    stride: tl.tensor,
    QUANTISED: tl.constexpr,
    NATIVE: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    keys = tl.load(cache + slots[:, None] + columns[None, :] * stride)
    if QUANTISED:
        keys = decode(keys, NATIVE, DTYPE)
    return keys


@triton.jit(do_not_specialize=["step_rows", "tokens", "parts_count"])
def mla_decode_kernel(
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
    cache_stride_place: tl.tensor,
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
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    CAUSAL: tl.constexpr,
    QUANTISED: tl.constexpr,
    NATIVE: tl.constexpr,
    HAS_TABLE_ROWS: tl.constexpr,
    HAS_LSE: tl.constexpr,
) -> None:
    """One program works through one part for one block of heads; see `mla_decode`."""
    DTYPE: tl.constexpr = q_nope.dtype.element_ty
    # Programs of one part stand side by side, so that they find each other's keys in the L2 cache.
    part = tl.program_id(0) // HEAD_BLOCKS
    head_block = tl.program_id(0) % HEAD_BLOCKS
    row_ids = tl.arange(0, ROWS)
    flat = head_block * ROWS + row_ids  # heads of the item's first query, then of its second, ...
    head = flat % HEADS
    columns = tl.arange(0, LATENT)
    rope_columns = tl.arange(0, ROPE)
    key_ids = tl.arange(0, KEYS)
    if QUANTISED:
        stored_scale = tl.load(cache_scale)
        scale = scale * stored_scale

    # Tokens of no row: the padding of a batch.
    for padding in range(tl.load(query_starts + step_rows) + part, tokens, parts_count):
        padded = tl.cast(padding, tl.int64) * out_stride_t + head * out_stride_h
        zeros = tl.zeros([ROWS, LATENT], out.dtype.element_ty)
        tl.store(out + padded[:, None] + columns[None, :] * out_stride_d, zeros, mask=(flat < HEADS)[:, None])
        if HAS_LSE:
            nothing = tl.full([ROWS], float("-inf"), tl.float32)
            tl.store(lse + tl.cast(padding, tl.int64) * lse_stride_t + head * lse_stride_h, nothing, mask=flat < HEADS)

    first_item, first_tile, last_item, end_tile, split = load_part(parts, part)
    for item in range(first_item, last_item + 1):
        row, first_query, queries, first_position, first_key, end_key, splits, first_partial = load_item(items, item)
        key_tiles = tl.cdiv(end_key - first_key, KEYS)  # none for an empty row, whose output is written all the same
        begin = tl.where(item == first_item, first_tile, 0)
        end = tl.where(item == last_item, end_tile, tiles_of(queries, first_key, end_key, KEYS))
        end = tl.minimum(end, key_tiles)

        query = flat // HEADS
        live = query < queries
        token = (first_query + query).to(tl.int64)
        position = first_position + query
        if TRANSPOSED:
            nope = tl.load(
                q_nope + (token * nope_stride_t + head * nope_stride_h)[None, :] + columns[:, None] * nope_stride_d,
                mask=live[None, :],
                other=0.0,
            )
            pe = tl.load(
                q_pe + (token * pe_stride_t + head * pe_stride_h)[None, :] + rope_columns[:, None] * pe_stride_d,
                mask=live[None, :],
                other=0.0,
            )
            acc = tl.zeros([LATENT, ROWS], tl.float32)
        else:
            nope = tl.load(
                q_nope + (token * nope_stride_t + head * nope_stride_h)[:, None] + columns[None, :] * nope_stride_d,
                mask=live[:, None],
                other=0.0,
            )
            pe = tl.load(
                q_pe + (token * pe_stride_t + head * pe_stride_h)[:, None] + rope_columns[None, :] * pe_stride_d,
                mask=live[:, None],
                other=0.0,
            )
            acc = tl.zeros([ROWS, LATENT], tl.float32)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)

        table_row = row.to(tl.int64)
        if HAS_TABLE_ROWS:
            table_row = tl.load(table_rows + row).to(tl.int64)
        pages = table + table_row * table_stride
        for tile in range(begin, end):
            keys_at = first_key + tile * KEYS + key_ids
            # Positions past the end read the last key once more, and their scores are masked: no other slot is touched,
            # and a weight of zero meets a number, not what lies in a slot that is not in use.
            read_at = tl.minimum(keys_at, end_key - 1)
            if PAGE % KEYS == 0:  # a tile lies in one page
                page = tl.load(pages + (first_key + tile * KEYS) // PAGE).to(tl.int64)
                tile_cache = cache + page * cache_stride_page
                slots = (read_at % PAGE) * cache_stride_place
            else:
                tile_cache = cache
                page = tl.load(pages + read_at // PAGE).to(tl.int64)
                slots = page * cache_stride_page + (read_at % PAGE) * cache_stride_place
            latent = _read_keys(tile_cache, slots, columns, cache_stride_d, QUANTISED, NATIVE, DTYPE)
            rope = _read_keys(tile_cache, slots, LATENT + rope_columns, cache_stride_d, QUANTISED, NATIVE, DTYPE)
            if TRANSPOSED:
                scores = tl.dot(rope, pe)
                scores = tl.dot(latent, nope, scores) * scale
                seen = (keys_at < end_key)[:, None]
                if CAUSAL:
                    seen = seen & (keys_at[:, None] <= position[None, :])
                scores = tl.where(seen, scores, float("-inf"))
                new_top = tl.maximum(top, tl.max(scores, 0))
                base = tl.where(new_top == float("-inf"), 0.0, new_top)
                weights = tl.exp2(scores - base[None, :])
                fade = tl.exp2(top - base)
                total = total * fade + tl.sum(weights, 0)
                acc = acc * fade[None, :]
                acc = tl.dot(tl.trans(latent), weights.to(DTYPE), acc)
            else:
                scores = tl.dot(pe, tl.trans(rope))
                scores = tl.dot(nope, tl.trans(latent), scores) * scale
                seen = (keys_at < end_key)[None, :]
                if CAUSAL:
                    seen = seen & (keys_at[None, :] <= position[:, None])
                scores = tl.where(seen, scores, float("-inf"))
                new_top = tl.maximum(top, tl.max(scores, 1))
                base = tl.where(new_top == float("-inf"), 0.0, new_top)
                weights = tl.exp2(scores - base[:, None])
                fade = tl.exp2(top - base)
                total = total * fade + tl.sum(weights, 1)
                acc = acc * fade[:, None]
                acc = tl.dot(weights.to(DTYPE), latent, acc)
            top = new_top

        seen_any = total > 0.0
        inverse = 1.0 / tl.where(seen_any, total, 1.0)
        if QUANTISED:
            inverse = inverse * stored_scale
        natural = tl.where(seen_any, (top + tl.log2(total)) * LN2, float("-inf"))
        acc = acc * (inverse[None, :] if TRANSPOSED else inverse[:, None])
        if splits > 1:
            slot = first_partial + tl.where(item == first_item, split, 0)
            place = slot.to(tl.int64) * (HEAD_BLOCKS * ROWS) + flat
            tl.store(partial_lses + place, natural, mask=live)
            if TRANSPOSED:
                tl.store(partials + (place * LATENT)[None, :] + columns[:, None], acc, mask=live[None, :])
            else:
                tl.store(partials + (place * LATENT)[:, None] + columns[None, :], acc, mask=live[:, None])
        elif splits == 1:
            place = token * out_stride_t + head * out_stride_h
            if HAS_LSE:
                tl.store(lse + token * lse_stride_t + head * lse_stride_h, natural, mask=live)
            result = acc.to(out.dtype.element_ty)
            if TRANSPOSED:
                tl.store(out + place[None, :] + columns[:, None] * out_stride_d, result, mask=live[None, :])
            else:
                tl.store(out + place[:, None] + columns[None, :] * out_stride_d, result, mask=live[:, None])


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


def mla_tile(table: TileTable, heads: int, rank: int, cache_bytes: int, max_query: int) -> MlaTile:
    """The tile of a problem; a pure function.

    Args:
        table: of the device.
        heads: Hq.
        rank: C.
        cache_bytes: bytes of a cached element.
        max_query: the most queries of a row; 0 for no bound.
    """
    room = max(1, ROWS_AT_ONCE // heads)
    block = min(room, max_query) if max_query else room
    tile = table.tile("mla_decode", {"rows": block * heads, "rank": rank, "cache_bytes": cache_bytes})
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
        native_float8: whether the device converts e4m3 by itself.
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
        native_float8: bool,
        device: torch.device | str,
    ) -> None:
        tile = cut.tile
        shape = ScheduleShape(
            parts=parts_that_fit(multiprocessors, tile["programs"], cut.head_blocks),
            max_items=most_items(max_rows, max_tokens, cut.block, max_query),
            tile=tile["keys"],
            block=cut.block,
            minimum_share=tile["share"],
        )
        super().__init__(shape, max_rows, cut.head_blocks * tile["rows"], rank, device)
        self.cut = cut
        self.native_float8 = native_float8
        self.one = torch.ones(1, device=device)  # the scale of a cache that comes without


def workspace(
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
    mla_decode_kernel[(schedule.shape.parts * cut.head_blocks,)](
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
        *cache.stride(),
        step.pages.table.stride(0),
        *out.stride(),
        *(lse.stride() if lse is not None else (0, 0)),
        HEADS=heads,
        HEAD_BLOCKS=cut.head_blocks,
        LATENT=rank,
        ROPE=q_pe.shape[-1],
        PAGE=step.pages.page_size,
        ROWS=tile["rows"],
        KEYS=tile["keys"],
        TRANSPOSED=bool(tile["transposed"]),
        CAUSAL=causal and step.max_query > 1,
        QUANTISED=quantised,
        NATIVE=workspace.native_float8,
        HAS_TABLE_ROWS=step.pages.rows is not None,
        HAS_LSE=lse is not None,
        num_warps=tile["warps"],
        num_stages=tile["stages"],
    )
    merge_items(workspace, out, lse, cut.block * heads)
