"""The schedule of a step, made by one program: items from the rows' lengths, then equal parts of the line of tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from taut.common_kernels.schedule.triton_items import PART_RECORD, RECORD, tiles_between


@triton.jit
def _narrow(starts: tl.tensor, count: tl.tensor, wanted: tl.tensor, low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """Two halvings of what lies between `low` and `high`: their three loads wait for the memory together."""
    middle = (low + high) // 2
    lower, upper = (low + middle) // 2, (middle + high) // 2
    left = tl.load(starts + middle, mask=middle < count, other=0) > wanted
    left_lower = tl.load(starts + lower, mask=lower < count, other=0) > wanted
    left_upper = tl.load(starts + upper, mask=upper < count, other=0) > wanted
    return (
        tl.where(left, tl.where(left_lower, low, lower), tl.where(left_upper, middle, upper)),
        tl.where(left, tl.where(left_lower, lower, middle), tl.where(left_upper, upper, high)),
    )


@triton.jit
def _last_at_most(starts: tl.tensor, count: tl.tensor, wanted: tl.tensor, STEPS: tl.constexpr) -> tl.tensor:
    """For each of `wanted`, the last place of starts[0 : count], which ascends, that is not above it."""
    low = tl.zeros_like(wanted)
    high = low + count
    if STEPS <= 8:
        for _ in tl.static_range((STEPS + 1) // 2):
            low, high = _narrow(starts, count, wanted, low, high)
    else:  # not written out: compiling that takes seconds
        for _ in range((STEPS + 1) // 2):
            low, high = _narrow(starts, count, wanted, low, high)
    return low


@triton.jit
def _describe(
    item: tl.tensor,
    item_count: tl.tensor,
    lengths: tl.tensor,
    query_starts: tl.tensor,
    row_items: tl.tensor,
    rows: tl.tensor,
    CUT: tl.constexpr,
    BLOCK: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
) -> tl.tensor:
    """Row, first query, queries, first position, first key, end key of many items; see `reference._item`."""
    here = item < item_count
    if ONE_BLOCK:
        row, block = item, tl.zeros_like(item)
    else:
        row = _last_at_most(row_items, rows, item, STEPS)
        block = item - tl.load(row_items + row, mask=here, other=0)
    row_end = tl.load(query_starts + row + 1, mask=here, other=0)
    first_query = tl.load(query_starts + row, mask=here, other=0) + block * BLOCK
    length = tl.load(lengths + row, mask=here, other=0)
    queries = tl.minimum(row_end - first_query, BLOCK)
    first_position = length - (row_end - first_query)
    end_key = length
    if RIGHT >= 0:
        end_key = tl.maximum(tl.minimum(end_key, first_position + queries + RIGHT), 0)
    first_key = tl.zeros_like(item)
    if LEFT >= 0:
        first_key = tl.maximum(tl.minimum(first_position - LEFT, end_key), 0) // CUT * CUT
    return row, first_query, queries, first_position, first_key, end_key


@triton.jit
def _part_of_tile(place: tl.tensor, total: tl.tensor, active: tl.tensor) -> tl.tensor:
    return (((place.to(tl.int64) + 1) * active - 1) // total).to(tl.int32)


@triton.jit
def _side_by_side(
    field_0: tl.tensor,
    field_1: tl.tensor,
    field_2: tl.tensor,
    field_3: tl.tensor,
    field_4: tl.tensor,
    field_5: tl.tensor,
    field_6: tl.tensor,
    field_7: tl.tensor,
) -> tl.tensor:
    """Records of eight fields, [n, 8], from the fields, [n] each: to be written in few wide stores."""
    even = tl.join(tl.join(field_0, field_4), tl.join(field_2, field_6))
    odd = tl.join(tl.join(field_1, field_5), tl.join(field_3, field_7))
    return tl.reshape(tl.join(even, odd), [field_0.shape[0], RECORD])


@triton.jit(do_not_specialize=["rows", "parts", "looked_at"])
def taut_schedule(
    lengths: tl.tensor,
    query_starts: tl.tensor,
    items_out: tl.tensor,
    parts_out: tl.tensor,
    row_items: tl.tensor,  # [R + 1] scratch: the first item of each row; not used where each row is one item
    item_starts: tl.tensor,  # [items] scratch: the first tile of each item
    item_parts: tl.tensor,  # [items] scratch: the part that it lies in
    rows: tl.tensor,
    parts: tl.tensor,
    looked_at: tl.tensor,  # so many items are looked at, whatever the step has: those past its own are empty
    CUT: tl.constexpr,
    BLOCK: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    MINIMUM_SHARE: tl.constexpr,
    SPARE: tl.constexpr,
    LONGEST: tl.constexpr,  # longer rows get no items; 0 for no bound, and never below BLOCK
    ONE_BLOCK: tl.constexpr,  # no row has more queries than an item: items are rows
    STEPS: tl.constexpr,  # halvings that reduce the number of items, or of rows, to one
    CHUNK: tl.constexpr,
    PARTS_CHUNK: tl.constexpr,
    EARLY: tl.constexpr,  # whether this kernel may start before the one ahead has ended
) -> None:
    """Fill the tables of a step; see `triton_launch.DeviceSchedule.launch`."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
    lanes = tl.arange(0, CHUNK)
    fields = tl.arange(0, RECORD)
    item_count = rows
    if not ONE_BLOCK:
        item_count = rows * 0
        for start in range(0, rows, CHUNK):
            row = start + lanes
            here = row < rows
            queries = tl.load(query_starts + row + 1, mask=here, other=0) - tl.load(
                query_starts + row, mask=here, other=0
            )
            blocks = tl.where(here, tl.maximum(tl.cdiv(queries, BLOCK), 1), 0)
            if LONGEST > 0:
                blocks = tl.where(queries > LONGEST, 0, blocks)
            tl.store(row_items + row, item_count + tl.cumsum(blocks) - blocks, mask=here)
            item_count += tl.sum(blocks)
        tl.debug_barrier()  # the program's other threads read row_items

    total = rows * 0
    count = rows * 0  # items that have tiles
    most = rows * 0  # tiles of the longest
    for start in range(0, item_count, CHUNK):
        _, _, queries, _, first_key, end_key = _describe(
            start + lanes,
            item_count,
            lengths,
            query_starts,
            row_items,
            rows,
            CUT,
            BLOCK,
            LEFT,
            RIGHT,
            ONE_BLOCK,
            STEPS,
        )
        tiles = tiles_between(queries, first_key, end_key, CUT)
        total += tl.sum(tiles)
        if SPARE > 0:
            count += tl.sum((tiles > 0).to(tl.int32))
            most = tl.maximum(most, tl.max(tiles))
    active = tl.minimum(parts, tl.cdiv(total, MINIMUM_SHARE))
    if SPARE > 0 and (active == parts) & (most * count == total):
        each = tl.cdiv(count, parts)
        even = tl.where(count <= parts, parts // count * count, count // each)
        fits = (count % each == 0) & (tl.cdiv(total, even) <= tl.cdiv(total, parts) + SPARE)
        active = tl.where(fits, even, active)
    divisor = tl.maximum(total, 1)

    tiles_before = rows * 0
    partials_before = rows * 0
    record_count = tl.maximum(item_count, looked_at)
    for start in range(0, record_count, CHUNK):
        item = start + lanes
        here = item < item_count
        row, first_query, queries, first_position, first_key, end_key = _describe(
            item, item_count, lengths, query_starts, row_items, rows, CUT, BLOCK, LEFT, RIGHT, ONE_BLOCK, STEPS
        )
        tiles = tiles_between(queries, first_key, end_key, CUT)
        item_end = tiles_before + tl.cumsum(tiles)
        item_start = item_end - tiles
        first_part = _part_of_tile(item_start, divisor, active)
        splits = tl.where(tiles > 0, _part_of_tile(item_end - 1, divisor, active) - first_part + 1, 0)
        partials = tl.where(splits > 1, splits, 0)
        first_partial = partials_before + tl.cumsum(partials) - partials
        tl.store(item_starts + item, item_start, mask=here)
        tl.store(item_parts + item, first_part, mask=here)
        record = _side_by_side(row, first_query, queries, first_position, first_key, end_key, splits, first_partial)
        tl.store((items_out + item * RECORD)[:, None] + fields[None, :], record, mask=(item < record_count)[:, None])
        tiles_before += tl.sum(tiles)
        partials_before += tl.sum(partials)
    tl.debug_barrier()  # the program's other threads read item_starts, item_parts and items_out

    # Part p begins at p * total // active; written so that all of it fits into 32 bits.
    busy_parts = tl.maximum(active, 1)
    share, rest = total // busy_parts, total % busy_parts
    for start in range(0, parts, PARTS_CHUNK):
        part = start + tl.arange(0, PARTS_CHUNK)
        busy = part < active
        begin = part * share + part * rest // busy_parts
        end = (part + 1) * share + (part + 1) * rest // busy_parts
        first_item, last_item = tl.split(_last_at_most(item_starts, item_count, tl.join(begin, end - 1), STEPS))
        first_start = tl.load(item_starts + first_item, mask=busy, other=0)
        last_start = tl.load(item_starts + last_item, mask=busy, other=0)
        first_part = tl.load(item_parts + first_item, mask=busy, other=0)
        nothing = tl.zeros_like(part)
        own = _side_by_side(
            tl.where(busy, first_item, 0),
            tl.where(busy, begin - first_start, 0),
            tl.where(busy, last_item, -1),
            tl.where(busy, end - last_start, 0),
            tl.where(busy, part - first_part, 0),
            nothing,
            nothing,
            nothing,
        )
        item = tl.load((items_out + first_item * RECORD)[:, None] + fields[None, :], mask=busy[:, None], other=0)
        here = part < parts
        record = (parts_out + part * PART_RECORD)[:, None] + fields[None, :]
        tl.store(record, own, mask=here[:, None])
        tl.store(record + RECORD, item, mask=here[:, None])
