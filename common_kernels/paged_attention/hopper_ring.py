"""The ring of shared memory that the Hopper kernels of this operation read keys and values from, and how it is filled.

A slot holds one tile: BLOCK_N keys and their values, each in blocks of 64 columns, rows of 128 bytes swizzled as the
matrix instructions take them. Slot s has its barriers: `k_full` and `v_full` say that what a slot holds has arrived,
`k_free` and `v_free` that everybody has done with it; keys and values may share them. Tile n of a program goes into
slot n % STAGES, as the slot's tile number n // STAGES, whose parity is what is waited for.

Where a page holds boxes of keys (or keys lie side by side), one warp asks the copy engine for them, or one for keys
and one for values: a box is some keys of a page and 64 columns. Smaller pages are gathered by four warps, 16 bytes a
copy.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from taut.common_kernels.gluon_features import TMA_LOADS, first_of

tma_load = first_of(tma, TMA_LOADS)
gather_load = first_of(async_copy, TMA_LOADS)
reinterpret = first_of(gl.shared_memory_descriptor, ("reinterpret", "_reinterpret"))

COLUMNS_OF_BOX = 64  # elements of a box's row: 128 bytes, as wide as the swizzle
BOX_COLUMNS = gl.constexpr(COLUMNS_OF_BOX)
WARPS_THAT_GATHER = 4
GATHERING_WARPS = gl.constexpr(WARPS_THAT_GATHER)
GATHERED_ROWS = gl.constexpr(32)  # keys that the four warps gather in one round
# Elements of a copy of 16 bytes. Strides of keys and values are counted in them, so that the compiler knows that every
# copy begins at a multiple of 16 bytes.
ELEMENTS_OF_PIECE = 8
PIECE = gl.constexpr(ELEMENTS_OF_PIECE)


@gluon.jit
def make_barriers(
    READERS: gl.constexpr,
    BOX: gl.constexpr,
    FULL_TOGETHER: gl.constexpr,
    FREE_TOGETHER: gl.constexpr,
    STAGES: gl.constexpr,
) -> gl.tensor:
    """The barriers of a ring: k_full, k_free, v_full, v_free; READERS partitions read each slot.

    FULL_TOGETHER, FREE_TOGETHER: keys and values of a slot share theirs. That makes fewer to wait for, to arrive at,
    and to make: one thread takes some 35 cycles for each of them, before anything else begins.
    """
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = k_full
    v_free = k_free
    if not FULL_TOGETHER:
        v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    if not FREE_TOGETHER:
        v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ARRIVALS: gl.constexpr = 1 if BOX else 32 * GATHERING_WARPS  # of keys; of values as many
    for stage in gl.static_range(STAGES):
        # Full: one arrival of the warp that says how many bytes come; gathered: one of each thread that copies. Free:
        # one of each partition that reads, when its products have been waited for.
        mbarrier.init(k_full.index(stage), count=ARRIVALS * 2 if FULL_TOGETHER else ARRIVALS)
        if not FULL_TOGETHER:
            mbarrier.init(v_full.index(stage), count=ARRIVALS)
        mbarrier.init(k_free.index(stage), count=READERS)
        if not FREE_TOGETHER:
            mbarrier.init(v_free.index(stage), count=READERS)
    return k_full, k_free, v_full, v_free


@gluon.jit
def as_boxes(
    ring: gl.shared_memory_descriptor,
    BLOCK_N: gl.constexpr,
    BOX: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
) -> gl.tensor:
    """A ring [STAGES, BLOCK_N, COLUMNS] as boxes: number (slot * blocks of columns + block) * boxes of a block + box.

    A tile's first 64 columns lie before its next 64, and there its first keys before the next: boxes are whole pieces.
    """
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 4)
    COUNT: gl.constexpr = STAGES * (COLUMNS // BOX_COLUMNS) * (BLOCK_N // BOX)
    return reinterpret(ring, ring.dtype, [COUNT, 1, 1, BOX, BOX_COLUMNS], layout)


@gluon.jit
def load_tile(
    number: gl.tensor,  # of the tile, counted over all that the program loads
    tile: gl.tensor,  # the position of its first key, a multiple of BOX
    key: gl.tensor,  # a descriptor of [pages, Hk, P, D], boxes [1, 1, BOX, 64]
    value: gl.tensor,
    k_boxes: gl.shared_memory_descriptor,
    k_tail_boxes: gl.shared_memory_descriptor,
    v_boxes: gl.shared_memory_descriptor,
    k_full: gl.shared_memory_descriptor,
    v_full: gl.shared_memory_descriptor,
    free: gl.shared_memory_descriptor,
    table_row: gl.tensor,  # pointer: the row's first page number
    dead_page: gl.tensor,  # a page number that the descriptor does not have: its box arrives as zeros
    kv_head: gl.tensor,
    first_seen: gl.tensor,  # boxes without a position first_seen <= j < end_seen are not read
    end_seen: gl.tensor,
    PAGE_SIZE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BOX: gl.constexpr,  # the smaller one of page and tile
    HEAD_MAIN: gl.constexpr,
    HEAD_TAIL: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """Let the copy engine bring one tile, when its slot is free, all of it at once; values have HEAD_MAIN columns."""
    slot = number % STAGES
    pages, place = pages_of_tile(tile, table_row, dead_page, 0, first_seen, end_seen, True, PAGE_SIZE, BLOCK_N, BOX)
    wait_for_slot(free, number, STAGES)
    load_boxes(
        key, k_boxes, k_tail_boxes, k_full.index(slot), slot, pages, kv_head, place, BLOCK_N, BOX, HEAD_MAIN, HEAD_TAIL
    )
    load_boxes(value, v_boxes, v_boxes, v_full.index(slot), slot, pages, kv_head, place, BLOCK_N, BOX, HEAD_MAIN, 0)


@gluon.jit
def load_half(
    number: gl.tensor,
    tile: gl.tensor,
    source: gl.tensor,  # contiguous: a descriptor of [1, Hk, K, D]
    boxes: gl.shared_memory_descriptor,
    tail_boxes: gl.shared_memory_descriptor,
    told: gl.shared_memory_descriptor,  # [1] the barrier that is told when they are there
    free: gl.shared_memory_descriptor,
    table_row: gl.tensor,  # contiguous: not used
    dead_page: gl.tensor,
    kv_head: gl.tensor,
    first_place: gl.tensor,  # contiguous: where the row's first key lies
    first_seen: gl.tensor,
    end_seen: gl.tensor,
    PAGED: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BOX: gl.constexpr,  # contiguous: the tile
    HEAD_MAIN: gl.constexpr,
    HEAD_TAIL: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """As `load_tile`, of the keys alone or of the values alone; also where they lie side by side (contiguous)."""
    pages, place = pages_of_tile(
        tile, table_row, dead_page, first_place, first_seen, end_seen, PAGED, PAGE_SIZE, BLOCK_N, BOX
    )
    wait_for_slot(free, number, STAGES)
    load_boxes(
        source, boxes, tail_boxes, told, number % STAGES, pages, kv_head, place, BLOCK_N, BOX, HEAD_MAIN, HEAD_TAIL
    )


@gluon.jit
def wait_for_slot(free: gl.shared_memory_descriptor, number: gl.tensor, STAGES: gl.constexpr) -> None:
    """Wait until whoever had the slot of tile `number` before, tile number - STAGES, has left it.

    The first tiles find it free: a wait for the phase before the first returns at once.
    """
    mbarrier.wait(free.index(number % STAGES), ((number // STAGES) & 1) ^ 1)


@gluon.jit
def pages_of_tile(
    tile: gl.tensor,
    table_row: gl.tensor,
    dead_page: gl.tensor,
    first_place: gl.tensor,
    first_seen: gl.tensor,
    end_seen: gl.tensor,
    PAGED: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BOX: gl.constexpr,
) -> gl.tensor:
    """The page number of each of a tile's boxes, and the place in the page where the boxes begin.

    Asked for ahead of the wait for a slot: they arrive meanwhile.
    """
    BOXES: gl.constexpr = BLOCK_N // BOX
    gl.static_assert(BOXES == 1 or (PAGED and BOX == PAGE_SIZE), "a box is a page or a tile")
    pages = ()
    if PAGED:
        page = table_row + tile // PAGE_SIZE  # several boxes are several pages
        for box in gl.static_range(BOXES):
            begin = tile + box * BOX
            seen = (begin < end_seen) & (begin + BOX > first_seen)
            pages = pages + (gl.load(page + box, mask=seen, other=dead_page),)  # type: ignore[assignment]  # noqa: RUF005
        place = tile % PAGE_SIZE if BOX < PAGE_SIZE else 0
    else:
        place = first_place + tile
        pages = (0,)  # type: ignore[assignment]
    return pages, place


@gluon.jit
def load_boxes(
    source: gl.tensor,
    boxes: gl.shared_memory_descriptor,
    tail_boxes: gl.shared_memory_descriptor,
    told: gl.shared_memory_descriptor,
    slot: gl.tensor,
    pages: gl.tensor,
    kv_head: gl.tensor,
    place: gl.tensor,
    BLOCK_N: gl.constexpr,
    BOX: gl.constexpr,
    HEAD_MAIN: gl.constexpr,
    HEAD_TAIL: gl.constexpr,
) -> None:
    """The boxes of a tile's keys, or of its values, into a slot that is free."""
    BOXES: gl.constexpr = BLOCK_N // BOX
    mbarrier.expect(told, BLOCK_N * 2 * (HEAD_MAIN + HEAD_TAIL))
    load_columns(source, boxes, told, slot, pages, kv_head, place, 0, HEAD_MAIN, BOXES)
    if HEAD_TAIL:
        load_columns(source, tail_boxes, told, slot, pages, kv_head, place, HEAD_MAIN, HEAD_TAIL, BOXES)


