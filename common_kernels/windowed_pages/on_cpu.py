"""The page table of windowed layers in plain torch, for a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from taut.common_kernels.step import Step


def fill(step: Step, translation: Tensor, window: int, table: Tensor, lengths: Tensor) -> None:
    """Fill a table [R, width] and lengths [R]; see `windowed_step`."""
    queries = step.query_starts[1:] - step.query_starts[:-1]  # [R]
    first = (step.lengths - queries - window).clamp(min=0)  # [R]
    positions = first[:, None] + torch.arange(table.shape[1], dtype=torch.int32, device=table.device)  # [R, width]
    rows = step.pages.rows if step.pages.rows is not None else torch.arange(step.rows, device=table.device)
    there = positions < step.lengths[:, None]
    slots = step.pages.table[rows[:, None], torch.where(there, positions, 0)]  # a row's end may be the table's
    table.copy_(torch.where(there, translation[torch.where(there, slots, 0).long()], 0))
    lengths.copy_(step.lengths - first)
