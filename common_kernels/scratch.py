"""Where the partial results of split work items wait to be merged: an owned object, sized once by a schedule's bounds.

Its size depends on how many programs the device runs at once, not on how long a context may grow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from taut.common_kernels.schedule.shape import most_partials

if TYPE_CHECKING:
    from torch import Tensor


class Scratch:
    """Room for every partial result that a step can have.

    Args:
        parts: of the schedule.
        items: the most work items of a step.
        rows: rows of one partial, heads times queries of an item, padded to whole tiles.
        value_size: V.
        device: where it lies.

    Attributes:
        partials: [most partials, rows, V] float32, each row normalised by itself.
        lses: [most partials, rows] float32, natural logarithm; -inf where a row saw nothing.
    """

    def __init__(self, parts: int, items: int, rows: int, value_size: int, device: torch.device | str) -> None:
        count = most_partials(parts, items)
        self.partials: Tensor = torch.empty(count, rows, value_size, dtype=torch.float32, device=device)
        self.lses: Tensor = torch.empty(count, rows, dtype=torch.float32, device=device)

    @property
    def size_in_bytes(self) -> int:
        """Device memory that it holds."""
        return self.partials.nbytes + self.lses.nbytes
