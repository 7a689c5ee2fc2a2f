"""`paged_attention` and `ragged_attention` on Hopper: as `triton_launch`, with kernels in Gluon.

What a tile table tells (see `tiles`), under `hopper_paged_decode` and `hopper_paged_prefill`; facts as there. Numbers
of both: `keys` of a tile; `stages` of the ring; registers of a thread that loads, `load_registers` where the copy
engine does the work and `gather_registers` where the threads copy themselves: the threads that attend get the others.
Of decode: `rows`, columns of the products, and as there `cut`, `programs`, `share`, `spare`. Of prefill: `rows` of a
program, 128 or with heads of 64 also 192 (128 in any case where registers are wanting: where threads copy, and with
assemblers that do not move them), and `pack`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from taut.common_kernels.gluon_features import registers_can_move
from taut.common_kernels.kernels import NoWorkspace
from taut.common_kernels.merge.triton_launch import merge_items
from taut.common_kernels.paged_attention import triton_launch
from taut.common_kernels.paged_attention.hopper_decode import taut_decode
from taut.common_kernels.paged_attention.hopper_prefill import taut_prefill
from taut.common_kernels.paged_attention.hopper_ring import COLUMNS_OF_BOX, ELEMENTS_OF_PIECE
from taut.common_kernels.paged_attention.triton_launch import halves, heads_together, tile_facts
from taut.common_kernels.schedule.triton_launch import launch_options
from taut.common_kernels.tiles import table_for
from taut.common_kernels.workspace import device_facts

if TYPE_CHECKING:
    from torch import Tensor

    from taut.common_kernels.kernels import Workspace
    from taut.common_kernels.problem import Problem
    from taut.common_kernels.step import Mask, Step
    from taut.common_kernels.tiles import Tile

SMALLEST_BOX = 16  # keys: smaller pages are gathered
ALIGNMENT = 16  # bytes, of whatever is copied

REGISTERS = 64 * 1024  # of a multiprocessor
MOST_REGISTERS = 248  # that a thread may be compiled for
ROWS_OF_WARPGROUP = 64  # of the prefill kernel
# What one thread of each warpgroup of the prefill kernel share, by how many attend; one more loads. They begin alike,
# with a multiple of 8 each.
REGISTERS_OF_ALL = {2: 3 * 168, 3: 4 * 128}
DECODE_THREADS = 8 * 32  # of a program of the decode kernel: warps come in fours, those that load too


def paged_workspace(
    problem: Problem, max_rows: int, max_tokens: int, device: str, table_path: str | None = None, left: int = -1
) -> triton_launch.PagedWorkspace:
    """A workspace of `paged_attention`; see `triton_launch.paged_workspace`."""
    return triton_launch.paged_workspace(problem, max_rows, max_tokens, device, table_path, left, "hopper_paged_decode")


def box_of(page_size: int, keys: int) -> int:
    """Keys that the copy engine brings at once for a tile of so many; 0 where pages are too small or odd for it."""
    if page_size % keys == 0:
        return keys
    return page_size if page_size >= SMALLEST_BOX and keys % page_size == 0 else 0


def unreachable(query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> str:
    """Why the kernels cannot read or write these as they lie in memory; empty when they can."""
    for name, tensor in (("keys", key), ("values", value)):
        strides = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1][:-1]
        if tensor.data_ptr() % ALIGNMENT or any(stride % ELEMENTS_OF_PIECE for stride in strides):
            return f"{name} that begin at multiples of {ALIGNMENT} bytes, not strides {tensor.stride()}"
    for name, tensor in (("queries", query), ("keys", key), ("values", value), ("an output", out)):
        if tensor.stride(-1) != 1:
            return f"{name} whose elements lie side by side, not strides {tensor.stride()}"
    return ""


def in_pieces(keys: Tensor) -> list[int]:
    """The strides of page, token and head of keys or values, in copies of 16 bytes."""
    return [stride // ELEMENTS_OF_PIECE for stride in keys.stride()[:3]]


def boxes_of(keys: Tensor, box: int) -> TensorDescriptor:
    """Keys or values [pages, P, Hk, D] for the copy engine, [pages, Hk, P, D] in boxes of some keys and 64 columns."""
    by_head = keys.permute(0, 2, 1, 3)
    # The stride of a dimension of one is of no meaning, and may be none that the engine takes.
    strides = [stride if size > 1 else ALIGNMENT for size, stride in zip(by_head.shape, by_head.stride(), strict=True)]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(keys, list(by_head.shape), [*strides[:-1], 1], [1, 1, box, COLUMNS_OF_BOX], layout)


def prefill_tile(query: Tensor, key: Tensor, value: Tensor, table_path: str | None) -> Tile:
    """The tile of the prefill kernel."""
    facts = device_facts(str(query.device))
    table = table_for(facts.target, facts.shared_memory, table_path)
    group = query.shape[1] // key.shape[-2]
    return table.tile(
        "hopper_paged_prefill", tile_facts(group, query.shape[-1], value.shape[-1], query.dtype, key.dtype)
    )


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    step: Step,
    mask: Mask,
    out: Tensor,
    *,
    scale: float,
    lse: Tensor | None = None,
    key_scale: Tensor | None = None,  # noqa: ARG001 - of quantised caches, which this provider leaves to `triton`
    value_scale: Tensor | None = None,  # noqa: ARG001
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    workspace: Workspace | None = None,
) -> None:
    """See `Kernels.paged_attention`. Needs a workspace made by `workspace` and prepared for `step`."""
    if not isinstance(workspace, triton_launch.PagedWorkspace):
        raise TypeError("paged_attention of the provider `hopper` needs the workspace that its `workspace` makes")
    if query.shape[0] == 0:
        return
    reason = unreachable(query, key_cache, value_cache, out)
    if reason:
        raise ValueError(f"the provider `hopper` takes {reason}; TAUT_KERNELS=triton takes any")
    longest = workspace.schedule.shape.longest
    extends = step.max_query > longest
    options: dict[str, Any] = {"scale": scale, "lse": lse, "sinks": sinks, "alibi_slopes": alibi_slopes}
    if extends:
        tile = prefill_tile(query, key_cache, value_cache, workspace.table_path)
        launch_prefill(
            query,
            key_cache,
            value_cache,
            step.query_starts,
            step.lengths,
            mask,
            out,
            tile,
            table=step.pages.table,
            table_rows=step.pages.rows,
            page_size=step.pages.page_size,
            max_length=step.max_length,
            more_than=longest,
            **options,
        )
    decode(query, key_cache, value_cache, step, mask, out, workspace, padding=not extends, **options)


def decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    step: Step,
    mask: Mask,
    out: Tensor,
    workspace: triton_launch.PagedWorkspace,
    *,
    padding: bool,
    scale: float,
    lse: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> None:
    """Serve the rows of a schedule: `taut_decode`, then the merge of what was split; see `triton_launch.decode`."""
    tokens, q_heads, _ = query.shape
    kv_heads = key_cache.shape[2]
    group = q_heads // kv_heads
    schedule, scratch, tile = workspace.schedule, workspace.scratch, workspace.tile
    pages = step.pages
    box = box_of(pages.page_size, tile["keys"])
    head_main, head_tail = halves(query.shape[2])
    early = device_facts(str(query.device)).dependent_launch
    merged_by_last = 2 * workspace.items > schedule.shape.parts and workspace.arrivals is not None
    releases = early and not merged_by_last
    taut_decode[(kv_heads * triton.cdiv(group, workspace.pack), schedule.shape.parts)](
        query,
        boxes_of(key_cache, box) if box else key_cache,
        boxes_of(value_cache, box) if box else value_cache,
        out,
        lse,
        scratch.partials,
        scratch.lses,
        workspace.arrivals if merged_by_last else None,
        sinks,
        alibi_slopes,
        schedule.items,
        schedule.parts,
        step.query_starts,
        pages.table,
        pages.rows,
        tokens,
        step.rows,
        key_cache.shape[0],
        scale,
        mask.soft_cap,
        mask.left,
        mask.right,
        *query.stride()[:2],
        *in_pieces(key_cache),
        *in_pieces(value_cache),
        *out.stride()[:2],
        *(lse.stride() if lse is not None else (0, 0)),
        pages.table.stride(0),
        Q_HEADS=q_heads,
        GROUP=group,
        PACK=workspace.pack,
        QUERIES=schedule.shape.block,
        EARLY=early,
        RELEASES=releases,
        PADDING=padding,
        CAUSAL=mask.causal,
        HAS_LEFT=mask.left >= 0,
        HAS_RIGHT=mask.right >= 0 and not mask.causal,
        HAS_SOFT_CAP=mask.soft_cap > 0,
        PAGE_SIZE=pages.page_size,
        BOX=box,
        BLOCK_M=tile["rows"],
        BLOCK_N=tile["keys"],
        CUT=schedule.shape.cut,
        HEAD_MAIN=head_main,
        HEAD_TAIL=head_tail,
        STAGES=tile["stages"],
        LOAD_REGISTERS=tile["load_registers" if box else "gather_registers"],
        num_warps=4,
        maxnreg=min(MOST_REGISTERS, REGISTERS // (DECODE_THREADS * tile["programs"])),
        **launch_options(early),
    )
    if not merged_by_last:
        merge_items(workspace, out, lse, schedule.shape.block * q_heads, releases)


def ragged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    mask: Mask,
    out: Tensor,
    *,
    scale: float,
    max_query: int,
    max_length: int,
    lse: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    workspace: Workspace | None = None,
) -> None:
    """See `Kernels.ragged_attention`. Needs no workspace; the one it is given may name a tile table.

    Keys that the copy engine cannot be pointed at (an odd stride, none at all) are left to the kernel of `triton`.
    """
    if query.shape[0] == 0:
        return
    if len(key) == 0 or unreachable(query, key, value, out):
        triton_launch.ragged_attention(
            query,
            key,
            value,
            query_starts,
            key_starts,
            mask,
            out,
            scale=scale,
            max_query=max_query,
            max_length=max_length,
            lse=lse,
            sinks=sinks,
            alibi_slopes=alibi_slopes,
            workspace=workspace,
        )
        return
    launch_prefill(
        query,
        key[None],
        value[None],
        query_starts,
        key_starts,
        mask,
        out,
        prefill_tile(query, key, value, workspace.table_path if isinstance(workspace, NoWorkspace) else None),
        scale=scale,
        max_length=max_length,
        lse=lse,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
    )


def launch_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    mask: Mask,
    out: Tensor,
    tile: Tile,
    *,
    scale: float,
    max_length: int,
    lse: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    table: Tensor | None = None,
    table_rows: Tensor | None = None,
    page_size: int = 0,
    more_than: int = 0,
) -> None:
    """Launch `taut_prefill`: over a cache [N, P, Hk, D] if there is a page table, else over keys [1, K, Hk, D].

    Args:
        lengths: [R]; without a table the starts of each row's keys, [R + 1].
        max_length: of the keys of a row.
        page_size: 0 without a table.
        more_than: rows with no more queries than this are left out.
        others: as in `Kernels.paged_attention`.
    """
    tokens, q_heads, _ = query.shape
    kv_heads = key.shape[2]
    group = q_heads // kv_heads
    rows = query_starts.shape[0] - 1
    pack = min(tile["pack"], group & -group)  # of powers of two, the largest that divides the group
    box = box_of(page_size, tile["keys"])
    head_main, head_tail = halves(query.shape[2])
    loading = tile["load_registers" if box else "gather_registers"]
    warpgroups = tile["rows"] // ROWS_OF_WARPGROUP if box and registers_can_move() else 2
    queries = warpgroups * ROWS_OF_WARPGROUP // pack  # of a block
    blocks = tokens // queries + rows + 1  # see `row_of_block`; one more row for the padding
    packs = group // pack
    taut_prefill[(kv_heads * packs * blocks,)](
        query,
        boxes_of(key, box) if box else key,
        boxes_of(value, box) if box else value,
        out,
        lse,
        sinks,
        alibi_slopes,
        query_starts,
        lengths,
        table,
        table_rows,
        tokens,
        rows,
        kv_heads * packs,
        heads_together(key, value, max_length, packs * blocks, str(query.device)) * packs,
        key.shape[0],
        scale,
        mask.soft_cap,
        mask.left,
        mask.right,
        *query.stride()[:2],
        # The copy engine knows strides by itself: no instance is compiled for one's being a multiple of 16.
        *(in_pieces(key) if not box else (0, 0, 0)),
        *(in_pieces(value) if not box else (0, 0, 0)),
        *out.stride()[:2],
        *(lse.stride() if lse is not None else (0, 0)),
        table.stride(0) if table is not None else 0,
        GROUP=group,
        PACK=pack,
        MORE_THAN=more_than,
        CAUSAL=mask.causal,
        HAS_LEFT=mask.left >= 0,
        HAS_RIGHT=mask.right >= 0 and not mask.causal,
        HAS_SOFT_CAP=mask.soft_cap > 0,
        PAGED=table is not None,
        PAGE_SIZE=page_size,
        BOX=box,
        BLOCK_N=tile["keys"],
        HEAD_MAIN=head_main,
        HEAD_TAIL=head_tail,
        WARPGROUPS=warpgroups,
        STAGES=tile["stages"],
        REGISTERS=(REGISTERS_OF_ALL[warpgroups] - loading) // (8 * warpgroups) * 8,
        LOAD_REGISTERS=loading,
        num_warps=4,
    )
