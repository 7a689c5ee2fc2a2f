"""The page table of windowed layers in one launch: a program translates some slots of one row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

    from taut.common_kernels.step import Step

SLOTS = 1024  # of one program


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


def fill(step: Step, translation: Tensor, window: int, table: Tensor, lengths: Tensor) -> None:
    """Fill a contiguous table [R, width] and lengths [R]; see `windowed_step`."""
    if not step.rows:
        return
    taut_windowed_pages[(step.rows, triton.cdiv(table.shape[1], SLOTS))](
        step.pages.table,
        step.pages.rows,
        step.query_starts,
        step.lengths,
        translation,
        table,
        lengths,
        window,
        table.shape[1],
        step.pages.table.stride(0),
        SLOTS=SLOTS,
        num_warps=4,
    )
