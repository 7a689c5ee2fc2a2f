"""The page table of windowed layers: a program translates some slots of one row."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["window", "width"])
def taut_windowed_pages(
    table: tl.tensor,  # [requests, context]
    table_rows: tl.tensor,  # [R] or None
    query_starts: tl.tensor,  # [R + 1]
    lengths: tl.tensor,  # [R]
    translation: tl.tensor,  # [slots]
    windowed_table: tl.tensor,  # [R, width], contiguous
    windowed_lengths: tl.tensor,  # [R]
    window: tl.tensor,
    width: tl.tensor,
    table_stride: tl.tensor,
    SLOTS: tl.constexpr,
) -> None:
    """Fill SLOTS places of one row, and by its first program the row's length; nothing past the row's end is read."""
    row = tl.program_id(0)
    length = tl.load(lengths + row)
    queries = tl.load(query_starts + row + 1) - tl.load(query_starts + row)
    first = tl.maximum(length - queries - window, 0)
    place = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    there = (place < width) & (first + place < length)
    table_row = row
    if table_rows is not None:
        table_row = tl.load(table_rows + row)
    slots = tl.load(table + table_row.to(tl.int64) * table_stride + first + place, mask=there, other=0)
    windowed = tl.load(translation + slots, mask=there, other=0).to(tl.int32)
    tl.store(windowed_table + row.to(tl.int64) * width + place, windowed, mask=place < width)
    if tl.program_id(1) == 0:
        tl.store(windowed_lengths + row, length - first)
