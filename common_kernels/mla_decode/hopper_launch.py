"""`mla_decode` on Hopper: as `triton_launch`, with a kernel in Gluon, see `hopper_decode`.

What a tile table tells, under `hopper_mla_decode`: facts as `mla_decode`; numbers `keys` (64), `rows` (64, 32, 16 or
8: heads times queries of a program), `stages` of the ring (2 for 64 rows), `registers` of a thread that computes where
keys come in boxes and `gather_registers` where threads bring them (these have what remains of 504), and `programs`,
`share` and `spare` as there.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from taut.common_kernels import base2
from taut.common_kernels.merge.triton_launch import merge_items
from taut.common_kernels.mla_decode.hopper_decode import taut_mla_decode
from taut.common_kernels.mla_decode.hopper_ring import HALF_COLUMNS, ROPE_COLUMNS, TILE_KEYS
from taut.common_kernels.mla_decode.triton_launch import MlaWorkspace, mla_tile
from taut.common_kernels.schedule.triton_launch import launch_options
from taut.common_kernels.tiles import table_for
from taut.common_kernels.workspace import device_facts

if TYPE_CHECKING:
    from torch import Tensor

    from taut.common_kernels.kernels import Workspace
    from taut.common_kernels.problem import Problem
    from taut.common_kernels.step import Step


class HopperMlaWorkspace(MlaWorkspace):
    """The workspace of `mla_decode`, with the cache of every layer as boxes for the tensor memory accelerator."""

    @cached_property
    def _boxes(self) -> dict[tuple[object, ...], tuple[TensorDescriptor, TensorDescriptor]]:
        return {}

    def boxes(self, cache: Tensor) -> tuple[TensorDescriptor, TensorDescriptor]:
        """A layer's cache as boxes of 64 keys and 256 columns, and of 64 and 64. Only where it `comes_in_boxes`.

        All keys of all pages stand in one line, with a gap of so many keys between two pages as is there in memory.
        Made once for a layer and kept, and the cache with it.
        """
        key = (cache.data_ptr(), cache.dtype, *cache.shape, *cache.stride())
        if key not in self._boxes:
            pages, page_size, width = cache.shape
            page_stride, slot_stride, _ = cache.stride()
            shape = [(pages - 1) * (page_stride // slot_stride) + page_size, width]
            layout = gl.NVMMASharedLayout(128, 16, rank=2)
            self._boxes[key] = (
                TensorDescriptor(cache, shape, [slot_stride, 1], [TILE_KEYS, HALF_COLUMNS], layout),
                TensorDescriptor(cache, shape, [slot_stride, 1], [TILE_KEYS, ROPE_COLUMNS], layout),
            )
        return self._boxes[key]


def comes_in_boxes(cache: Tensor) -> bool:
    """Whether TMA can bring this cache: 64 keys of one page at a time, from a line of keys at regular distances."""
    _, page_size, _ = cache.shape
    page_stride, slot_stride, column_stride = cache.stride()
    size = cache.dtype.itemsize
    return (
        size == 2
        and page_size % TILE_KEYS == 0
        and column_stride == 1
        and slot_stride * size % 16 == 0
        and page_stride % slot_stride == 0
        and cache.data_ptr() % 16 == 0
    )


def comes_in_sixteens(cache: Tensor) -> bool:
    """Whether threads can copy 16 bytes of this cache at a time, as far as Triton knows: it looks for factors of 16."""
    page_stride, slot_stride, column_stride = cache.stride()
    return column_stride == 1 and slot_stride % 16 == 0 and page_stride % 16 == 0 and cache.data_ptr() % 16 == 0


def lies_in_sixteens(rows: Tensor) -> bool:
    """Whether 16 bytes of [T, H, D] can be read or written at a time: D is dense, and every row of it begins so."""
    eight = 16 // rows.dtype.itemsize
    token, head, column = rows.stride()
    return column == 1 and token % eight == 0 and head % eight == 0 and rows.data_ptr() % 16 == 0


def mla_workspace(
    problem: Problem, max_rows: int, max_tokens: int, device: str, table_path: str | None = None
) -> MlaWorkspace:
    """A workspace of `mla_decode`; see `Kernels.workspace`. `table_path` names a tile table to use instead."""
    facts = device_facts(device)
    table = table_for(facts.target, facts.shared_memory, table_path)
    cache_bytes = getattr(torch, problem.cache_dtype).itemsize
    tiling = mla_tile(table, problem.q_heads, problem.value_size, cache_bytes, problem.max_query, "hopper_mla_decode")
    return HopperMlaWorkspace(
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
    if not isinstance(workspace, HopperMlaWorkspace):
        raise TypeError("mla_decode of the provider `hopper` needs the workspace that its `workspace` makes")
    tokens, heads, _ = q_nope.shape
    tiling, tile, schedule, scratch = workspace.tiling, workspace.tiling.tile, workspace.schedule, workspace.scratch
    float8 = cache.dtype.itemsize == 1
    boxed = comes_in_boxes(cache)
    latent_boxes, rope_boxes = workspace.boxes(cache) if boxed else (None, None)
    taut_mla_decode[(schedule.shape.parts * tiling.head_blocks,)](
        q_nope,
        q_pe,
        cache.view(torch.uint8) if float8 else cache,
        latent_boxes,
        rope_boxes,
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
        scale * base2.LOG2E,
        step.rows,
        tokens,
        schedule.shape.parts,
        *q_nope.stride(),
        *q_pe.stride(),
        *cache.stride()[:2],
        cache.stride(0) // cache.stride(1),
        step.pages.table.stride(0),
        *out.stride(),
        *(lse.stride() if lse is not None else (0, 0)),
        HEADS=heads,
        HEAD_BLOCKS=tiling.head_blocks,
        BLOCK_M=tile["rows"],
        PAGE_SIZE=step.pages.page_size,
        CAUSAL=causal and step.max_query > 1,
        BOXES=boxed,
        GATHERS=not boxed and not float8 and comes_in_sixteens(cache),
        QUERY_SIXTEENS=lies_in_sixteens(q_nope) and lies_in_sixteens(q_pe),
        OUT_SIXTEENS=lies_in_sixteens(out),
        FLOAT8=float8,
        HAS_TABLE_ROWS=step.pages.rows is not None,
        HAS_LSE=lse is not None,
        EARLY=workspace.early,
        STAGES=tile["stages"],
        REGISTERS=tile["registers"] if boxed else tile["gather_registers"],
        num_warps=4,
        maxnreg=168,
        **launch_options(workspace.early),
    )
    merge_items(workspace, out, lse, tiling.block * heads, workspace.early)
