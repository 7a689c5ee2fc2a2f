"""`mla_decode` on Hopper, in Gluon: two warpgroups compute, a third brings keys from memory.

The contract, the schedule, the scratch and the merge are those of the portable kernel, see `triton_launch`. What is new
is who does what when, and in which form. docs/hopper-mla-decode.md counts products and bytes, and draws both forms.

A tile is 64 keys: 512 columns of latent vectors, which are keys and values at once, in two halves of 256 (`left` and
`right`), and 64 columns of rope. It lies in one of two slots of shared memory. The bringing warpgroup waits until a
half of a slot is `free`, asks for it, and never waits for what it asked for: the barrier `full` of that half tells when
it is there. It comes as boxes (TMA) where a page holds whole tiles, is gathered by asynchronous copies of 16 bytes
where it does not, and goes through registers where the cache is float8, to become bfloat16, or lies at odd addresses.

Many rows (64 heads times queries a program): FlashMLA's division of labour (its "seesaw"). The result, 64 x 512 in
float32, fills the registers of two warpgroups: 0 sums up the left half of the values, 1 the right half. The tiles of an
item are scored in turn, even ones by warpgroup 0, odd ones by 1, each once; whoever scores a tile hands over its
weights, in shared memory, with the running maximum they are relative to. So warpgroup 0 weighs one tile while the
matrix unit scores the next one for warpgroup 1, and the other way round.

    warpgroup 0:  scores(0) | weigh(0) | left(0) | left(1)             | scores(2) | ...
    warpgroup 1:  scores(1)            | right(0), meanwhile weigh(1)  | right(1)  | scores(3) | ...
                                 ^ weights(0) are handed over    ^ weights(1)

Few rows (8, 16 or 32): the products are turned round, scores [keys, rows] and result [columns, rows], since a matrix
instruction is 64 long on one axis and as short as 8 on the other; FlashMLA-ETAP (arXiv 2506.01969) describes the idea.
The result is small enough for one warpgroup, so each works on every other tile by itself, with a maximum of its own,
and they add up what they have at the end of an item.

Barriers. A tile is the n-th of its part, counted over all items; slot n % 2, phase (n // 2) & 1.

* `full_left`, `full_right` [slot]: one arrival with the bytes of the boxes, or one of each gathering thread, or one of
  the storing warpgroup, a tile.
* `free_left`, `free_right` [slot]: one arrival a tile, after the last product that reads this half. Many rows: of
  warpgroup 0 for the left half and of 1 for the right one. The other warpgroup reads a half only to score, and that
  has ended when it hands over the weights, which this one has waited for (or it is the one that scores).
* `weighed` [slot], many rows: one arrival a tile, of the warpgroup that scores it. The weights lie where the tile's
  columns of rope were, which only the scores read. Those are filled anew with the right half, and that is asked for
  after the left half: by then both halves' products have ended, one of which read the weights. The tops lie in a place
  of their tile's slot, which is filled anew only after both have read them.
* `query_ready`: two arrivals an item, one of each warpgroup, which bring half of the queries each. The queries of the
  item before are not read any more, for both have arrived at:
* `totals_ready`: two arrivals an item, when a warpgroup has done all its tiles. Its numbers lie in a place of the
  item's parity: who writes there for the item after next has passed this barrier for the next one, at which the other
  arrived after it had read.
* `left_given`, `right_given`, few rows: one arrival an item. One place serves both ways in turn: warpgroup 1 gives its
  left half, 0 takes it and gives its right half. 1 takes that before it gives again.

A number that a slot holds from earlier, past the row's end, may be anything. Scores of such keys are masked, but a
weight of zero must meet a number: boxes are cleared past the end before they are read as values; gathering reads the
last key again instead.

What a tile table tells, under `hopper_mla_decode`: facts as `mla_decode`; numbers `keys` (64), `rows` (64, 32, 16 or
8), `stages`, how many slots there are (2 for 64 rows), `registers` of a thread that computes where keys come in boxes
and `gather_registers` where threads bring them (these have what remains of 504), and `programs`, `share` and `spare` as
there.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from taut.common_kernels.float8 import TO_BFLOAT16
from taut.common_kernels.gluon_assembly import worked_out
from taut.common_kernels.gluon_features import THREAD_BARRIERS, TMA_LOADS, first_of
from taut.common_kernels.merge.triton_launch import merge_items
from taut.common_kernels.mla_decode.triton_launch import LOG2_E, MlaWorkspace, mla_tile
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
from taut.common_kernels.schedule.triton_launch import launch_options
from taut.common_kernels.tiles import table_for
from taut.common_kernels.workspace import device_facts

if TYPE_CHECKING:
    from torch import Tensor

    from taut.common_kernels.kernels import Workspace
    from taut.common_kernels.problem import Problem
    from taut.common_kernels.step import Step

tma_load = first_of(tma, TMA_LOADS)
gather_load = first_of(async_copy, TMA_LOADS)
thread_barrier = first_of(gl, THREAD_BARRIERS)

LN2 = gl.constexpr(math.log(2))
TILE_KEYS, TILE_COLUMNS, ROPE_COLUMNS = 64, (256, 256), 64
KEYS = gl.constexpr(TILE_KEYS)
HALF = gl.constexpr(TILE_COLUMNS[0])  # columns of a latent vector that one warpgroup sums up
LATENT = gl.constexpr(sum(TILE_COLUMNS))
ROPE = gl.constexpr(ROPE_COLUMNS)
MANY = gl.constexpr(64)  # rows of a program, as many as a matrix instruction has
BRINGERS = gl.constexpr(128)  # threads that bring keys where the tensor memory accelerator does not


# What both kernels share


@gluon.jit
def to_bfloat16(bits: gl.tensor) -> gl.tensor:
    """The numbers that e4m3 bytes stand for."""
    return gl.inline_asm_elementwise(TO_BFLOAT16, "=r,=r,r", [bits], dtype=gl.bfloat16, is_pure=True, pack=4)


@gluon.jit
def anew(number: gl.tensor) -> gl.tensor:
    """The same number, of which the compiler knows nothing: what is computed from it is not kept from item to item.

    It would keep the addresses of queries and results in registers that the tiles' loop needs.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _tiles(
    part: Part,
    number: gl.tensor,
    item: Item,
) -> gl.tensor:
    """The tiles of an item, by its number, that a part works on, begin <= tile < end; none of a row without keys."""
    tiles = (gl.maximum(item.end_key - item.first_key, 0) + KEYS - 1) // KEYS
    begin = gl.where(number == part.first_item, part.first_tile, 0)
    end = gl.where(number == part.last_item, gl.minimum(part.end_tile, tiles), tiles)
    return begin, gl.maximum(begin, end)


