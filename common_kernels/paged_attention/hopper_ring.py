"""The ring of shared memory that the Hopper kernels of this operation read keys and values from, and how it is filled.

A stage holds one tile: BLOCK_N keys and their values, each in blocks of 64 columns, rows of 128 bytes swizzled as the
matrix instructions take them. Stage s has its barriers: `k_full` and `v_full` say that what it holds has arrived,
`k_empty` and `v_empty` that everybody has done with it; keys and values may share them. Tile n of a program goes into
stage n % STAGES, as the stage's tile number n // STAGES, whose parity is what is waited for.

Where a page holds boxes of keys (or keys lie side by side), one warp asks the copy engine for them, or one for keys
and one for values: a box is some keys of a page and 64 columns. Smaller pages are gathered by four warps, 16 bytes a
copy.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from taut.common_kernels.aggregates import aggregates_of
from taut.common_kernels.gluon_features import TMA_LOADS, first_of

tma_load = first_of(tma, TMA_LOADS)
gather_load = first_of(async_copy, TMA_LOADS)
reinterpret = first_of(gl.shared_memory_descriptor, ("reinterpret", "_reinterpret"))

COLUMNS_OF_BOX = 64  # elements of a box's row: 128 bytes, as wide as the swizzle
BOX_COLUMNS = gl.constexpr(COLUMNS_OF_BOX)
WARPS_THAT_GATHER = 4
GATHERING_WARPS = gl.constexpr(WARPS_THAT_GATHER)
GATHERED_KEYS = gl.constexpr(32)  # that the four warps gather in one round
# Elements of a copy of 16 bytes. Strides of keys and values are counted in them, so that the compiler knows that every
# copy begins at a multiple of 16 bytes.
ELEMENTS_OF_PIECE = 8
PIECE = gl.constexpr(ELEMENTS_OF_PIECE)


@aggregates_of(gl, gluon)
class Ring:
    """The stages and their barriers.

    Attributes:
        k: keys [STAGES, BLOCK_N, HEAD_MAIN].
        k_tail: their columns after these, [STAGES, BLOCK_N, HEAD_TAIL]; of no meaning without a tail.
        v: values [STAGES, BLOCK_N, HEAD_MAIN].
        k_full: barriers [STAGES, 1], as the others.
        k_empty: likewise.
        v_full: likewise; `k_full` where keys and values share theirs.
        v_empty: likewise.
        BOX: keys of a box of the copy engine, the smaller one of page and tile; 0 where keys are gathered.
        HEAD_TAIL: columns of keys after HEAD_MAIN, or 0.
        STAGES: how many there are.
    """

    k: gl.shared_memory_descriptor
    k_tail: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    k_empty: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    v_empty: gl.shared_memory_descriptor
    BOX: gl.constexpr
    HEAD_TAIL: gl.constexpr
    STAGES: gl.constexpr


@aggregates_of(gl, gluon)
class Half:
    """The keys of a cache, or its values, and the stages that they are brought to.

    Attributes:
        source: a descriptor of [N, Hk, P, D], boxes [1, 1, BOX, 64] (contiguous: of [1, Hk, K, D]); gathered: a pointer
            to the cache's slot 0 of this head.
        page_stride: gathered: in pieces.
        token_stride: likewise.
        main: [STAGES, BLOCK_N, HEAD_MAIN] shared memory; as boxes (`as_boxes`) unless gathered.
        tail: [STAGES, BLOCK_N, TAIL] likewise, of no meaning without a tail.
        full: barriers [STAGES, 1].
        empty: likewise.
        TAIL: columns after HEAD_MAIN, or 0.
    """

    source: Any
    page_stride: gl.tensor
    token_stride: gl.tensor
    main: gl.shared_memory_descriptor
    tail: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    TAIL: gl.constexpr


@aggregates_of(gl, gluon)
class Cache:
    """What tiles are brought from, whichever row they are of.

    Attributes:
        keys: their half.
        values: theirs.
        dead_page: a page number that the descriptors do not have: its boxes arrive as zeros.
        PAGED: whether there is a page table; else the keys of all rows lie side by side.
        PAGE_SIZE: tokens of a page.
        BOX: as of `Ring`.
        BLOCK_N: keys of a tile.
        HEAD_MAIN: columns of a tile without its tail.
        STAGES: how many there are.
        TOGETHER: whether keys and values of a stage share the barrier that says that it is empty.
    """

    keys: Half
    values: Half
    dead_page: gl.tensor
    PAGED: gl.constexpr
    PAGE_SIZE: gl.constexpr
    BOX: gl.constexpr
    BLOCK_N: gl.constexpr
    HEAD_MAIN: gl.constexpr
    STAGES: gl.constexpr
    TOGETHER: gl.constexpr


@aggregates_of(gl, gluon)
class Row:
    """Where the keys of a row and a head lie, and which of them are read.

    Attributes:
        pages: pointer to the row's first page number; contiguous: not used.
        kv_head: the head.
        first_slot: contiguous: where the row's first key lies.
        first_seen: keys without a position first_seen <= j < end_seen are not read (boxes without any).
        end_seen: see there.
    """

    pages: gl.tensor
    kv_head: gl.tensor
    first_slot: gl.tensor
    first_seen: gl.tensor
    end_seen: gl.tensor


@aggregates_of(gl, gluon)
class Table:
    """The page table.

    Attributes:
        pages: pointer [*, pages of a row].
        rows: pointer [R]: which line of it is a row's; or None: its own.
        stride: of a line.
    """

    pages: gl.tensor
    rows: gl.tensor | None
    stride: gl.tensor


@gluon.jit
def pages_of_row(table: Table, row: gl.tensor) -> gl.tensor:
    """The address of a row's first page number."""
    if table.rows is None:
        address = table.pages + row.to(gl.int64) * table.stride
    else:
        address = table.pages + gl.load(table.rows + row).to(gl.int64) * table.stride
    return address


