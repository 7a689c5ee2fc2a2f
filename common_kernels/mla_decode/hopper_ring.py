"""The ring of shared memory that keys lie in for `mla_decode` on Hopper, and the producer that brings them there.

A tile is 64 keys: 512 columns of latent vectors, which are keys and values at once, in two halves of 256 (`left` and
`right`), and 64 columns of rope. It lies in one stage of the ring. A part's tiles are counted over all of its items:
tile n lies in stage n % STAGES, and its barriers' phase is (n // STAGES) & 1.

The producer waits until a half of a stage is `empty`, asks for the new one, and never waits for what it asked for: the
barrier `full` of that half tells when it is there. Keys come in one of three ways:

* by the copy engine (TMA), as boxes of 64 keys, where a page holds whole tiles;
* gathered by asynchronous copies of 16 bytes, where it does not;
* through registers, where the cache is float8, to become bfloat16, or where keys lie at odd addresses.

What a stage holds from earlier, past the row's end, may be anything. Scores of such keys are masked, but a weight of
zero must meet a number: `clear_past` clears boxes past the end before they are read as values, and gathering reads the
last key again instead.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from taut.common_kernels.aggregates import aggregates_of
from taut.common_kernels.float8 import TO_BFLOAT16
from taut.common_kernels.gluon_features import THREAD_BARRIERS, TMA_LOADS, first_of
from taut.common_kernels.schedule.hopper_items import (
    Item,
    Part,
    Schedule,
    let_next_start,
    load_first_item,
    load_item,
    load_part,
    wait_for_kernel_ahead,
)

tma_load = first_of(tma, TMA_LOADS)
gather_load = first_of(async_copy, TMA_LOADS)
thread_barrier = first_of(gl, THREAD_BARRIERS)

TILE_KEYS, HALF_COLUMNS, ROPE_COLUMNS = 64, 256, 64
BLOCK_N = gl.constexpr(TILE_KEYS)
HALF = gl.constexpr(HALF_COLUMNS)  # columns of a latent vector that lie, and are released, together
LATENT = gl.constexpr(2 * HALF_COLUMNS)
ROPE = gl.constexpr(ROPE_COLUMNS)
GATHERERS = gl.constexpr(128)  # threads of the producer where the copy engine does not bring keys


@aggregates_of(gl, gluon)
class Half:
    """One half of the latent vectors, in every stage.

    Attributes:
        keys: shared memory [STAGES, BLOCK_N, HALF].
        full: barriers [STAGES, 1]: a tile's half has arrived. One arrival a tile with the bytes of the boxes, or one of
            each gathering thread, or one of the producer that stores.
        empty: barriers [STAGES, 1]: its last product has ended. One arrival a tile.
    """

    keys: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


@aggregates_of(gl, gluon)
class Stage:
    """Where a tile lies in the ring.

    Attributes:
        index: of the stage.
        phase: of its barriers.
    """

    index: gl.tensor
    phase: gl.tensor


@aggregates_of(gl, gluon)
class Ring:
    """Where tiles lie, and how they come there.

    Attributes:
        left: the first half of the latent vectors.
        right: the second half. Its barriers stand for the columns of rope too.
        rope: shared memory [STAGES, BLOCK_N, ROPE].
        STAGES: how many tiles it holds.
        BOXES: keys come in boxes.
        GATHERS: keys come by asynchronous copies.
    """

    left: Half
    right: Half
    rope: gl.shared_memory_descriptor
    STAGES: gl.constexpr
    BOXES: gl.constexpr
    GATHERS: gl.constexpr


@aggregates_of(gl, gluon)
class Cache:
    """Where the keys are brought from.

    Attributes:
        vectors: pointer to the cache [pages, PAGE_SIZE, LATENT + ROPE], bytes if FLOAT8.
        latent_boxes: descriptor of the cache in boxes of 64 keys and 256 columns; None where threads bring keys.
        rope_boxes: likewise in boxes of 64 columns.
        table: pointer to the page table.
        table_rows: pointer to the row of the table of each row of the step, if HAS_TABLE_ROWS.
        table_stride: from a row of the table to the next.
        page_stride: from a page to the next, in elements.
        slot_stride: from a slot to the next.
        page_slots: from a page to the next, in slots; of use where boxes are.
        PAGE_SIZE: slots of a page.
        HAS_TABLE_ROWS: whether rows of the step have their entries elsewhere in the table.
        FLOAT8: whether the cache is float8.
    """

    vectors: gl.tensor
    latent_boxes: Any
    rope_boxes: Any
    table: gl.tensor
    table_rows: gl.tensor
    table_stride: gl.tensor
    page_stride: gl.tensor
    slot_stride: gl.tensor
    page_slots: gl.tensor
    PAGE_SIZE: gl.constexpr
    HAS_TABLE_ROWS: gl.constexpr
    FLOAT8: gl.constexpr


@gluon.jit
def make_ring(DTYPE: gl.constexpr, STAGES: gl.constexpr, BOXES: gl.constexpr, GATHERS: gl.constexpr) -> Ring:
    """A ring in shared memory."""
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    left_keys = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, HALF], TILE)
    right_keys = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, HALF], TILE)
    rope = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, ROPE], TILE)
    left_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    right_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    left_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    right_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(left_full.index(stage), count=GATHERERS if GATHERS else 1)
        mbarrier.init(right_full.index(stage), count=GATHERERS if GATHERS else 1)
        mbarrier.init(left_empty.index(stage), count=1)
        mbarrier.init(right_empty.index(stage), count=1)
    left = Half(left_keys, left_full, left_empty)
    right = Half(right_keys, right_full, right_empty)
    return Ring(left, right, rope, STAGES, BOXES, GATHERS)


@gluon.jit
def stage_of(ring: Ring, n: gl.tensor) -> Stage:
    """Where tile n of a part lies."""
    return Stage(n % ring.STAGES, (n // ring.STAGES) & 1)


@gluon.jit
def tiles_between(part: Part, number: gl.tensor, item: Item) -> gl.tensor:
    """The tiles of an item, by its number, that a part works on, begin <= tile < end; none of a row without keys."""
    tiles = (gl.maximum(item.end_key - item.first_key, 0) + BLOCK_N - 1) // BLOCK_N
    begin = gl.where(number == part.first_item, part.first_tile, 0)
    end = gl.where(number == part.last_item, gl.minimum(part.end_tile, tiles), tiles)
    return begin, gl.maximum(begin, end)


@gluon.jit
def wait_for_keys(full: gl.shared_memory_descriptor, phase: gl.tensor, GATHERS: gl.constexpr) -> None:
    """Wait for a half of a tile. What copies of threads wrote must be fenced before matrix instructions read it."""
    mbarrier.wait(full, phase)
    if GATHERS:
        fence_async_shared()


@gluon.jit
def clear_past(keys: gl.shared_memory_descriptor, keys_here: gl.tensor) -> None:
    """Zeros to a half of a tile from key `keys_here` on, past the row's end, where a box brought what others left.

    A weight of zero must meet a number.
    """
    BY_KEY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    if keys_here < BLOCK_N:
        past = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, BY_KEY)) >= keys_here
        for box in gl.static_range(HALF // 64):
            view = keys.slice(box * 64, 64, dim=1)
            numbers = view.load(BY_KEY)
            view.store(gl.where(past[:, None], gl.zeros_like(numbers), numbers))
        fence_async_shared()
        thread_barrier()


@gluon.jit
def produce(schedule: Schedule, cache: Cache, ring: Ring, HEAD_BLOCKS: gl.constexpr, EARLY: gl.constexpr) -> None:
    """The producer: brings the tiles of a part, one after another."""
    if EARLY:
        wait_for_kernel_ahead()
        let_next_start()  # only now: the merge reads the schedule without waiting
    part_number = gl.program_id(0) // HEAD_BLOCKS
    part = load_part(schedule, part_number)
    item = load_first_item(schedule, part_number)
    if ring.BOXES:
        produce_boxes(schedule, part, item, cache, ring)
    else:
        produce_by_threads(schedule, part, item, cache, ring)


@gluon.jit
def pages_of(cache: Cache, row: gl.tensor) -> gl.tensor:
    """Where the page numbers of a row begin."""
    table_row = row.to(gl.int64)
    if cache.HAS_TABLE_ROWS:
        table_row = gl.load(cache.table_rows + row).to(gl.int64)
    return cache.table + table_row * cache.table_stride


@gluon.jit
def produce_boxes(schedule: Schedule, part: Part, item: Item, cache: Cache, ring: Ring) -> None:
    """One warp asks for boxes of 64 keys, which lie in one page each."""
    n = 0
    for number in range(part.first_item, part.last_item + 1):
        begin, end = tiles_between(part, number, item)
        pages = pages_of(cache, item.row)
        last_tile = gl.maximum(end - 1, 0)
        page = gl.load(
            pages + (item.first_key + gl.minimum(begin, last_tile) * BLOCK_N) // cache.PAGE_SIZE,
            mask=begin < end,
            other=0,
        )
        for tile in range(begin, end):
            first = item.first_key + tile * BLOCK_N
            slot = page * cache.page_slots + first % cache.PAGE_SIZE
            following = item.first_key + gl.minimum(tile + 1, last_tile) * BLOCK_N
            page = gl.load(pages + following // cache.PAGE_SIZE)  # one tile ahead
            load_boxes(cache, ring, slot, stage_of(ring, n))
            n += 1
        item = load_item(schedule, gl.minimum(number + 1, part.last_item))


@gluon.jit
def load_boxes(cache: Cache, ring: Ring, slot: gl.tensor, stage: Stage) -> None:
    """Let the copy engine bring the tile that begins in a slot, each half when its place is empty."""
    left, right = ring.left, ring.right
    mbarrier.wait(left.empty.index(stage.index), stage.phase ^ 1)
    mbarrier.expect(left.full.index(stage.index), BLOCK_N * HALF * 2)
    tma_load(cache.latent_boxes, [slot, 0], left.full.index(stage.index), left.keys.index(stage.index))
    mbarrier.wait(right.empty.index(stage.index), stage.phase ^ 1)
    mbarrier.expect(right.full.index(stage.index), BLOCK_N * (HALF + ROPE) * 2)
    tma_load(cache.latent_boxes, [slot, HALF], right.full.index(stage.index), right.keys.index(stage.index))
    tma_load(cache.rope_boxes, [slot, LATENT], right.full.index(stage.index), ring.rope.index(stage.index))


@gluon.jit
def produce_by_threads(schedule: Schedule, part: Part, item: Item, cache: Cache, ring: Ring) -> None:
    """A warpgroup gathers keys from pages of any size by asynchronous copies, or reads and stores them."""
    PIECE: gl.constexpr = 16 if cache.FLOAT8 else 8  # elements of 16 bytes
    BY_KEY: gl.constexpr = gl.BlockedLayout([1, PIECE], [PIECE // 2, 64 // PIECE], [4, 1], [1, 0])
    OF_KEY: gl.constexpr = gl.SliceLayout(1, BY_KEY)
    columns = gl.arange(0, HALF, layout=gl.SliceLayout(0, BY_KEY))[None, :]
    rope_columns = LATENT + gl.arange(0, ROPE, layout=gl.SliceLayout(0, BY_KEY))[None, :]
    n = 0
    for number in range(part.first_item, part.last_item + 1):
        begin, end = tiles_between(part, number, item)
        if begin < end:
            pages = pages_of(cache, item.row)
            vectors = vectors_of(cache, pages, item.first_key + begin * BLOCK_N, item.end_key, OF_KEY)
            for tile in range(begin, end):
                here = vectors[:, None]
                # One tile ahead, so that no key waits for a page number.
                vectors = vectors_of(cache, pages, item.first_key + (tile + 1) * BLOCK_N, item.end_key, OF_KEY)
                stage = stage_of(ring, n)
                if ring.GATHERS:
                    gather(ring, here, columns, rope_columns, stage)
                else:
                    read_and_store(ring, here, columns, rope_columns, stage, cache.FLOAT8)
                n += 1
        item = load_item(schedule, gl.minimum(number + 1, part.last_item))


@gluon.jit
def vectors_of(cache: Cache, pages: gl.tensor, first: gl.tensor, end_key: gl.tensor, LAYOUT: gl.constexpr) -> gl.tensor:
    """[BLOCK_N] where the vectors of a tile begin; positions past the end are the last key once more."""
    position = gl.minimum(first + gl.arange(0, BLOCK_N, layout=LAYOUT), end_key - 1)
    page = gl.load(pages + position // cache.PAGE_SIZE).to(gl.int64)
    page_start = cache.vectors + page * cache.page_stride
    return page_start + (position % cache.PAGE_SIZE).to(gl.int64) * cache.slot_stride


@gluon.jit
def gather(ring: Ring, vectors: gl.tensor, columns: gl.tensor, rope_columns: gl.tensor, stage: Stage) -> None:
    """Ask for a tile by asynchronous copies, for each half when its place is empty."""
    left, right = ring.left, ring.right
    mbarrier.wait(left.empty.index(stage.index), stage.phase ^ 1)
    gather_load(left.keys.index(stage.index), vectors + columns)
    async_copy.mbarrier_arrive(left.full.index(stage.index), increment_count=False)
    mbarrier.wait(right.empty.index(stage.index), stage.phase ^ 1)
    gather_load(right.keys.index(stage.index), vectors + (columns + HALF))
    gather_load(ring.rope.index(stage.index), vectors + rope_columns)
    async_copy.mbarrier_arrive(right.full.index(stage.index), increment_count=False)


@gluon.jit
def read_and_store(
    ring: Ring,
    vectors: gl.tensor,
    columns: gl.tensor,
    rope_columns: gl.tensor,
    stage: Stage,
    FLOAT8: gl.constexpr,
) -> None:
    """Bring a tile through registers, each half when its place is empty."""
    left, right = ring.left, ring.right
    left_stored = gl.load(vectors + columns)  # all of the tile is asked for before any of it is stored
    right_stored = gl.load(vectors + (columns + HALF))
    rope_stored = gl.load(vectors + rope_columns)
    mbarrier.wait(left.empty.index(stage.index), stage.phase ^ 1)
    left.keys.index(stage.index).store(numbers_of(left_stored, FLOAT8))
    fence_async_shared()
    thread_barrier()
    mbarrier.arrive(left.full.index(stage.index), count=1)
    mbarrier.wait(right.empty.index(stage.index), stage.phase ^ 1)
    right.keys.index(stage.index).store(numbers_of(right_stored, FLOAT8))
    ring.rope.index(stage.index).store(numbers_of(rope_stored, FLOAT8))
    fence_async_shared()
    thread_barrier()
    mbarrier.arrive(right.full.index(stage.index), count=1)


@gluon.jit
def numbers_of(stored: gl.tensor, FLOAT8: gl.constexpr) -> gl.tensor:
    """What is stored, as bfloat16."""
    numbers = stored
    if FLOAT8:
        numbers = to_bfloat16(stored)
    return numbers


@gluon.jit
def to_bfloat16(bits: gl.tensor) -> gl.tensor:
    """The numbers that e4m3 bytes stand for."""
    return gl.inline_asm_elementwise(TO_BFLOAT16, "=r,=r,r", [bits], dtype=gl.bfloat16, is_pure=True, pack=4)
