"""The page table of windowed layers in one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton

from taut.common_kernels.windowed_pages.triton_fill import taut_windowed_pages

if TYPE_CHECKING:
    from torch import Tensor

    from taut.common_kernels.step import Step

SLOTS = 1024  # of one program


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