@gluon.jit
def make_ring(
    k: gl.shared_memory_descriptor,
    k_tail: gl.shared_memory_descriptor,
    v: gl.shared_memory_descriptor,
    HEAD_TAIL: gl.constexpr,
    BOX: gl.constexpr,
    READERS: gl.constexpr,
    FULL_TOGETHER: gl.constexpr,
    EMPTY_TOGETHER: gl.constexpr,
) -> Ring:
    """The barriers of a ring that READERS partitions read, beside its tiles; see `Ring`.

    FULL_TOGETHER, EMPTY_TOGETHER: keys and values of a stage share these barriers. That makes fewer to wait for, to
    arrive at, and to make: one thread takes some 35 cycles for each of them, before anything else begins.
    """
    STAGES: gl.constexpr = k.shape[0]
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = k_full
    v_empty = k_empty
    if not FULL_TOGETHER:
        v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    if not EMPTY_TOGETHER:
        v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ARRIVALS: gl.constexpr = 1 if BOX else 32 * GATHERING_WARPS  # of keys; of values as many
    for stage in gl.static_range(STAGES):
        # Full: one arrival of the warp that says how many bytes come; gathered: one of each thread that copies. Empty:
        # one of each partition that reads, when its products have been waited for.
        mbarrier.init(k_full.index(stage), count=ARRIVALS * 2 if FULL_TOGETHER else ARRIVALS)
        if not FULL_TOGETHER:
            mbarrier.init(v_full.index(stage), count=ARRIVALS)
        mbarrier.init(k_empty.index(stage), count=READERS)
        if not EMPTY_TOGETHER:
            mbarrier.init(v_empty.index(stage), count=READERS)
    return Ring(k, k_tail, v, k_full, k_empty, v_full, v_empty, BOX, HEAD_TAIL, STAGES)


