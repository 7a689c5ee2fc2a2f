"""`paged_attention` and `ragged_attention` on the device.

Rows with few new tokens (decode, speculative verification, the tail of a chunk) go to `triton_decode`, where their
keys are shared out over the whole device by the schedule; rows with more go to `triton_prefill`, where their blocks of
queries fill it. A step whose rows may have many queries launches both, and each passes over the other's rows.

What a tile table tells (see `tiles`), under `paged_decode` and `paged_prefill`. Facts: `rows` (queries times query
heads that share keys; prefill: query heads that share keys), `key_bytes` (of one cached key and its value, for one
head), `element_bytes` (of a query's element) and `float8` (0 or 1). Numbers of both: `rows` and `keys` of a tile,
`warps`, `stages` of the pipeline. Of decode: `cut` (may be left out for `keys`), the keys of a tile of the schedule, of
which `keys` is a multiple, so that short rows are shared out finer than the kernel's loop goes; `programs` that share a
multiprocessor; `share`, how many times `cut` keys are worth a part of their own; and `spare`, the tiles that a part may
have more where rows are then not split. Of prefill: `pack`, how many heads that share their keys are taken together.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import triton

from taut.common_kernels.kernels import NoWorkspace
from taut.common_kernels.merge.triton_launch import merge_items
from taut.common_kernels.paged_attention.triton_decode import taut_decode
from taut.common_kernels.paged_attention.triton_prefill import taut_prefill
from taut.common_kernels.schedule.shape import ScheduleShape, most_items, parts_that_fit
from taut.common_kernels.schedule.triton_launch import launch_options
from taut.common_kernels.step import DECODE_QUERIES
from taut.common_kernels.tiles import table_for
from taut.common_kernels.workspace import ScheduledWorkspace, device_facts

if TYPE_CHECKING:
    from torch import Tensor

    from taut.common_kernels.kernels import Workspace
    from taut.common_kernels.problem import Problem
    from taut.common_kernels.step import Mask, Step
    from taut.common_kernels.tiles import Tile, TileTable

CACHED_KEYS = 24 << 20  # bytes of keys and values that an L2 cache holds for sure, beside all else
# Blocks of queries that run at once over the same keys: reading those from memory then takes little of the time.
SHARERS = 16
MERGED_BY_LAST = 64 * 1024  # numbers in the most partials of a query that one program merges
MERGED_AT_ONCE = 8 * 1024  # numbers of them that it reads together


def halves(size: int) -> tuple[int, int]:
    """A head size as two powers of two, the second 0 where one is enough: 128 -> (128, 0), 192 -> (128, 64).

    Raises:
        ValueError: it is no such sum, or a part has fewer than 16 elements, the least that a tensor core takes.
    """
    main = 1 << (size.bit_length() - 1)
    tail = size - main
    if main < 16 or tail & (tail - 1) or 0 < tail < 16:
        raise ValueError(f"head size {size} is not a sum of two powers of two from 16")
    return main, tail


def tile_facts(rows: int, head_size: int, value_size: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> Tile:
    """What the tile table is asked with; see this module's text."""
    return {
        "rows": rows,
        "key_bytes": (head_size + value_size) * cache_dtype.itemsize,
        "element_bytes": dtype.itemsize,
        "float8": int(cache_dtype.itemsize == 1),
    }