@gluon.jit
def _load_query(
    nope: gl.shared_memory_descriptor,  # [ROWS, HALF] the half of WHO
    pe: gl.shared_memory_descriptor,  # [ROWS, ROPE] brought by the second warpgroup
    q_nope: gl.tensor,
    q_pe: gl.tensor,
    strides: gl.tuple,
    first_query: gl.tensor,
    queries: gl.tensor,
    first_row: gl.tensor,
    WHO: gl.constexpr,
    HEADS: gl.constexpr,
    ROWS: gl.constexpr,
) -> None:
    """Queries of an item into shared memory, half of their columns by each warpgroup; zeros where there is no query."""
    nope_t, nope_h, nope_d, pe_t, pe_h, pe_d, SIXTEENS = strides
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, WIDE))
    query = row // HEADS
    at = (first_query + query).to(gl.int64) * nope_t + (row % HEADS).to(gl.int64) * nope_h
    column = WHO * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(0, WIDE))
    here = (query < queries)[:, None]
    addresses = q_nope + at[:, None] + (column * nope_d)[None, :]
    if SIXTEENS:  # said here, for a partition of other warps than the first knows nothing of the kernel's arguments
        addresses = gl.max_contiguous(gl.multiple_of(addresses, [1, 16]), [1, 8])
    nope.store(gl.load(addresses, mask=here, other=0.0))
    if WHO == 1:
        NARROW: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, NARROW))
        query = row // HEADS
        at = (first_query + query).to(gl.int64) * pe_t + (row % HEADS).to(gl.int64) * pe_h
        column = gl.arange(0, ROPE, layout=gl.SliceLayout(0, NARROW))
        here = (query < queries)[:, None]
        addresses = q_pe + at[:, None] + (column * pe_d)[None, :]
        if SIXTEENS:
            addresses = gl.max_contiguous(gl.multiple_of(addresses, [1, 16]), [1, 8])
        pe.store(gl.load(addresses, mask=here, other=0.0))
    fence_async_shared()  # matrix instructions read it