@gluon.jit
def as_boxes(stages: gl.shared_memory_descriptor, BOX: gl.constexpr) -> gl.tensor:
    """Stages [STAGES, BLOCK_N, COLUMNS] as boxes: number (stage * blocks of columns + block) * boxes of a block + box.

    A tile's first 64 columns lie before its next 64, and there its first keys before the next: boxes are whole pieces.
    """
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 4)
    COUNT: gl.constexpr = stages.shape[0] * (stages.shape[2] // BOX_COLUMNS) * (stages.shape[1] // BOX)
    return reinterpret(stages, stages.dtype, [COUNT, 1, 1, BOX, BOX_COLUMNS], layout)


@gluon.jit
def half_of(
    source: gl.tensor,  # of all heads
    page_stride: gl.tensor,
    token_stride: gl.tensor,
    head_stride: gl.tensor,  # in pieces
    kv_head: gl.tensor,
    stages: gl.shared_memory_descriptor,  # [STAGES, BLOCK_N, HEAD_MAIN]
    tail_stages: gl.shared_memory_descriptor,
    full: gl.shared_memory_descriptor,
    empty: gl.shared_memory_descriptor,
    BOX: gl.constexpr,
    TAIL: gl.constexpr,
) -> Half:
    """Keys, or values, of a head and the stages for them; see `Half`."""
    first = source
    main = stages
    tail = tail_stages
    if BOX:
        main = as_boxes(main, BOX)
        tail = as_boxes(tail, BOX)
    else:
        first = source + kv_head.to(gl.int64) * head_stride * PIECE
    return Half(first, page_stride, token_stride, main, tail, full, empty, TAIL)


@gluon.jit
def load_tile(number: gl.tensor, tile: gl.tensor, cache: Cache, row: Row) -> None:
    """Let the copy engine bring one tile, when its stage is empty, all of it at once.

    Args:
        number: of the tile, counted over all that the program loads.
        tile: the position of its first key, a multiple of BOX.
        cache: keys and values share the barriers that say that a stage is empty.
        row: whose keys they are.
    """
    stage = number % cache.STAGES
    pages, token = pages_of_tile(tile, cache, row)
    wait_for_stage(cache.keys, number, cache.STAGES)
    load_boxes(cache.keys, cache.keys.full.index(stage), stage, pages, token, cache, row)
    load_boxes(cache.values, cache.values.full.index(stage), stage, pages, token, cache, row)


@gluon.jit
def load_half(
    number: gl.tensor,
    tile: gl.tensor,
    half: Half,
    told: gl.shared_memory_descriptor,  # [1] the barrier that is told when they are there
    cache: Cache,
    row: Row,
) -> None:
    """As `load_tile`, of the keys alone or of the values alone; also where they lie side by side (contiguous)."""
    pages, token = pages_of_tile(tile, cache, row)
    wait_for_stage(half, number, cache.STAGES)
    load_boxes(half, told, number % cache.STAGES, pages, token, cache, row)


@gluon.jit
def wait_for_stage(half: Half, number: gl.tensor, STAGES: gl.constexpr) -> None:
    """Wait until whoever had the stage of tile `number` before, tile number - STAGES, has left it.

    The first tiles find it empty: a wait for the phase before the first returns at once.
    """
    mbarrier.wait(half.empty.index(number % STAGES), ((number // STAGES) & 1) ^ 1)


@gluon.jit
def pages_of_tile(tile: gl.tensor, cache: Cache, row: Row) -> gl.tensor:
    """The page number of each of a tile's boxes, and the token in the page that the boxes begin with.

    Asked for ahead of the wait for a stage: they arrive meanwhile.
    """
    BOX: gl.constexpr = cache.BOX
    PAGE_SIZE: gl.constexpr = cache.PAGE_SIZE
    BOXES: gl.constexpr = cache.BLOCK_N // BOX
    gl.static_assert(BOXES == 1 or (cache.PAGED and BOX == PAGE_SIZE), "a box is a page or a tile")
    pages = ()
    if cache.PAGED:
        page = row.pages + tile // PAGE_SIZE  # several boxes are several pages
        for box in gl.static_range(BOXES):
            begin = tile + box * BOX
            seen = (begin < row.end_seen) & (begin + BOX > row.first_seen)
            pages = pages + (gl.load(page + box, mask=seen, other=cache.dead_page),)  # type: ignore[assignment]  # noqa: RUF005
        token = tile % PAGE_SIZE if BOX < PAGE_SIZE else 0
    else:
        token = row.first_slot + tile
        pages = (0,)  # type: ignore[assignment]
    return pages, token


@gluon.jit
def load_boxes(
    half: Half,
    told: gl.shared_memory_descriptor,
    stage: gl.tensor,
    pages: gl.tensor,
    token: gl.tensor,
    cache: Cache,
    row: Row,
) -> None:
    """The boxes of a tile's keys, or of its values, into a stage that is empty."""
    HEAD_MAIN: gl.constexpr = cache.HEAD_MAIN
    mbarrier.expect(told, cache.BLOCK_N * 2 * (HEAD_MAIN + half.TAIL))
    load_columns(half.source, half.main, told, stage, pages, token, cache, row, 0, HEAD_MAIN)
    if half.TAIL:
        load_columns(half.source, half.tail, told, stage, pages, token, cache, row, HEAD_MAIN, half.TAIL)


@gluon.jit
def load_columns(
    source: gl.tensor,
    boxes: gl.shared_memory_descriptor,
    told: gl.shared_memory_descriptor,
    stage: gl.tensor,
    pages: gl.tensor,
    token: gl.tensor,
    cache: Cache,
    row: Row,
    FIRST_COLUMN: gl.constexpr,
    COLUMNS: gl.constexpr,
) -> None:
    """Some columns of a tile, box by box."""
    BOXES: gl.constexpr = cache.BLOCK_N // cache.BOX
    BLOCKS: gl.constexpr = COLUMNS // BOX_COLUMNS
    for box in gl.static_range(BOXES):
        for block in gl.static_range(BLOCKS):
            tma_load(
                source,
                [pages[box], row.kv_head, token, FIRST_COLUMN + block * BOX_COLUMNS],
                told,
                boxes.index((stage * BLOCKS + block) * BOXES + box),
            )


@gluon.constexpr_function
def layout_of_gather(columns: int) -> gl.BlockedLayout:
    """How four warps share the pieces of some keys of so many columns: whole rows, and side by side in a row."""
    lanes = min(columns // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [WARPS_THAT_GATHER, 1], [1, 0])


@gluon.jit
def gather_tile(number: gl.tensor, tile: gl.tensor, cache: Cache, row: Row) -> None:
    """As `load_tile`, key by key.

    Each thread arrives when its own copies have ended. They are ordinary writes: who multiplies what they brought says
    `fence_async_shared` after its wait.
    """
    stage = number % cache.STAGES
    wait_for_stage(cache.keys, number, cache.STAGES)
    gather_pieces(stage, tile, cache.keys, None, None, cache, row)
    gather_pieces(stage, tile, cache.values, None, None, cache, row)


@gluon.jit
def gather_half(number: gl.tensor, tile: gl.tensor, half: Half, cache: Cache, row: Row) -> None:
    """As `gather_tile`, of the keys alone or of the values alone.

    All page numbers are asked for ahead of the wait for the stage; round by round, as `gather_tile` does, each round
    would wait for its own. A decoding row has few tiles: there the first copies shall begin early, as measured on an
    H200.
    """
    stage = number % cache.STAGES
    pages, tail_pages = pages_of_keys(half, tile, cache, row)
    wait_for_stage(half, number, cache.STAGES)
    gather_pieces(stage, tile, half, pages, tail_pages, cache, row)


@gluon.jit
def pages_of_keys(half: Half, tile: gl.tensor, cache: Cache, row: Row) -> gl.tensor:
    """The page numbers of a tile's keys, round by round, for `gather_columns` of its main columns and of its tail."""
    pages = ()
    tail_pages = ()
    for first in gl.static_range(0, cache.BLOCK_N, GATHERED_KEYS):
        keys, seen = keys_of_round(tile, first, row, cache.HEAD_MAIN)
        pages = pages + (gl.load(row.pages + keys // cache.PAGE_SIZE, mask=seen, other=0),)  # type: ignore[assignment]  # noqa: RUF005
        if half.TAIL:
            keys, seen = keys_of_round(tile, first, row, half.TAIL)
            tail_pages = tail_pages + (gl.load(row.pages + keys // cache.PAGE_SIZE, mask=seen, other=0),)  # type: ignore[assignment]  # noqa: RUF005
    return pages, tail_pages


@gluon.jit
def keys_of_round(tile: gl.tensor, first: gl.constexpr, row: Row, COLUMNS: gl.constexpr) -> gl.tensor:
    """The positions of the keys that are gathered together, and which of them are read."""
    keys = tile + first + gl.arange(0, GATHERED_KEYS, layout=gl.SliceLayout(1, layout_of_gather(COLUMNS)))
    return keys, (keys >= row.first_seen) & (keys < row.end_seen)


@gluon.jit
def gather_pieces(
    stage: gl.tensor,
    tile: gl.tensor,
    half: Half,
    pages: gl.tensor,  # as of `pages_of_keys`, or None: then each round asks for its own
    tail_pages: gl.tensor,
    cache: Cache,
    row: Row,
) -> None:
    """A tile's keys, or its values, into a stage that is empty."""
    main = half.main.index(stage)
    tail = half.tail.index(stage)
    gather_columns(half, main, tile, pages, cache, row, 0)
    if half.TAIL:
        gather_columns(half, tail, tile, tail_pages, cache, row, cache.HEAD_MAIN)
    async_copy.mbarrier_arrive(half.full.index(stage), increment_count=False)


@gluon.jit
def gather_columns(
    half: Half,
    target: gl.shared_memory_descriptor,  # [BLOCK_N, COLUMNS] shared memory
    tile: gl.tensor,
    pages: gl.tensor,  # the page number of each key, round by round, or None
    cache: Cache,
    row: Row,
    FIRST_COLUMN: gl.constexpr,
) -> None:
    """Some columns of a tile, a few keys at a time, so that few addresses are held at once."""
    BLOCK_N: gl.constexpr = target.shape[0]
    COLUMNS: gl.constexpr = target.shape[1]
    columns = FIRST_COLUMN + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout_of_gather(COLUMNS)))
    for first in gl.static_range(0, BLOCK_N, GATHERED_KEYS):
        keys, seen = keys_of_round(tile, first, row, COLUMNS)
        if pages is None:
            page = gl.load(row.pages + keys // cache.PAGE_SIZE, mask=seen, other=0)
        else:
            page = pages[first // GATHERED_KEYS]
        slots = (page.to(gl.int64) * half.page_stride + (keys % cache.PAGE_SIZE) * half.token_stride) * PIECE
        gather_load(
            target.slice(first, GATHERED_KEYS, dim=0),
            (half.source + columns)[None, :] + slots[:, None],
            mask=seen[:, None] & (columns >= 0)[None, :],
        )


@gluon.jit
def clear_dead_keys(values: gl.shared_memory_descriptor, tile: gl.tensor, end: gl.tensor) -> None:
    """Zero the values [BLOCK_N, V] of a tile that belong to no key of the row, the positions from `end` on.

    What lies there may be NaN, and a weight of zero times NaN is no zero. The four warps that read the tile do this,
    before they multiply it.
    """
    BLOCK_N: gl.constexpr = values.shape[0]
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    keys = tile + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, wide))
    values.store(gl.where((keys < end)[:, None], values.load(wide), 0.0))
