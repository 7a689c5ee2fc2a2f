"""The ring of shared memory that the Hopper kernels of this operation read keys and values from, and how it is filled.

A slot holds one tile: BLOCK_N keys and their values, each in blocks of 64 columns, rows of 128 bytes swizzled as the
matrix instructions take them. Slot s has its barriers: `k_full` and `v_full` say that what a slot holds has arrived,
`k_free` and `v_free` that everybody has done with it; keys and values may share them. Tile n of a program goes into
slot n % STAGES, as the slot's tile number n // STAGES, whose parity is what is waited for.

Where a page holds boxes of keys (or keys lie side by side), one warp has the copy engine bring them: a box is some keys
of a page and 64 columns. Smaller pages are gathered by four warps, 16 bytes a copy.
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
GATHERING_WARPS = gl.constexpr(4)
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
    for stage in gl.static_range(STAGES):
        # Full: one arrival, of the warp that says how many bytes come; gathered: one of each thread that copies. Free:
        # one of each partition that reads, when its products have been waited for.
        mbarrier.init(k_full.index(stage), count=1 if BOX else 32 * GATHERING_WARPS)
        if not FULL_TOGETHER:
            mbarrier.init(v_full.index(stage), count=1 if BOX else 32 * GATHERING_WARPS)
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
    key: gl.tensor,  # a descriptor of [pages, Hk, P, D], boxes [1, 1, BOX, 64]; contiguous: [1, Hk, K, D]
    value: gl.tensor,
    k_boxes: gl.shared_memory_descriptor,
    k_tail_boxes: gl.shared_memory_descriptor,
    v_boxes: gl.shared_memory_descriptor,
    k_full: gl.shared_memory_descriptor,
    k_told: gl.tensor,  # which of `k_full` is told when the keys are there: as a rule, that of the slot
    k_free: gl.shared_memory_descriptor,
    v_full: gl.shared_memory_descriptor,
    v_told: gl.tensor,
    v_free: gl.shared_memory_descriptor,
    table_row: gl.tensor,  # pointer: the row's first page number; contiguous: not used
    dead_page: gl.tensor,  # a page number that the descriptor does not have: its box arrives as zeros
    kv_head: gl.tensor,
    first_place: gl.tensor,  # contiguous: where the row's first key lies
    first_seen: gl.tensor,  # boxes without a position first_seen <= j < end_seen are not read
    end_seen: gl.tensor,
    PAGED: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BOX: gl.constexpr,  # the smaller one of page and tile; contiguous: the tile
    HEAD_MAIN: gl.constexpr,
    HEAD_TAIL: gl.constexpr,
    FULL_TOGETHER: gl.constexpr,  # whether keys and values have one barrier
    FREE_TOGETHER: gl.constexpr,  # likewise, of a slot that may be filled again
    STAGES: gl.constexpr,
) -> None:
    """Let the copy engine bring one tile, when its slot is free; values have HEAD_MAIN columns."""
    BOXES: gl.constexpr = BLOCK_N // BOX
    gl.static_assert(BOXES == 1 or (PAGED and BOX == PAGE_SIZE), "a box is a page or a tile")
    BYTES: gl.constexpr = BLOCK_N * 2  # of one column
    slot = number % STAGES
    # Whoever had the slot before, tile number - STAGES, must have left it. The first tiles find it free: a wait for the
    # phase before the first returns at once.
    left = ((number // STAGES) & 1) ^ 1
    # Page numbers first: they arrive while the slot is waited for.
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
    mbarrier.wait(k_free.index(slot), left)
    mbarrier.expect(k_full.index(k_told), BYTES * (HEAD_MAIN + HEAD_TAIL + (HEAD_MAIN if FULL_TOGETHER else 0)))
    load_columns(key, k_boxes, k_full, k_told, slot, pages, kv_head, place, 0, HEAD_MAIN, BOXES)
    if HEAD_TAIL:
        load_columns(key, k_tail_boxes, k_full, k_told, slot, pages, kv_head, place, HEAD_MAIN, HEAD_TAIL, BOXES)
    if not FREE_TOGETHER:
        mbarrier.wait(v_free.index(slot), left)
    if not FULL_TOGETHER:
        mbarrier.expect(v_full.index(v_told), BYTES * HEAD_MAIN)
    load_columns(value, v_boxes, v_full, v_told, slot, pages, kv_head, place, 0, HEAD_MAIN, BOXES)


@gluon.jit
def load_columns(
    source: gl.tensor,
    boxes: gl.shared_memory_descriptor,
    full: gl.shared_memory_descriptor,
    told: gl.tensor,
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
                full.index(told),
                boxes.index((slot * BLOCKS + block) * BOXES + box),
            )


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
    k_free: gl.shared_memory_descriptor,
    v_full: gl.shared_memory_descriptor,
    v_free: gl.shared_memory_descriptor,
    table_row: gl.tensor,
    key_page_stride: gl.tensor,  # strides in pieces
    key_token_stride: gl.tensor,
    value_page_stride: gl.tensor,
    value_token_stride: gl.tensor,
    first_seen: gl.tensor,  # keys outside first_seen <= j < end_seen are not read; zeros stand in their place
    end_seen: gl.tensor,
    PAGE_SIZE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    HEAD_MAIN: gl.constexpr,
    HEAD_TAIL: gl.constexpr,
    FULL_TOGETHER: gl.constexpr,
    FREE_TOGETHER: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """As `load_tile`, key by key.

    Each thread arrives when its own copies have ended. They are ordinary writes: who multiplies what they brought says
    `fence_async_shared` after its wait.
    """
    slot = number % STAGES
    left = ((number // STAGES) & 1) ^ 1
    mbarrier.wait(k_free.index(slot), left)
    gather_columns(
        key, k_ring.index(slot), table_row, key_page_stride, key_token_stride, tile, first_seen, end_seen,
        PAGE_SIZE, BLOCK_N, HEAD_MAIN, 0,
    )  # fmt: skip
    if HEAD_TAIL:
        gather_columns(
            key, k_tail_ring.index(slot), table_row, key_page_stride, key_token_stride, tile, first_seen, end_seen,
            PAGE_SIZE, BLOCK_N, HEAD_TAIL, HEAD_MAIN,
        )  # fmt: skip
    if not FULL_TOGETHER:
        async_copy.mbarrier_arrive(k_full.index(slot), increment_count=False)
    if not FREE_TOGETHER:
        mbarrier.wait(v_free.index(slot), left)
    gather_columns(
        value, v_ring.index(slot), table_row, value_page_stride, value_token_stride, tile, first_seen, end_seen,
        PAGE_SIZE, BLOCK_N, HEAD_MAIN, 0,
    )  # fmt: skip
    async_copy.mbarrier_arrive(v_full.index(slot), increment_count=False)


@gluon.jit
def gather_columns(
    source: gl.tensor,
    target: gl.shared_memory_descriptor,  # [BLOCK_N, COLUMNS] shared memory
    table_row: gl.tensor,
    page_stride: gl.tensor,
    token_stride: gl.tensor,
    tile: gl.tensor,
    first_seen: gl.tensor,
    end_seen: gl.tensor,
    PAGE_SIZE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    COLUMNS: gl.constexpr,
    FIRST_COLUMN: gl.constexpr,
) -> None:
    """Some columns of a tile, a few keys at a time, so that few addresses are held at once."""
    ROWS: gl.constexpr = 32  # of one round
    LANES: gl.constexpr = COLUMNS // 8 if COLUMNS < 256 else 32
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [GATHERING_WARPS, 1], [1, 0])
    columns = FIRST_COLUMN + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    for first in gl.static_range(0, BLOCK_N, ROWS):
        keys = tile + first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
        seen = (keys >= first_seen) & (keys < end_seen)
        page = gl.load(table_row + keys // PAGE_SIZE, mask=seen, other=0)
        slots = (page.to(gl.int64) * page_stride + (keys % PAGE_SIZE) * token_stride) * PIECE
        gather_load(
            target.slice(first, ROWS, dim=0),
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