@gluon.jit
def load_columns(
    source: gl.tensor,
    boxes: gl.shared_memory_descriptor,
    told: gl.shared_memory_descriptor,
    slot: gl.tensor,
    pages: gl.tensor,
    kv_head: gl.tensor,
    place: gl.tensor,
    FIRST_COLUMN: gl.constexpr,
    COLUMNS: gl.constexpr,
    BOXES: gl.constexpr,
) -> None:
    """Some columns of a tile, box by box."""
    BLOCKS: gl.constexpr = COLUMNS // BOX_COLUMNS
    for box in gl.static_range(BOXES):
        for block in gl.static_range(BLOCKS):
            tma_load(
                source,
                [pages[box], kv_head, place, FIRST_COLUMN + block * BOX_COLUMNS],
                told,
                boxes.index((slot * BLOCKS + block) * BOXES + box),
            )


@gluon.constexpr_function
def layout_of_gather(columns: int) -> gl.BlockedLayout:
    """How four warps share the pieces of some keys of so many columns: whole rows, and side by side in a row."""
    lanes = min(columns // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [WARPS_THAT_GATHER, 1], [1, 0])


@gluon.jit
def gather_tile(
    number: gl.tensor,
    tile: gl.tensor,
    key: gl.tensor,  # pointer: the cache's slot 0 of this head
    value: gl.tensor,
    k_ring: gl.shared_memory_descriptor,  # [STAGES, BLOCK_N, HEAD_MAIN]
    k_tail_ring: gl.shared_memory_descriptor,
    v_ring: gl.shared_memory_descriptor,
    k_full: gl.shared_memory_descriptor,
    v_full: gl.shared_memory_descriptor,
    free: gl.shared_memory_descriptor,
    table_row: gl.tensor,
    key_page_stride: gl.tensor,  # strides in pieces
    key_token_stride: gl.tensor,
    value_page_stride: gl.tensor,
    value_token_stride: gl.tensor,
    first_seen: gl.tensor,  # keys outside first_seen <= j < end_seen are not read; zeros stand in their place
    end_seen: gl.tensor,
    PAGE_SIZE: gl.constexpr,
    HEAD_TAIL: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """As `load_tile`, key by key.

    Each thread arrives when its own copies have ended. They are ordinary writes: who multiplies what they brought says
    `fence_async_shared` after its wait.
    """
    slot = number % STAGES
    wait_for_slot(free, number, STAGES)
    gather_pieces(
        key, k_ring.index(slot), k_tail_ring.index(slot), k_full, slot, table_row, None, None, key_page_stride,
        key_token_stride, tile, first_seen, end_seen, PAGE_SIZE, HEAD_TAIL,
    )  # fmt: skip
    gather_pieces(
        value, v_ring.index(slot), v_ring.index(slot), v_full, slot, table_row, None, None, value_page_stride,
        value_token_stride, tile, first_seen, end_seen, PAGE_SIZE, 0,
    )  # fmt: skip


@gluon.jit
def gather_half(
    number: gl.tensor,
    tile: gl.tensor,
    source: gl.tensor,
    ring: gl.shared_memory_descriptor,
    tail_ring: gl.shared_memory_descriptor,
    full: gl.shared_memory_descriptor,
    free: gl.shared_memory_descriptor,
    table_row: gl.tensor,
    page_stride: gl.tensor,
    token_stride: gl.tensor,
    first_seen: gl.tensor,
    end_seen: gl.tensor,
    PAGE_SIZE: gl.constexpr,
    HEAD_TAIL: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """As `gather_tile`, of the keys alone or of the values alone.

    All page numbers are asked for ahead of the wait for the slot; round by round, as `gather_tile` does, each round
    would wait for its own. A decoding row has few tiles: there the first copies shall begin early, as measured on an
    H200.
    """
    BLOCK_N: gl.constexpr = ring.shape[1]
    HEAD_MAIN: gl.constexpr = ring.shape[2]
    slot = number % STAGES
    pages, tail_pages = pages_of_keys(tile, table_row, first_seen, end_seen, PAGE_SIZE, BLOCK_N, HEAD_MAIN, HEAD_TAIL)
    wait_for_slot(free, number, STAGES)
    gather_pieces(
        source, ring.index(slot), tail_ring.index(slot), full, slot, table_row, pages, tail_pages, page_stride,
        token_stride, tile, first_seen, end_seen, PAGE_SIZE, HEAD_TAIL,
    )  # fmt: skip


@gluon.jit
def pages_of_keys(
    tile: gl.tensor,
    table_row: gl.tensor,
    first_seen: gl.tensor,
    end_seen: gl.tensor,
    PAGE_SIZE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    HEAD_MAIN: gl.constexpr,
    HEAD_TAIL: gl.constexpr,
) -> gl.tensor:
    """The page numbers of a tile's keys, round by round, for `gather_columns` of its main columns and of its tail."""
    pages = ()
    tail_pages = ()
    for first in gl.static_range(0, BLOCK_N, GATHERED_ROWS):
        keys, seen = keys_of_round(tile, first, first_seen, end_seen, HEAD_MAIN)
        pages = pages + (gl.load(table_row + keys // PAGE_SIZE, mask=seen, other=0),)  # type: ignore[assignment]  # noqa: RUF005
        if HEAD_TAIL:
            keys, seen = keys_of_round(tile, first, first_seen, end_seen, HEAD_TAIL)
            tail_pages = tail_pages + (gl.load(table_row + keys // PAGE_SIZE, mask=seen, other=0),)  # type: ignore[assignment]  # noqa: RUF005
    return pages, tail_pages


@gluon.jit
def keys_of_round(
    tile: gl.tensor, first: gl.constexpr, first_seen: gl.tensor, end_seen: gl.tensor, COLUMNS: gl.constexpr
) -> gl.tensor:
    """The positions of the keys that are gathered together, and which of them are read."""
    keys = tile + first + gl.arange(0, GATHERED_ROWS, layout=gl.SliceLayout(1, layout_of_gather(COLUMNS)))
    return keys, (keys >= first_seen) & (keys < end_seen)


@gluon.jit
def gather_pieces(
    source: gl.tensor,
    target: gl.shared_memory_descriptor,  # [BLOCK_N, HEAD_MAIN] shared memory
    tail_target: gl.shared_memory_descriptor,
    full: gl.shared_memory_descriptor,
    slot: gl.tensor,
    table_row: gl.tensor,
    pages: gl.tensor,  # as of `pages_of_keys`, or None: then each round asks for its own
    tail_pages: gl.tensor,
    page_stride: gl.tensor,
    token_stride: gl.tensor,
    tile: gl.tensor,
    first_seen: gl.tensor,
    end_seen: gl.tensor,
    PAGE_SIZE: gl.constexpr,
    HEAD_TAIL: gl.constexpr,
) -> None:
    """A tile's keys, or its values, into a slot that is free."""
    gather_columns(
        source, target, table_row, pages, page_stride, token_stride, tile, first_seen, end_seen, PAGE_SIZE, 0
    )
    if HEAD_TAIL:
        gather_columns(
            source, tail_target, table_row, tail_pages, page_stride, token_stride, tile, first_seen, end_seen,
            PAGE_SIZE, target.shape[1],
        )  # fmt: skip
    async_copy.mbarrier_arrive(full.index(slot), increment_count=False)


@gluon.jit
def gather_columns(
    source: gl.tensor,
    target: gl.shared_memory_descriptor,  # [BLOCK_N, COLUMNS] shared memory
    table_row: gl.tensor,
    pages: gl.tensor,  # the page number of each key, round by round, or None
    page_stride: gl.tensor,
    token_stride: gl.tensor,
    tile: gl.tensor,
    first_seen: gl.tensor,
    end_seen: gl.tensor,
    PAGE_SIZE: gl.constexpr,
    FIRST_COLUMN: gl.constexpr,
) -> None:
    """Some columns of a tile, a few keys at a time, so that few addresses are held at once."""
    BLOCK_N: gl.constexpr = target.shape[0]
    COLUMNS: gl.constexpr = target.shape[1]
    columns = FIRST_COLUMN + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout_of_gather(COLUMNS)))
    for first in gl.static_range(0, BLOCK_N, GATHERED_ROWS):
        keys, seen = keys_of_round(tile, first, first_seen, end_seen, COLUMNS)
        if pages is None:
            page = gl.load(table_row + keys // PAGE_SIZE, mask=seen, other=0)
        else:
            page = pages[first // GATHERED_ROWS]
        slots = (page.to(gl.int64) * page_stride + (keys % PAGE_SIZE) * token_stride) * PIECE
        gather_load(
            target.slice(first, GATHERED_ROWS, dim=0),
            (source + columns)[None, :] + slots[:, None],
            mask=seen[:, None] & (columns >= 0)[None, :],
        )


@gluon.jit
def clear_dead_keys(tile_of_values: gl.shared_memory_descriptor, first_key: gl.tensor, end: gl.tensor) -> None:
    """Zero the values of a tile that belong to no key of the row, the positions from `end` on.

    What lies there may be NaN, and a weight of zero times NaN is no zero. The four warps that read the tile do this,
    before they multiply it.
    """
    rows: gl.constexpr = tile_of_values.shape[0]
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    keys = first_key + gl.arange(0, rows, layout=gl.SliceLayout(1, wide))
    tile_of_values.store(gl.where((keys < end)[:, None], tile_of_values.load(wide), 0.0))