class PagedWorkspace(ScheduledWorkspace):
    """The workspace of `paged_attention`.

    Args:
        shape: of the schedule.
        tile: of the decode kernel.
        pack: query heads of a group that share a program.
        head_blocks: programs that the heads of an item are cut into.
        max_rows: the most rows of a step.
        q_heads: Hq.
        value_size: V.
        table_path: the tile table that the user named, if any.
        device: where everything lies.

    Attributes:
        arrivals: [items, head blocks] int32: how many parts of a split item are done. Zeros between launches. None
            where merging an item may be too much for one program.
        merge_chunk: partials that such a program reads together.
    """

    def __init__(
        self,
        shape: ScheduleShape,
        tile: Tile,
        pack: int,
        head_blocks: int,
        max_rows: int,
        q_heads: int,
        value_size: int,
        table_path: str | None,
        device: torch.device | str,
    ) -> None:
        super().__init__(shape, max_rows, shape.block * q_heads, value_size, device)
        self.tile = tile
        self.pack = pack
        self.table_path = table_path
        columns, rows = triton.next_power_of_2(value_size), triton.next_power_of_2(pack)
        self.merge_chunk = min(triton.next_power_of_2(shape.parts), max(1, MERGED_AT_ONCE // (rows * columns)))
        self.arrivals: Tensor | None = None
        if shape.parts * pack * value_size <= MERGED_BY_LAST:
            self.arrivals = torch.zeros(shape.max_items, head_blocks, dtype=torch.int32, device=device)

    @property
    def size_in_bytes(self) -> int:
        """Device memory that it holds."""
        return super().size_in_bytes + (0 if self.arrivals is None else self.arrivals.nbytes)


def decode_tiling(table: TileTable, operation: str, group: int, max_query: int, facts: Tile) -> tuple[Tile, int, int]:
    """The tile of the decode kernel, the query heads that share a program, and the queries of a work item.

    Args:
        table: of the device.
        operation: under which the table has the kernel's tiles.
        group: query heads of one key-value head.
        max_query: the most queries of a row; 0 for no bound, then most rows are taken to have one.
        facts: of the problem; their rows are set here.
    """
    wanted = min(max_query or 1, DECODE_QUERIES)
    tile = table.tile(operation, {**facts, "rows": group * wanted})
    pack = min(group, tile["rows"])
    block = tile["rows"] // pack
    return tile, pack, min(block, max_query) if max_query else min(block, DECODE_QUERIES)


def paged_workspace(
    problem: Problem,
    max_rows: int,
    max_tokens: int,
    device: str,
    table_path: str | None = None,
    left: int = -1,
    operation: str = "paged_decode",
) -> PagedWorkspace:
    """A workspace of `paged_attention`; see `Kernels.workspace`.

    Args:
        problem: what is asked for.
        max_rows: the most rows of a step.
        max_tokens: the most queries of a step.
        device: where it lies.
        table_path: another tile table than the built-in one.
        left: how far back the layers see that share it, where all of them have a window; -1 otherwise.
        operation: under which a tile table has the tiles of the decode kernel.
    """
    device_has = device_facts(device)
    table = table_for(device_has.target, device_has.shared_memory, table_path)
    group = problem.q_heads // problem.kv_heads
    dtype, cache_dtype = getattr(torch, problem.dtype), getattr(torch, problem.cache_dtype)
    facts = tile_facts(group, problem.head_size, problem.value_size, dtype, cache_dtype)
    tile, pack, block = decode_tiling(table, operation, group, problem.max_query, facts)
    head_blocks = problem.kv_heads * triton.cdiv(group, pack)
    cut = tile.get("cut", tile["keys"])
    whole_pages = problem.page_size % tile["keys"] == 0  # then a round of the loop lies in one page, if it begins so
    scheduled = tile["keys"] if whole_pages else cut
    shape = ScheduleShape(
        parts=parts_that_fit(device_has.multiprocessors, tile["programs"], head_blocks),
        max_items=most_items(max_rows, max_tokens, block, min(problem.max_query or DECODE_QUERIES, DECODE_QUERIES)),
        cut=scheduled,
        block=block,
        left=left,
        right=0 if "non_causal" not in problem.features else -1,
        minimum_share=max(1, tile["share"] * cut // scheduled),
        spare=tile["spare"],
        longest=DECODE_QUERIES,
    )
    return PagedWorkspace(
        shape, tile, pack, head_blocks, max_rows, problem.q_heads, problem.value_size, table_path, device
    )


@lru_cache
def prefill_tile(
    device: str, table_path: str | None, group: int, sizes: tuple[int, int], dtypes: tuple[Any, Any]
) -> Tile:
    """The tile of the prefill kernel; sizes of keys and values, dtypes of queries and cache."""
    facts = device_facts(device)
    table = table_for(facts.target, facts.shared_memory, table_path)
    return table.tile("paged_prefill", tile_facts(group, *sizes, *dtypes))


def compiled_for(mask: Mask, query: Tensor, value: Tensor, native_float8: str) -> dict[str, Any]:
    """What both kernels are compiled for: the mask's kinds, head sizes, float8, the precision of products."""
    head_main, head_tail = halves(query.shape[-1])
    value_main, value_tail = halves(value.shape[-1])
    precision = "ieee"
    if query.dtype == torch.float32 and torch.version.cuda and query.is_cuda:
        precision = "tf32x3"  # three products of the tensor cores: as good as float32's own, and far faster
    return {
        "CAUSAL": mask.causal,
        "HAS_LEFT": mask.left >= 0,
        "HAS_RIGHT": mask.right >= 0 and not mask.causal,
        "HAS_SOFT_CAP": mask.soft_cap > 0,
        "HEAD_MAIN": head_main,
        "HEAD_TAIL": head_tail,
        "VALUE_MAIN": value_main,
        "VALUE_TAIL": value_tail,
        "FLOAT8": value.dtype.itemsize == 1,
        "NATIVE_FLOAT8": native_float8,
        "PRECISION": precision,
    }


def as_stored(cache: Tensor) -> Tensor:
    """A float8 cache as bytes, since not every target has the type; any other as it is."""
    return cache.view(torch.uint8) if cache.dtype.itemsize == 1 else cache


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
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    workspace: Workspace | None = None,
) -> None:
    """See `Kernels.paged_attention`. Needs a workspace made by `workspace` and prepared for `step`."""
    if not isinstance(workspace, PagedWorkspace):
        raise TypeError("paged_attention of the provider `triton` needs the workspace that its `workspace` makes")
    if query.shape[0] == 0:
        return
    longest = workspace.schedule.shape.longest
    extends = step.max_query > longest
    options: dict[str, Any] = {
        "scale": scale,
        "lse": lse,
        "key_scale": key_scale,
        "value_scale": value_scale,
        "sinks": sinks,
        "alibi_slopes": alibi_slopes,
    }
    if extends:
        group = query.shape[1] // key_cache.shape[2]
        tile = prefill_tile(
            str(query.device),
            workspace.table_path,
            group,
            (query.shape[2], value_cache.shape[3]),
            (query.dtype, key_cache.dtype),
        )
        prefill(query, key_cache, value_cache, step, mask, out, tile, more_than=longest, **options)
    decode(query, key_cache, value_cache, step, mask, out, workspace, padding=not extends, **options)


def decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    step: Step,
    mask: Mask,
    out: Tensor,
    workspace: PagedWorkspace,
    *,
    padding: bool,
    scale: float,
    lse: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> None:
    """Serve the rows of a schedule: `taut_decode`, then the merge of what was split.

    Args:
        padding: whether queries past the last row are written here.
        others: as in `Kernels.paged_attention`.
    """
    tokens, q_heads, _ = query.shape
    kv_heads = key_cache.shape[2]
    group = q_heads // kv_heads
    schedule, scratch, tile = workspace.schedule, workspace.scratch, workspace.tile
    pages = step.pages
    device_has = device_facts(str(query.device))
    # The merge may be launched while the programs of this kernel still run: then it waits for them on the device.
    # With an item for every two parts, few items are split, and among few: the last of an item's parts merges it, which
    # saves a launch. With fewer items, all are split, and are merged sooner all over the device.
    merged_by_last = 2 * workspace.items > schedule.shape.parts and workspace.arrivals is not None
    releases = device_has.dependent_launch and not merged_by_last
    taut_decode[(kv_heads * triton.cdiv(group, workspace.pack), schedule.shape.parts)](
        query,
        as_stored(key_cache),
        as_stored(value_cache),
        out,
        lse,
        scratch.partials,
        scratch.lses,
        workspace.arrivals if merged_by_last else None,
        key_scale,
        value_scale,
        sinks,
        alibi_slopes,
        schedule.items,
        schedule.parts,
        step.query_starts,
        pages.table,
        pages.rows,
        tokens,
        step.rows,
        scale,
        mask.soft_cap,
        mask.left,
        mask.right,
        *query.stride(),
        *key_cache.stride(),
        *value_cache.stride(),
        *out.stride(),
        *(lse.stride() if lse is not None else (0, 0)),
        pages.table.stride(0),
        Q_HEADS=q_heads,
        GROUP=group,
        PACK=workspace.pack,
        QUERIES=schedule.shape.block,
        MERGE_ROWS=triton.next_power_of_2(workspace.pack),
        MERGE_CHUNK=workspace.merge_chunk,
        EARLY=device_has.dependent_launch,
        RELEASES=releases,
        PADDING=padding,
        KEY_HEAD_SCALES=key_scale is not None and key_scale.numel() > 1,
        VALUE_HEAD_SCALES=value_scale is not None and value_scale.numel() > 1,
        PAGE_SIZE=pages.page_size,
        SAME_STRIDES=key_cache.stride() == value_cache.stride(),
        BLOCK_M=tile["rows"],
        BLOCK_N=tile["keys"],
        CUT=schedule.shape.cut,
        STAGES=tile["stages"],
        **compiled_for(mask, query, value_cache, device_has.native_float8),
        num_warps=tile["warps"],
        num_stages=tile["stages"],
        **launch_options(device_has.dependent_launch),
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
    max_query: int,  # noqa: ARG001 - the grid follows the number of queries
    max_length: int,
    lse: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    workspace: Workspace | None = None,
) -> None:
    """See `Kernels.ragged_attention`. Needs no workspace; the one it is given may name a tile table."""
    if query.shape[0] == 0:
        return
    group = query.shape[1] // key.shape[1]
    table_path = workspace.table_path if isinstance(workspace, NoWorkspace) else None
    sizes, dtypes = (query.shape[2], value.shape[2]), (query.dtype, key.dtype)
    tile = prefill_tile(str(query.device), table_path, group, sizes, dtypes)
    launch_prefill(
        query,
        key,
        value,
        query_starts,
        key_starts,
        mask,
        out,
        tile,
        (0, *key.stride()),
        (0, *value.stride()),
        scale=scale,
        max_length=max_length,
        lse=lse,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
    )


def heads_together(key: Tensor, value: Tensor, max_length: int, programs: int, device: str) -> int:
    """How many key-value heads the prefill kernel serves at a time.

    Every block of queries reads its head's keys again. Where all of many heads are served at a time, the blocks that
    run at once share few keys, and the L2 cache holds nobody's for long: memory is read once for every block. Too few
    heads at a time leave the GPU idle at the end, where the last blocks of the last heads differ in length.

    Args:
        key, value: [*, Hk, D], [*, Hk, V].
        max_length: the most keys of a row.
        programs: of one head.
        device: "cuda:0".
    """
    heads, multiprocessors = key.shape[-2], device_facts(device).multiprocessors
    of_a_head = max_length * (key.shape[-1] + value.shape[-1]) * key.dtype.itemsize
    cached = CACHED_KEYS // max(1, of_a_head)
    busy_at_the_end = -(-2 * multiprocessors // programs)
    together = max(1, cached, multiprocessors // SHARERS, busy_at_the_end)
    return int(-(-heads // -(-heads // together)))  # groups of heads of one size


def prefill(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    step: Step,
    mask: Mask,
    out: Tensor,
    tile: Tile,
    *,
    more_than: int,
    **options: Any,
) -> None:
    """Serve the rows of a step that have more than so many queries, and write the padding past the last row."""
    launch_prefill(
        query,
        as_stored(key_cache),
        as_stored(value_cache),
        step.query_starts,
        step.lengths,
        mask,
        out,
        tile,
        key_cache.stride(),
        value_cache.stride(),
        table=step.pages.table,
        table_rows=step.pages.rows,
        page_size=step.pages.page_size,
        max_length=step.max_length,
        more_than=more_than,
        **options,
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
    key_strides: tuple[int, ...],
    value_strides: tuple[int, ...],
    *,
    scale: float,
    max_length: int,
    lse: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    table: Tensor | None = None,
    table_rows: Tensor | None = None,
    page_size: int = 1,
    more_than: int = 0,
) -> None:
    """Launch `taut_prefill`: over a cache [N, P, Hk, D] if there is a page table, else over keys [K, Hk, D].

    Args:
        lengths: [R]; without a table the starts of each row's keys, [R + 1].
        key_strides: of page, token, head, element; the page's is of no meaning without a table.
        max_length: of the keys of a row.
        others: as in `Kernels.paged_attention`.
    """
    tokens, q_heads, _ = query.shape
    kv_heads = key.shape[-2]
    group = q_heads // kv_heads
    rows = query_starts.shape[0] - 1
    pack = min(tile["pack"], group)
    blocks = tokens // (tile["rows"] // pack) + rows + 1  # see `row_of_block`; one more row for the padding
    packs = triton.cdiv(group, pack)
    taut_prefill[(kv_heads * packs * blocks,)](
        query,
        key,
        value,
        out,
        lse,
        key_scale,
        value_scale,
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
        scale,
        mask.soft_cap,
        mask.left,
        mask.right,
        *query.stride(),
        *key_strides,
        *value_strides,
        *out.stride(),
        *(lse.stride() if lse is not None else (0, 0)),
        table.stride(0) if table is not None else 0,
        GROUP=group,
        PACK=pack,
        MORE_THAN=more_than,
        KEY_HEAD_SCALES=key_scale is not None and key_scale.numel() > 1,
        VALUE_HEAD_SCALES=value_scale is not None and value_scale.numel() > 1,
        PAGED=table is not None,
        PAGE_SIZE=page_size,
        SAME_STRIDES=key_strides == value_strides,
        BLOCK_M=tile["rows"],
        BLOCK_N=tile["keys"],
        STAGES=tile["stages"],
        **compiled_for(mask, query, value, device_facts(str(query.device)).native_float8),
        num_warps=tile["warps"],
        num_stages=tile["stages"],
    )
