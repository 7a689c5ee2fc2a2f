"""`mla_decode` on the device: `triton_decode` works through the parts of a schedule, one merge joins what was split.

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

from taut.common_kernels.base2 import LOG2E
from taut.common_kernels.merge.triton_launch import merge_items
from taut.common_kernels.mla_decode.triton_decode import taut_mla_decode
from taut.common_kernels.schedule.shape import ScheduleShape, most_items, parts_that_fit
from taut.common_kernels.schedule.triton_launch import launch_options
from taut.common_kernels.tiles import table_for
from taut.common_kernels.workspace import ScheduledWorkspace, device_facts

if TYPE_CHECKING:
    from torch import Tensor

    from taut.common_kernels.kernels import Workspace
    from taut.common_kernels.problem import Problem
    from taut.common_kernels.step import Step
    from taut.common_kernels.tiles import Tile, TileTable

ROWS_AT_ONCE = 64  # the most heads times queries in one tile


@dataclass(frozen=True)
class MlaTile:
    """How `mla_decode` is cut into tiles for one problem on one device.

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
        tiling: how the problem is cut into tiles.
        rank: C.
        max_rows: the most rows of a step.
        max_tokens: the most queries of a step.
        max_query: the most queries of a row; 0 for no bound.
        multiprocessors: of the device.
        native_float8: see `DeviceFacts`.
        early: whether the device can start a kernel before the one ahead of it has ended.
        device: where everything lies.
    """

    def __init__(
        self,
        tiling: MlaTile,
        rank: int,
        max_rows: int,
        max_tokens: int,
        max_query: int,
        multiprocessors: int,
        native_float8: str,
        early: bool,
        device: torch.device | str,
    ) -> None:
        tile = tiling.tile
        shape = ScheduleShape(
            parts=parts_that_fit(multiprocessors, tile["programs"], tiling.head_blocks),
            max_items=most_items(max_rows, max_tokens, tiling.block, max_query),
            cut=tile["keys"],
            block=tiling.block,
            minimum_share=tile["share"],
            spare=tile["spare"],
        )
        super().__init__(shape, max_rows, tiling.head_blocks * tile["rows"], rank, device)
        self.tiling = tiling
        self.native_float8 = native_float8
        self.early = early
        self.one = torch.ones(1, device=device)  # the scale of a cache that comes without


def mla_workspace(
    problem: Problem, max_rows: int, max_tokens: int, device: str, table_path: str | None = None
) -> MlaWorkspace:
    """A workspace of `mla_decode`; see `Kernels.workspace`. `table_path` names a tile table to use instead."""
    facts = device_facts(device)
    table = table_for(facts.target, facts.shared_memory, table_path)
    cache_bytes = getattr(torch, problem.cache_dtype).itemsize
    tiling = mla_tile(table, problem.q_heads, problem.value_size, cache_bytes, problem.max_query)
    return MlaWorkspace(
        tiling,
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
    tiling, tile, schedule, scratch = workspace.tiling, workspace.tiling.tile, workspace.schedule, workspace.scratch
    float8 = cache.dtype.itemsize == 1
    taut_mla_decode[(schedule.shape.parts * tiling.head_blocks,)](
        q_nope,
        q_pe,
        cache.view(torch.uint8) if float8 else cache,
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
        scale * LOG2E,
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
        HEAD_BLOCKS=tiling.head_blocks,
        LATENT=rank,
        ROPE=q_pe.shape[-1],
        PAGE_SIZE=step.pages.page_size,
        TOKEN_STRIDE=cache.stride(1),
        BLOCK_M=tile["rows"],
        BLOCK_N=tile["keys"],
        TRANSPOSED=bool(tile["transposed"]),
        CAUSAL=causal and step.max_query > 1,
        FLOAT8=float8,
        NATIVE_FLOAT8=workspace.native_float8,
        HAS_TABLE_ROWS=step.pages.rows is not None,
        HAS_LSE=lse is not None,
        SPREAD=bool(tile.get("spread", 0)),
        APART=bool(tile["apart"]),
        FAR=heads * max(*q_nope.stride(), *q_pe.stride(), *out.stride()) >= 2**31,
        EARLY=workspace.early,
        num_warps=tile["warps"],
        num_stages=tile["stages"],
        **launch_options(workspace.early),
    )
    merge_items(workspace, out, lse, tiling.block * heads, workspace.early)