@gluon.jit
def _clear_past(half: gl.shared_memory_descriptor, keys_here: gl.tensor) -> None:
    """Zeros to the values of a tile that lie past the row's end, where a box brought what others left there.

    A weight of zero must meet a number.
    """
    BY_KEY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    if keys_here < KEYS:
        past = gl.arange(0, KEYS, layout=gl.SliceLayout(1, BY_KEY)) >= keys_here
        for box in gl.static_range(HALF // 64):
            view = half.slice(box * 64, 64, dim=1)
            numbers = view.load(BY_KEY)
            view.store(gl.where(past[:, None], gl.zeros_like(numbers), numbers))
        fence_async_shared()
        thread_barrier()


# Who brings the keys. A tile is the n-th of its part, over all items, and lies in slot n % STAGES of shared memory, as
# the (n // STAGES)-th one there: bit 0 of that is the phase of a slot's barriers.


@gluon.jit
def _bring_by_tma(
    tensors: gl.tuple,
    buffers: gl.tuple,
    barriers: gl.tuple,
    numbers: gl.tuple,
    HEAD_BLOCKS: gl.constexpr,
    HAS_TABLE_ROWS: gl.constexpr,
    PAGE: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """One warp asks for boxes of 64 keys, which lie in one page each."""
    _, wide, narrow, table, table_rows, items, parts = tensors
    left, right, rope = buffers
    full_left, full_right, free_left, free_right = barriers
    table_stride, _, _, page_keys = numbers
    schedule = Schedule(items, parts)
    part_number = gl.program_id(0) // HEAD_BLOCKS
    part = load_part(schedule, part_number)
    item = load_first_item(schedule, part_number)
    n = 0
    for number in range(part.first_item, part.last_item + 1):
        begin, end = _tiles(part, number, item)
        table_row = item.row.to(gl.int64)
        if HAS_TABLE_ROWS:
            table_row = gl.load(table_rows + item.row).to(gl.int64)
        pages = table + table_row * table_stride
        last_tile = gl.maximum(end - 1, 0)
        page = gl.load(
            pages + (item.first_key + gl.minimum(begin, last_tile) * KEYS) // PAGE, mask=begin < end, other=0
        )
        for tile in range(begin, end):
            first = item.first_key + tile * KEYS
            at = page * page_keys + first % PAGE
            page = gl.load(pages + (item.first_key + gl.minimum(tile + 1, last_tile) * KEYS) // PAGE)  # one tile ahead
            slot = n % STAGES
            phase = (n // STAGES) & 1
            mbarrier.wait(free_left.index(slot), phase ^ 1)
            mbarrier.expect(full_left.index(slot), KEYS * HALF * 2)
            tma_load(wide, [at, 0], full_left.index(slot), left.index(slot))
            mbarrier.wait(free_right.index(slot), phase ^ 1)
            mbarrier.expect(full_right.index(slot), KEYS * (HALF + ROPE) * 2)
            tma_load(wide, [at, HALF], full_right.index(slot), right.index(slot))
            tma_load(narrow, [at, LATENT], full_right.index(slot), rope.index(slot))
            n += 1
        item = load_item(schedule, gl.minimum(number + 1, part.last_item))


@gluon.jit
def _vectors_at(
    cache: gl.tensor,
    stride_page: gl.tensor,
    stride_place: gl.tensor,
    pages: gl.tensor,
    first: gl.tensor,
    end_key: gl.tensor,
    PAGE: gl.constexpr,
    LAYOUT: gl.constexpr,
) -> gl.tensor:
    """[KEYS] where the vectors of a tile begin; positions past the end are the last key once more, to read no other."""
    position = gl.minimum(first + gl.arange(0, KEYS, layout=LAYOUT), end_key - 1)
    page = gl.load(pages + position // PAGE).to(gl.int64)
    return cache + page * stride_page + (position % PAGE).to(gl.int64) * stride_place


@gluon.jit
def _numbers(stored: gl.tensor, QUANTISED: gl.constexpr) -> gl.tensor:
    numbers = stored
    if QUANTISED:
        numbers = to_bfloat16(stored)
    return numbers


@gluon.jit
def _bring_by_threads(
    tensors: gl.tuple,
    buffers: gl.tuple,
    barriers: gl.tuple,
    numbers: gl.tuple,
    HEAD_BLOCKS: gl.constexpr,
    HAS_TABLE_ROWS: gl.constexpr,
    PAGE: gl.constexpr,
    STAGES: gl.constexpr,
    GATHERED: gl.constexpr,
    QUANTISED: gl.constexpr,
) -> None:
    """A warpgroup gathers keys from pages of any size by asynchronous copies, or reads and stores them."""
    cache, _, _, table, table_rows, items, parts = tensors
    left, right, rope = buffers
    full_left, full_right, free_left, free_right = barriers
    table_stride, stride_page, stride_place, _ = numbers
    VECTOR: gl.constexpr = 16 if QUANTISED else 8  # elements of 16 bytes
    BY_KEY: gl.constexpr = gl.BlockedLayout([1, VECTOR], [VECTOR // 2, 64 // VECTOR], [4, 1], [1, 0])
    OF_KEY: gl.constexpr = gl.SliceLayout(1, BY_KEY)
    column = gl.arange(0, HALF, layout=gl.SliceLayout(0, BY_KEY))[None, :]
    rope_column = LATENT + gl.arange(0, ROPE, layout=gl.SliceLayout(0, BY_KEY))[None, :]
    schedule = Schedule(items, parts)
    part_number = gl.program_id(0) // HEAD_BLOCKS
    part = load_part(schedule, part_number)
    item = load_first_item(schedule, part_number)
    n = 0
    for number in range(part.first_item, part.last_item + 1):
        begin, end = _tiles(part, number, item)
        if begin < end:
            table_row = item.row.to(gl.int64)
            if HAS_TABLE_ROWS:
                table_row = gl.load(table_rows + item.row).to(gl.int64)
            pages = table + table_row * table_stride
            vectors = _vectors_at(
                cache, stride_page, stride_place, pages, item.first_key + begin * KEYS, item.end_key, PAGE, OF_KEY
            )
            for tile in range(begin, end):
                here = vectors[:, None]
                # One tile ahead, so that no key waits for a page number.
                vectors = _vectors_at(
                    cache,
                    stride_page,
                    stride_place,
                    pages,
                    item.first_key + (tile + 1) * KEYS,
                    item.end_key,
                    PAGE,
                    OF_KEY,
                )
                slot = n % STAGES
                phase = (n // STAGES) & 1
                if GATHERED:
                    mbarrier.wait(free_left.index(slot), phase ^ 1)
                    gather_load(left.index(slot), here + column)
                    async_copy.mbarrier_arrive(full_left.index(slot), increment_count=False)
                    mbarrier.wait(free_right.index(slot), phase ^ 1)
                    gather_load(right.index(slot), here + (column + HALF))
                    gather_load(rope.index(slot), here + rope_column)
                    async_copy.mbarrier_arrive(full_right.index(slot), increment_count=False)
                else:
                    left_stored = gl.load(here + column)  # all of the tile is asked for before any of it is stored
                    right_stored = gl.load(here + (column + HALF))
                    rope_stored = gl.load(here + rope_column)
                    mbarrier.wait(free_left.index(slot), phase ^ 1)
                    left.index(slot).store(_numbers(left_stored, QUANTISED))
                    fence_async_shared()
                    thread_barrier()
                    mbarrier.arrive(full_left.index(slot), count=1)
                    mbarrier.wait(free_right.index(slot), phase ^ 1)
                    right.index(slot).store(_numbers(right_stored, QUANTISED))
                    rope.index(slot).store(_numbers(rope_stored, QUANTISED))
                    fence_async_shared()
                    thread_barrier()
                    mbarrier.arrive(full_right.index(slot), count=1)
                n += 1
        item = load_item(schedule, gl.minimum(number + 1, part.last_item))


@gluon.jit
def _bring(
    tensors: gl.tuple,
    buffers: gl.tuple,
    barriers: gl.tuple,
    numbers: gl.tuple,
    HEAD_BLOCKS: gl.constexpr,
    HAS_TABLE_ROWS: gl.constexpr,
    PAGE: gl.constexpr,
    STAGES: gl.constexpr,
    TMA: gl.constexpr,
    GATHERED: gl.constexpr,
    QUANTISED: gl.constexpr,
    OVERLAPPED: gl.constexpr,
) -> None:
    """What keys are brought by depends on where they lie."""
    if OVERLAPPED:
        wait_for_kernel_ahead()
        let_next_start()  # only now: the merge reads the schedule without waiting
    if TMA:
        _bring_by_tma(tensors, buffers, barriers, numbers, HEAD_BLOCKS, HAS_TABLE_ROWS, PAGE, STAGES)
    else:
        _bring_by_threads(
            tensors, buffers, barriers, numbers, HEAD_BLOCKS, HAS_TABLE_ROWS, PAGE, STAGES, GATHERED, QUANTISED
        )


@gluon.jit
def _wait_for_keys(full: gl.shared_memory_descriptor, phase: gl.tensor, GATHERED: gl.constexpr) -> None:
    """Wait for a half of a tile. What copies of threads wrote must be fenced before matrix instructions read it."""
    mbarrier.wait(full, phase)
    if GATHERED:
        fence_async_shared()


@gluon.jit
def _base_of(top: gl.tensor, CAUSAL: gl.constexpr) -> gl.tensor:
    """What scores are taken relative to: the top, or 0 for a query that has seen nothing yet."""
    base = top
    if CAUSAL:
        base = gl.where(top == float("-inf"), 0.0, top)
    return base


@gluon.jit
def _finish(
    acc: gl.tensor,  # ROWS by HALF of one warpgroup, either way round, times what makes it the result
    natural: gl.tensor,  # [ROWS] LSE, natural logarithm
    outputs: gl.tuple,
    strides: gl.tuple,
    record: gl.tuple,
    first_row: gl.tensor,
    WHO: gl.constexpr,
    HEADS: gl.constexpr,
    HEAD_BLOCKS: gl.constexpr,
    ROWS: gl.constexpr,
    ROW_AXIS: gl.constexpr,
    HAS_LSE: gl.constexpr,
) -> None:
    """Write one half of an item's result to the output, or to scratch where the item is split."""
    out, lse, partials, partial_lses = outputs
    out_t, out_h, out_d, lse_t, lse_h, SIXTEENS = strides
    first_query, queries, splits, slot = record
    OF_ROW: gl.constexpr = gl.SliceLayout(1 - ROW_AXIS, acc.type.layout)
    OF_COLUMN: gl.constexpr = gl.SliceLayout(ROW_AXIS, acc.type.layout)
    row = first_row + gl.arange(0, ROWS, layout=OF_ROW)
    column = WHO * HALF + gl.arange(0, HALF, layout=OF_COLUMN)
    query, head = row // HEADS, row % HEADS
    here = gl.expand_dims(query < queries, 1 - ROW_AXIS)
    lse_row = first_row + gl.arange(0, ROWS, layout=natural.type.layout)
    lse_query = lse_row // HEADS
    if splits > 1:
        scratch_row = slot.to(gl.int64) * (HEAD_BLOCKS * ROWS)
        at = gl.expand_dims(row * LATENT, 1 - ROW_AXIS) + gl.expand_dims(column, ROW_AXIS)
        gl.store(partials + scratch_row * LATENT + at, acc, mask=here)
        if WHO == 0:
            gl.store(partial_lses + scratch_row + lse_row, natural, mask=lse_query < queries)
    elif splits == 1:
        at = (first_query + query).to(gl.int64) * out_t + head.to(gl.int64) * out_h
        at = gl.expand_dims(at, 1 - ROW_AXIS) + gl.expand_dims(column * out_d, ROW_AXIS)
        addresses = out + at
        if SIXTEENS and ROW_AXIS == 0:
            addresses = gl.max_contiguous(gl.multiple_of(addresses, [1, 16]), [1, 8])
        gl.store(addresses, acc.to(out.dtype.element_ty), mask=here)
        if HAS_LSE and WHO == 0:
            lse_at = (first_query + lse_query).to(gl.int64) * lse_t + (lse_row % HEADS).to(gl.int64) * lse_h
            gl.store(lse + lse_at, natural, mask=lse_query < queries)


@gluon.jit
def _fill_padding(
    outputs: gl.tuple,
    strides: gl.tuple,
    begin: gl.tensor,
    end: gl.tensor,
    step: gl.tensor,
    first_row: gl.tensor,
    WHO: gl.constexpr,
    HEADS: gl.constexpr,
    ROWS: gl.constexpr,
    HAS_LSE: gl.constexpr,
) -> None:
    """Zeros for the tokens of no row, the padding of a batch."""
    out, lse, _, _ = outputs
    out_t, out_h, out_d, lse_t, lse_h, SIXTEENS = strides
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    head = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, WIDE))
    column = WHO * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(0, WIDE))
    at = (head.to(gl.int64) * out_h)[:, None] + (column * out_d)[None, :]
    zeros = gl.zeros([ROWS, HALF], out.dtype.element_ty, layout=WIDE)
    for token in range(begin, end, step):
        far = gl.cast(token, gl.int64)
        addresses = out + far * out_t + at
        if SIXTEENS:
            addresses = gl.max_contiguous(gl.multiple_of(addresses, [1, 16]), [1, 8])
        gl.store(addresses, zeros, mask=(head < HEADS)[:, None])
        if HAS_LSE and WHO == 0:
            nothing = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, WIDE))
            gl.store(lse + far * lse_t + head.to(gl.int64) * lse_h, nothing, mask=head < HEADS)


# Many rows


@gluon.jit
def _start_scores(
    query: gl.tuple,
    keys: gl.tuple,
    full: gl.tuple,
    slot: gl.tensor,
    phase: gl.tensor,
    LAYOUT: gl.constexpr,
    GATHERED: gl.constexpr,
) -> gl.tensor:
    """Ask for the products of all rows with a tile's keys, half by half as these come in; they must be waited for."""
    q_left, q_right, q_rope = query
    left, right, rope = keys
    full_left, full_right = full
    scores = gl.zeros([MANY, KEYS], gl.float32, layout=LAYOUT)
    _wait_for_keys(full_left.index(slot), phase, GATHERED)
    scores = warpgroup_mma(q_left, left.index(slot).permute((1, 0)), scores, use_acc=False, is_async=True)
    _wait_for_keys(full_right.index(slot), phase, GATHERED)
    scores = warpgroup_mma(q_right, right.index(slot).permute((1, 0)), scores, is_async=True)
    return warpgroup_mma(q_rope, rope.index(slot).permute((1, 0)), scores, is_async=True)


@gluon.jit
def _weigh(
    scores: gl.tensor,  # [MANY, KEYS]
    top: gl.tensor,  # [MANY]
    scale: gl.tensor,
    first: gl.tensor,
    end_key: gl.tensor,
    seen_by_all: gl.tensor,  # the first position that some query does not see
    position: gl.tensor,  # [MANY]
    CAUSAL: gl.constexpr,
) -> gl.tensor:
    """Weights of a tile's keys, the new top, and by how much what came before fades."""
    scores = scores * scale
    if first + KEYS > seen_by_all:
        key = first + gl.arange(0, KEYS, layout=gl.SliceLayout(0, scores.type.layout))
        seen = (key < end_key)[None, :]
        if CAUSAL:
            seen = seen & (key[None, :] <= position[:, None])
        scores = gl.where(seen, scores, float("-inf"))
    new_top = gl.maximum(top, gl.max(scores, 1))
    base = _base_of(new_top, CAUSAL)
    return gl.exp2(scores - base[:, None]), new_top, gl.exp2(top - base)


@gluon.jit
def _hand_over(
    weights: gl.tensor,
    top: gl.tensor,
    weights_at: gl.shared_memory_descriptor,
    top_at: gl.shared_memory_descriptor,
    ready: gl.shared_memory_descriptor,
) -> None:
    """Let the other warpgroup have a tile's weights and the top that they are relative to."""
    thread_barrier()  # all have waited for the scores: nobody reads the tile's columns of rope any more
    top_at.store(top)
    weights_at.store(weights)
    fence_async_shared()  # the other warpgroup's matrix instructions read them
    thread_barrier()
    mbarrier.arrive(ready, count=1)


@gluon.jit
def _fade(acc: gl.tensor, fade: gl.tensor) -> gl.tensor:
    return acc * gl.convert_layout(fade, gl.SliceLayout(1, acc.type.layout))[:, None]


@gluon.jit
def _sum_own(
    acc: gl.tensor,
    weights: gl.tensor,
    values: gl.shared_memory_descriptor,
    free: gl.shared_memory_descriptor,
    keys_here: gl.tensor,
    TMA: gl.constexpr,
) -> gl.tensor:
    """Add a tile's values, weighted from registers; then the half tile is free."""
    if TMA:
        _clear_past(values, keys_here)
    own = gl.convert_layout(weights, gl.DotOperandLayout(0, acc.type.layout, 2))
    started = warpgroup_mma(own, values, acc, is_async=True)
    acc, own = warpgroup_mma_wait(0, deps=[started, own])
    thread_barrier()
    mbarrier.arrive(free, count=1)
    return acc


@gluon.jit
def _own_tile(
    acc: gl.tensor,
    top: gl.tensor,
    total: gl.tensor,
    query: gl.tuple,
    keys: gl.tuple,
    full: gl.tuple,
    weights_at: gl.shared_memory_descriptor,
    top_at: gl.shared_memory_descriptor,
    weighed: gl.shared_memory_descriptor,
    values: gl.shared_memory_descriptor,
    free: gl.shared_memory_descriptor,
    slot: gl.tensor,
    phase: gl.tensor,
    scale: gl.tensor,
    first: gl.tensor,
    end_key: gl.tensor,
    keys_here: gl.tensor,  # KEYS of a tile that another one follows
    seen_by_all: gl.tensor,
    position: gl.tensor,
    CAUSAL: gl.constexpr,
    TMA: gl.constexpr,
    GATHERED: gl.constexpr,
) -> gl.tensor:
    """A tile whose scores are this warpgroup's, one thing after another: sum, top, total."""
    SCORES: gl.constexpr = top.type.layout.parent
    started = _start_scores(query, keys, full, slot, phase, SCORES, GATHERED)
    scores = warpgroup_mma_wait(0, deps=[started])
    weights, top, fade = _weigh(scores, top, scale, first, end_key, seen_by_all, position, CAUSAL)
    total = total * fade + gl.sum(weights, 1)
    weights = weights.to(weights_at.dtype)
    _hand_over(weights, top, weights_at, top_at, weighed)
    return _sum_own(_fade(acc, fade), weights, values, free, keys_here, TMA), top, total


@gluon.jit
def _start_others_sum(
    acc: gl.tensor,
    top: gl.tensor,
    total: gl.tensor,
    weights_at: gl.shared_memory_descriptor,
    top_at: gl.shared_memory_descriptor,
    weighed: gl.shared_memory_descriptor,
    values: gl.shared_memory_descriptor,
    full: gl.shared_memory_descriptor,
    phase: gl.tensor,
    keys_here: gl.tensor,
    CAUSAL: gl.constexpr,
    TMA: gl.constexpr,
    GATHERED: gl.constexpr,
) -> gl.tensor:
    """Begin to add a tile's values with the weights that the other warpgroup hands over: sum, top, total."""
    mbarrier.wait(weighed, phase)
    _wait_for_keys(full, phase, GATHERED)
    new_top = top_at.load(top.type.layout)
    fade = gl.exp2(top - _base_of(new_top, CAUSAL))
    if TMA:
        _clear_past(values, keys_here)
    return warpgroup_mma(weights_at, values, _fade(acc, fade), is_async=True), new_top, total * fade


@gluon.jit
def _consume_many(
    arguments: gl.tuple,
    buffers: gl.tuple,
    barriers: gl.tuple,
    WHO: gl.constexpr,
    HEADS: gl.constexpr,
    HEAD_BLOCKS: gl.constexpr,
    CAUSAL: gl.constexpr,
    TMA: gl.constexpr,
    GATHERED: gl.constexpr,
    QUANTISED: gl.constexpr,
    HAS_LSE: gl.constexpr,
    OVERLAPPED: gl.constexpr,
) -> None:
    """One of the two warpgroups that compute: 0 sums up the left half of the values, 1 the right half."""
    if OVERLAPPED:
        wait_for_kernel_ahead()
    tensors, outputs, q_strides, out_strides, numbers = arguments
    q_nope, q_pe, cache_scale, query_starts, items, parts = tensors
    left, right, rope, q_left, q_right, q_rope, tops, totals = buffers
    full_left, full_right, free_left, free_right, weighed, query_ready, totals_ready = barriers
    scale, step_rows, tokens, parts_count = numbers
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    OF_ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    if WHO == 0:
        values, q_half, full, free = left, q_left, full_left, free_left
    else:
        values, q_half, full, free = right, q_right, full_right, free_right
    query, keys, full_both = (q_left, q_right, q_rope), (left, right, rope), (full_left, full_right)
    schedule = Schedule(items, parts)
    part_number = gl.program_id(0) // HEAD_BLOCKS
    part = load_part(schedule, part_number)
    item = load_first_item(schedule, part_number)
    padding_start = gl.load(query_starts + step_rows)  # early, so that nothing waits for it at the end
    result_scale = 1.0
    if QUANTISED:
        result_scale = gl.load(cache_scale)
        scale = scale * result_scale
    n = 0
    for number in range(part.first_item, part.last_item + 1):
        turn = number - part.first_item
        begin, end = _tiles(part, number, item)
        first_row = anew(gl.program_id(0) % HEAD_BLOCKS * MANY)
        _load_query(
            q_half, q_rope, q_nope, q_pe, q_strides, item.first_query, item.queries, first_row, WHO, HEADS, MANY
        )
        thread_barrier()
        mbarrier.arrive(query_ready, count=1)
        mbarrier.wait(query_ready, turn & 1)

        position = item.first_position + (first_row + gl.arange(0, MANY, layout=OF_ROW)) // HEADS
        seen_by_all = item.end_key
        if CAUSAL:
            seen_by_all = gl.minimum(item.end_key, item.first_position + 1)
        acc = gl.zeros([MANY, HALF], gl.float32, layout=SUMS)
        top = gl.full([MANY], float("-inf"), gl.float32, layout=OF_ROW)
        total = gl.zeros([MANY], gl.float32, layout=OF_ROW)
        first = item.first_key + begin * KEYS
        for _ in range((end - begin) // 2):
            even, even_phase = n % 2, (n // 2) & 1
            odd, odd_phase = (n + 1) % 2, ((n + 1) // 2) & 1
            if WHO == 0:
                acc, top, total = _own_tile(
                    acc,
                    top,
                    total,
                    query,
                    keys,
                    full_both,
                    rope.index(even),
                    tops.index(even),
                    weighed.index(even),
                    values.index(even),
                    free.index(even),
                    even,
                    even_phase,
                    scale,
                    first,
                    item.end_key,
                    KEYS,
                    seen_by_all,
                    position,
                    CAUSAL,
                    TMA,
                    GATHERED,
                )
                started, top, total = _start_others_sum(
                    acc,
                    top,
                    total,
                    rope.index(odd),
                    tops.index(odd),
                    weighed.index(odd),
                    values.index(odd),
                    full.index(odd),
                    odd_phase,
                    item.end_key - first - KEYS,
                    CAUSAL,
                    TMA,
                    GATHERED,
                )
                acc = warpgroup_mma_wait(0, deps=[started])
                thread_barrier()
                mbarrier.arrive(free.index(odd), count=1)
            else:
                # The scores of the odd tile are computed while the other warpgroup weighs those of the even one, and
                # the even tile's values are summed up while this one weighs.
                started = _start_scores(query, keys, full_both, odd, odd_phase, SCORES, GATHERED)
                scores = warpgroup_mma_wait(0, deps=[started])
                started, top, total = _start_others_sum(
                    acc,
                    top,
                    total,
                    rope.index(even),
                    tops.index(even),
                    weighed.index(even),
                    values.index(even),
                    full.index(even),
                    even_phase,
                    KEYS,
                    CAUSAL,
                    TMA,
                    GATHERED,
                )
                weights, top, fade = _weigh(
                    scores, top, scale, first + KEYS, item.end_key, seen_by_all, position, CAUSAL
                )
                total = worked_out(total * fade + gl.sum(weights, 1))
                weights = weights.to(rope.dtype)
                _hand_over(weights, top, rope.index(odd), tops.index(odd), weighed.index(odd))
                acc = warpgroup_mma_wait(0, deps=[started])
                thread_barrier()
                mbarrier.arrive(free.index(even), count=1)
                acc = _sum_own(
                    _fade(acc, fade), weights, values.index(odd), free.index(odd), item.end_key - first - KEYS, TMA
                )
            first += 2 * KEYS
            n += 2
        if (end - begin) % 2 == 1:  # an even tile that no odd one follows
            even, even_phase = n % 2, (n // 2) & 1
            if WHO == 0:
                acc, top, total = _own_tile(
                    acc,
                    top,
                    total,
                    query,
                    keys,
                    full_both,
                    rope.index(even),
                    tops.index(even),
                    weighed.index(even),
                    values.index(even),
                    free.index(even),
                    even,
                    even_phase,
                    scale,
                    first,
                    item.end_key,
                    item.end_key - first,
                    seen_by_all,
                    position,
                    CAUSAL,
                    TMA,
                    GATHERED,
                )
            else:
                started, top, total = _start_others_sum(
                    acc,
                    top,
                    total,
                    rope.index(even),
                    tops.index(even),
                    weighed.index(even),
                    values.index(even),
                    full.index(even),
                    even_phase,
                    item.end_key - first,
                    CAUSAL,
                    TMA,
                    GATHERED,
                )
                acc = warpgroup_mma_wait(0, deps=[started])
                thread_barrier()
                mbarrier.arrive(free.index(even), count=1)
            n += 1

        totals.index((turn & 1) * 2 + WHO).store(total)
        thread_barrier()
        mbarrier.arrive(totals_ready, count=1)
        mbarrier.wait(totals_ready, turn & 1)
        total += totals.index((turn & 1) * 2 + 1 - WHO).load(OF_ROW)

        seen_any = total > 0.0
        total = gl.where(seen_any, total, 1.0)
        acc = _fade(acc, result_scale / total)
        natural = gl.where(seen_any, (top + gl.log2(total)) * LN2, float("-inf"))
        slot = item.first_partial + gl.where(number == part.first_item, part.first_split, 0)
        record = (item.first_query, item.queries, item.splits, slot)
        _finish(acc, natural, outputs, out_strides, record, first_row, WHO, HEADS, HEAD_BLOCKS, MANY, 0, HAS_LSE)
        item = load_item(schedule, gl.minimum(number + 1, part.last_item))
    first_row = gl.program_id(0) % HEAD_BLOCKS * MANY
    _fill_padding(
        outputs, out_strides, padding_start + part_number, tokens, parts_count, first_row, WHO, HEADS, MANY, HAS_LSE
    )


# Few rows


@gluon.jit
def _consume_few(
    arguments: gl.tuple,
    buffers: gl.tuple,
    barriers: gl.tuple,
    WHO: gl.constexpr,
    HEADS: gl.constexpr,
    HEAD_BLOCKS: gl.constexpr,
    ROWS: gl.constexpr,
    CAUSAL: gl.constexpr,
    TMA: gl.constexpr,
    GATHERED: gl.constexpr,
    QUANTISED: gl.constexpr,
    HAS_LSE: gl.constexpr,
    STAGES: gl.constexpr,
    OVERLAPPED: gl.constexpr,
) -> None:
    """One of the two warpgroups that compute, each on every other tile by itself; then they add up what they have."""
    if OVERLAPPED:
        wait_for_kernel_ahead()
    tensors, outputs, q_strides, out_strides, numbers = arguments
    q_nope, q_pe, cache_scale, query_starts, items, parts = tensors
    left, right, rope, q_left, q_right, q_rope, weights, tops, totals, given = buffers
    full_left, full_right, free_left, free_right, query_ready, totals_ready, left_given, right_given = barriers
    scale, step_rows, tokens, parts_count = numbers
    KEYS_ROWS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    OF_KEY: gl.constexpr = gl.SliceLayout(1, KEYS_ROWS)
    OF_ROW: gl.constexpr = gl.SliceLayout(0, KEYS_ROWS)
    q_half = q_left if WHO == 0 else q_right
    weights_at = weights.index(WHO)
    schedule = Schedule(items, parts)
    part_number = gl.program_id(0) // HEAD_BLOCKS
    part = load_part(schedule, part_number)
    item = load_first_item(schedule, part_number)
    padding_start = gl.load(query_starts + step_rows)  # early, so that nothing waits for it at the end
    result_scale = 1.0
    if QUANTISED:
        result_scale = gl.load(cache_scale)
        scale = scale * result_scale
    done = 0  # tiles of the part's earlier items
    for number in range(part.first_item, part.last_item + 1):
        turn = number - part.first_item
        begin, end = _tiles(part, number, item)
        first_row = anew(gl.program_id(0) % HEAD_BLOCKS * ROWS)
        _load_query(
            q_half, q_rope, q_nope, q_pe, q_strides, item.first_query, item.queries, first_row, WHO, HEADS, ROWS
        )
        thread_barrier()
        mbarrier.arrive(query_ready, count=1)
        mbarrier.wait(query_ready, turn & 1)

        position = item.first_position + (first_row + gl.arange(0, ROWS, layout=OF_ROW)) // HEADS
        seen_by_all = item.end_key
        if CAUSAL:
            seen_by_all = gl.minimum(item.end_key, item.first_position + 1)
        low = gl.zeros([HALF, ROWS], gl.float32, layout=KEYS_ROWS)
        high = gl.zeros([HALF, ROWS], gl.float32, layout=KEYS_ROWS)
        top = gl.full([ROWS], float("-inf"), gl.float32, layout=OF_ROW)
        sums = gl.zeros([KEYS, ROWS], gl.float32, layout=KEYS_ROWS)  # of weights; added over the keys at the end
        for tile in range(begin + ((done + WHO) & 1), end, 2):
            n = done + tile - begin
            slot = n % STAGES
            phase = (n // STAGES) & 1
            first = item.first_key + tile * KEYS
            scores = gl.zeros([KEYS, ROWS], gl.float32, layout=KEYS_ROWS)
            _wait_for_keys(full_left.index(slot), phase, GATHERED)
            started = warpgroup_mma(left.index(slot), q_left.permute((1, 0)), scores, use_acc=False, is_async=True)
            _wait_for_keys(full_right.index(slot), phase, GATHERED)
            started = warpgroup_mma(right.index(slot), q_right.permute((1, 0)), started, is_async=True)
            started = warpgroup_mma(rope.index(slot), q_rope.permute((1, 0)), started, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[started]) * scale
            if first + KEYS > seen_by_all:
                key = first + gl.arange(0, KEYS, layout=OF_KEY)
                seen = (key < item.end_key)[:, None]
                if CAUSAL:
                    seen = seen & (key[:, None] <= position[None, :])
                scores = gl.where(seen, scores, float("-inf"))
                if TMA:
                    _clear_past(left.index(slot), item.end_key - first)
                    _clear_past(right.index(slot), item.end_key - first)
            new_top = gl.maximum(top, gl.max(scores, 0))
            base = _base_of(new_top, CAUSAL)
            fade = gl.exp2(top - base)[None, :]
            top = new_top
            of_keys = gl.exp2(scores - base[None, :])
            sums = sums * fade + of_keys
            weights_at.permute((1, 0)).store(of_keys.to(weights.dtype))
            fence_async_shared()
            thread_barrier()
            of_keys_at = weights_at.permute((1, 0))
            started_low = warpgroup_mma(left.index(slot).permute((1, 0)), of_keys_at, low * fade, is_async=True)
            started_high = warpgroup_mma(right.index(slot).permute((1, 0)), of_keys_at, high * fade, is_async=True)
            low = warpgroup_mma_wait(1, deps=[started_low])
            thread_barrier()
            mbarrier.arrive(free_left.index(slot), count=1)
            high = warpgroup_mma_wait(0, deps=[started_high])
            thread_barrier()
            mbarrier.arrive(free_right.index(slot), count=1)
        done += end - begin

        total = gl.sum(sums, 0)
        own, others = (turn & 1) * 2 + WHO, (turn & 1) * 2 + 1 - WHO
        tops.index(own).store(top)
        totals.index(own).store(total)
        thread_barrier()
        mbarrier.arrive(totals_ready, count=1)
        mbarrier.wait(totals_ready, turn & 1)
        others_top = tops.index(others).load(OF_ROW)
        grand_top = gl.maximum(top, others_top)
        base = _base_of(grand_top, True)  # both are -inf in a row without keys
        own_share = gl.exp2(top - base)
        total = total * own_share + totals.index(others).load(OF_ROW) * gl.exp2(others_top - base)
        seen_any = total > 0.0
        total = gl.where(seen_any, total, 1.0)
        factor = (own_share * result_scale / total)[None, :]
        natural = gl.where(seen_any, (grand_top + gl.log2(total)) * LN2, float("-inf"))
        slot = item.first_partial + gl.where(number == part.first_item, part.first_split, 0)
        record = (item.first_query, item.queries, item.splits, slot)
        # One place for both: first the left half goes to warpgroup 0, then the right half to warpgroup 1.
        if WHO == 0:
            mbarrier.wait(left_given, turn & 1)
            low = low * factor + given.load(KEYS_ROWS)
            thread_barrier()
            given.store(high * factor)
            thread_barrier()
            mbarrier.arrive(right_given, count=1)
            _finish(low, natural, outputs, out_strides, record, first_row, WHO, HEADS, HEAD_BLOCKS, ROWS, 1, HAS_LSE)
        else:
            given.store(low * factor)
            thread_barrier()
            mbarrier.arrive(left_given, count=1)
            mbarrier.wait(right_given, turn & 1)
            high = high * factor + given.load(KEYS_ROWS)
            thread_barrier()
            _finish(high, natural, outputs, out_strides, record, first_row, WHO, HEADS, HEAD_BLOCKS, ROWS, 1, HAS_LSE)
        item = load_item(schedule, gl.minimum(number + 1, part.last_item))
    first_row = gl.program_id(0) % HEAD_BLOCKS * ROWS
    _fill_padding(
        outputs, out_strides, padding_start + part_number, tokens, parts_count, first_row, WHO, HEADS, ROWS, HAS_LSE
    )


# The launch


@gluon.jit(do_not_specialize=["step_rows", "tokens", "parts_count", "table_stride"])
def taut_mla_decode(
    q_nope: gl.tensor,
    q_pe: gl.tensor,
    cache: gl.tensor,
    wide: gl.tensor,  # the cache as boxes of 64 keys and 256 columns; None where threads bring keys
    narrow: gl.tensor,  # likewise, 64 columns
    table: gl.tensor,
    table_rows: gl.tensor,
    query_starts: gl.tensor,
    items: gl.tensor,
    parts: gl.tensor,
    out: gl.tensor,
    lse: gl.tensor,
    partials: gl.tensor,
    partial_lses: gl.tensor,
    cache_scale: gl.tensor,
    scale: gl.tensor,  # of the scores, times log2(e)
    step_rows: gl.tensor,
    tokens: gl.tensor,
    parts_count: gl.tensor,
    nope_stride_t: gl.tensor,
    nope_stride_h: gl.tensor,
    nope_stride_d: gl.tensor,
    pe_stride_t: gl.tensor,
    pe_stride_h: gl.tensor,
    pe_stride_d: gl.tensor,
    cache_stride_page: gl.tensor,
    cache_stride_place: gl.tensor,
    page_keys: gl.tensor,  # from a page to the next one in memory, in keys; of use where boxes are
    table_stride: gl.tensor,
    out_stride_t: gl.tensor,
    out_stride_h: gl.tensor,
    out_stride_d: gl.tensor,
    lse_stride_t: gl.tensor,
    lse_stride_h: gl.tensor,
    HEADS: gl.constexpr,
    HEAD_BLOCKS: gl.constexpr,
    ROWS: gl.constexpr,
    PAGE: gl.constexpr,
    CAUSAL: gl.constexpr,
    TMA: gl.constexpr,  # keys come in boxes
    GATHERED: gl.constexpr,  # keys come by asynchronous copies
    WIDE_QUERIES: gl.constexpr,  # every eight of a query's numbers begin at a multiple of 16 bytes, and stand in a row
    WIDE_OUTPUT: gl.constexpr,  # likewise the output's
    QUANTISED: gl.constexpr,
    HAS_TABLE_ROWS: gl.constexpr,
    HAS_LSE: gl.constexpr,
    OVERLAPPED: gl.constexpr,  # whether this kernel and the merge are launched before the kernel ahead has ended
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,  # of a thread that computes; those that bring keys have what remains
) -> None:
    """One program works through one part for one block of rows; see this module's text."""
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    VECTOR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    DTYPE: gl.constexpr = q_nope.dtype.element_ty
    left = gl.allocate_shared_memory(DTYPE, [STAGES, KEYS, HALF], TILE)
    right = gl.allocate_shared_memory(DTYPE, [STAGES, KEYS, HALF], TILE)
    rope = gl.allocate_shared_memory(DTYPE, [STAGES, KEYS, ROPE], TILE)
    q_left = gl.allocate_shared_memory(DTYPE, [ROWS, HALF], TILE)
    q_right = gl.allocate_shared_memory(DTYPE, [ROWS, HALF], TILE)
    q_rope = gl.allocate_shared_memory(DTYPE, [ROWS, ROPE], TILE)
    totals = gl.allocate_shared_memory(gl.float32, [4, ROWS], VECTOR)  # of even and odd items, two warpgroups
    full_left = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full_right = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free_left = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free_right = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    query_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    totals_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full_left.index(slot), count=BRINGERS if GATHERED else 1)
        mbarrier.init(full_right.index(slot), count=BRINGERS if GATHERED else 1)
        mbarrier.init(free_left.index(slot), count=1)
        mbarrier.init(free_right.index(slot), count=1)
    mbarrier.init(query_ready, count=2)
    mbarrier.init(totals_ready, count=2)
    keys = (left, right, rope)
    halves = (full_left, full_right, free_left, free_right)
    arguments = (
        (q_nope, q_pe, cache_scale, query_starts, items, parts),
        (out, lse, partials, partial_lses),
        (nope_stride_t, nope_stride_h, nope_stride_d, pe_stride_t, pe_stride_h, pe_stride_d, WIDE_QUERIES),
        (out_stride_t, out_stride_h, out_stride_d, lse_stride_t, lse_stride_h, WIDE_OUTPUT),
        (scale, step_rows, tokens, parts_count),
    )
    brought = (cache, wide, narrow, table, table_rows, items, parts)
    strides = (table_stride, cache_stride_page, cache_stride_place, page_keys)
    if ROWS == MANY:
        gl.static_assert(STAGES == 2, "tiles of many rows lie in two slots, one for each warpgroup")
        gl.static_assert(ROWS == KEYS and KEYS == ROPE, "weights take the place of a tile's columns of rope")
        tops = gl.allocate_shared_memory(gl.float32, [2, ROWS], VECTOR)
        weighed = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for slot in gl.static_range(2):
            mbarrier.init(weighed.index(slot), count=1)
        fence_async_shared()
        thread_barrier()
        many_buffers = (left, right, rope, q_left, q_right, q_rope, tops, totals)
        many_barriers = (full_left, full_right, free_left, free_right, weighed, query_ready, totals_ready)
        gl.warp_specialize(
            [
                (
                    _bring,
                    (
                        brought,
                        keys,
                        halves,
                        strides,
                        HEAD_BLOCKS,
                        HAS_TABLE_ROWS,
                        PAGE,
                        STAGES,
                        TMA,
                        GATHERED,
                        QUANTISED,
                        OVERLAPPED,
                    ),
                ),
                (
                    _consume_many,
                    (
                        arguments,
                        many_buffers,
                        many_barriers,
                        0,
                        HEADS,
                        HEAD_BLOCKS,
                        CAUSAL,
                        TMA,
                        GATHERED,
                        QUANTISED,
                        HAS_LSE,
                        OVERLAPPED,
                    ),
                ),
                (
                    _consume_many,
                    (
                        arguments,
                        many_buffers,
                        many_barriers,
                        1,
                        HEADS,
                        HEAD_BLOCKS,
                        CAUSAL,
                        TMA,
                        GATHERED,
                        QUANTISED,
                        HAS_LSE,
                        OVERLAPPED,
                    ),
                ),
            ],
            [4, 4],
            [REGISTERS, REGISTERS],
        )
    else:
        weights = gl.allocate_shared_memory(DTYPE, [2, ROWS, KEYS], TILE)
        tops = gl.allocate_shared_memory(gl.float32, [4, ROWS], VECTOR)
        given = gl.allocate_shared_memory(gl.float32, [HALF, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0, 1]))
        left_given = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        right_given = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(left_given, count=1)
        mbarrier.init(right_given, count=1)
        fence_async_shared()
        thread_barrier()
        few_buffers = (left, right, rope, q_left, q_right, q_rope, weights, tops, totals, given)
        few_barriers = (
            full_left,
            full_right,
            free_left,
            free_right,
            query_ready,
            totals_ready,
            left_given,
            right_given,
        )
        gl.warp_specialize(
            [
                (
                    _bring,
                    (
                        brought,
                        keys,
                        halves,
                        strides,
                        HEAD_BLOCKS,
                        HAS_TABLE_ROWS,
                        PAGE,
                        STAGES,
                        TMA,
                        GATHERED,
                        QUANTISED,
                        OVERLAPPED,
                    ),
                ),
                (
                    _consume_few,
                    (
                        arguments,
                        few_buffers,
                        few_barriers,
                        0,
                        HEADS,
                        HEAD_BLOCKS,
                        ROWS,
                        CAUSAL,
                        TMA,
                        GATHERED,
                        QUANTISED,
                        HAS_LSE,
                        STAGES,
                        OVERLAPPED,
                    ),
                ),
                (
                    _consume_few,
                    (
                        arguments,
                        few_buffers,
                        few_barriers,
                        1,
                        HEADS,
                        HEAD_BLOCKS,
                        ROWS,
                        CAUSAL,
                        TMA,
                        GATHERED,
                        QUANTISED,
                        HAS_LSE,
                        STAGES,
                        OVERLAPPED,
                    ),
                ),
            ],
            [4, 4],
            [REGISTERS, REGISTERS],
        )


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
            pages, page, width = cache.shape
            between, place, _ = cache.stride()
            shape = [(pages - 1) * (between // place) + page, width]
            layout = gl.NVMMASharedLayout(128, 16, rank=2)
            self._boxes[key] = (
                TensorDescriptor(cache, shape, [place, 1], [TILE_KEYS, TILE_COLUMNS[0]], layout),
                TensorDescriptor(cache, shape, [place, 1], [TILE_KEYS, ROPE_COLUMNS], layout),
            )
        return self._boxes[key]


def comes_in_boxes(cache: Tensor) -> bool:
    """Whether TMA can bring this cache: 64 keys of one page at a time, from a line of keys at regular distances."""
    _, page, _ = cache.shape
    between, place, column = cache.stride()
    size = cache.dtype.itemsize
    return (
        size == 2
        and page % TILE_KEYS == 0
        and column == 1
        and place * size % 16 == 0
        and between % place == 0
        and cache.data_ptr() % 16 == 0
    )


def comes_in_sixteens(cache: Tensor) -> bool:
    """Whether threads can copy 16 bytes of this cache at a time, as far as Triton knows: it looks for factors of 16."""
    between, place, column = cache.stride()
    return column == 1 and place % 16 == 0 and between % 16 == 0 and cache.data_ptr() % 16 == 0


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
    cut = mla_tile(table, problem.q_heads, problem.value_size, cache_bytes, problem.max_query, "hopper_mla_decode")
    return HopperMlaWorkspace(
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
    if not isinstance(workspace, HopperMlaWorkspace):
        raise TypeError("mla_decode of the provider `hopper` needs the workspace that its `workspace` makes")
    tokens, heads, _ = q_nope.shape
    cut, tile, schedule, scratch = workspace.cut, workspace.cut.tile, workspace.schedule, workspace.scratch
    quantised = cache.dtype.itemsize == 1
    boxed = comes_in_boxes(cache)
    wide, narrow = workspace.boxes(cache) if boxed else (None, None)
    taut_mla_decode[(schedule.shape.parts * cut.head_blocks,)](
        q_nope,
        q_pe,
        cache.view(torch.uint8) if quantised else cache,
        wide,
        narrow,
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
        *cache.stride()[:2],
        cache.stride(0) // cache.stride(1),
        step.pages.table.stride(0),
        *out.stride(),
        *(lse.stride() if lse is not None else (0, 0)),
        HEADS=heads,
        HEAD_BLOCKS=cut.head_blocks,
        ROWS=tile["rows"],
        PAGE=step.pages.page_size,
        CAUSAL=causal and step.max_query > 1,
        TMA=boxed,
        GATHERED=not boxed and not quantised and comes_in_sixteens(cache),
        WIDE_QUERIES=lies_in_sixteens(q_nope) and lies_in_sixteens(q_pe),
        WIDE_OUTPUT=lies_in_sixteens(out),
        QUANTISED=quantised,
        HAS_TABLE_ROWS=step.pages.rows is not None,
        HAS_LSE=lse is not None,
        OVERLAPPED=workspace.overlapped,
        STAGES=tile["stages"],
        REGISTERS=tile["registers"] if boxed else tile["gather_registers"],
        num_warps=4,
        maxnreg=168,
        **launch_options(workspace.overlapped),
    )
    merge_items(workspace, out, lse, cut.block * heads, workspace.overlapped)
