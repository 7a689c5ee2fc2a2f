"""The schedule on the device: one launch per step, nothing read back by the host; see `triton_items` for its tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton

from taut.common_kernels.schedule.shape import most_items
from taut.common_kernels.schedule.triton_items import PART_RECORD, RECORD
from taut.common_kernels.schedule.triton_schedule import taut_schedule

if TYPE_CHECKING:
    from torch import Tensor

    from taut.common_kernels.schedule.shape import ScheduleShape
    from taut.common_kernels.step import Step

MOST_AT_ONCE = 1024  # items or parts that the one program handles together


class DeviceSchedule:
    """The tables of one schedule and the launch that fills them.

    Args:
        shape: what does not change from step to step.
        max_rows: the most rows of a step.
        device: where the tables lie.
        early: whether the device can start a kernel before the one ahead of it has ended (NVIDIA, sm_90+).

    Attributes:
        items: [shape.max_items, 8] int32, see `schedule.shape.Item`. As many as `launch` returns are the step's own and
            empty ones, where that is less than the parts; later ones may be an earlier step's.
        parts: [shape.parts, 16] int32: see `schedule.shape.Part`, and from the ninth number on the part's first item.
    """

    def __init__(self, shape: ScheduleShape, max_rows: int, device: torch.device | str, early: bool = False) -> None:
        self.shape = shape
        self.max_rows = max_rows
        self.early = early
        self.items: Tensor = torch.zeros(shape.max_items, RECORD.value, dtype=torch.int32, device=device)
        self.parts: Tensor = torch.zeros(shape.parts, PART_RECORD.value, dtype=torch.int32, device=device)
        self._row_items = torch.zeros(max_rows + 1, dtype=torch.int32, device=device)
        # Each begins where memory is aligned: the kernel is compiled for what is, and for what is not.
        self._item_starts, self._item_parts = (
            torch.zeros(shape.max_items, dtype=torch.int32, device=device) for _ in range(2)
        )

    @property
    def size_in_bytes(self) -> int:
        """Device memory that the tables hold."""
        return sum(t.nbytes for t in (self.items, self.parts, self._row_items, self._item_starts, self._item_parts))

    def launch(self, step: Step) -> int:
        """Fill the tables for a step, in one launch; no host-device sync, safe to capture in a graph.

        Returns:
            The most work items that this step can have, by what the host knows of it.
        """
        shape, rows = self.shape, step.rows
        if rows > self.max_rows:
            raise ValueError(f"the step has {rows} rows, the workspace was made for {self.max_rows}")
        one_block = 0 < step.max_query <= shape.block
        items = min(shape.max_items, most_items(rows, shape.max_items * shape.block, shape.block, step.max_query))
        chunk, steps = launch_sizes(rows if one_block else max(rows, items))
        taut_schedule[(1,)](
            step.lengths,
            step.query_starts,
            self.items,
            self.parts,
            self._row_items,
            self._item_starts,
            self._item_parts,
            rows,
            shape.parts,
            items if shape.merges_by_item(items) else 0,
            CUT=shape.cut,
            BLOCK=shape.block,
            LEFT=shape.left,
            RIGHT=shape.right,
            MINIMUM_SHARE=shape.minimum_share,
            SPARE=shape.spare,
            LONGEST=shape.longest,
            ONE_BLOCK=one_block,
            STEPS=steps,
            CHUNK=chunk,
            PARTS_CHUNK=min(MOST_AT_ONCE, triton.next_power_of_2(shape.parts)),
            EARLY=self.early,
            num_warps=8 if chunk < MOST_AT_ONCE else 16,
            **launch_options(self.early),
        )
        return items


def launch_options(early: bool) -> dict[str, bool]:
    """Options of a launch: where the device can, a kernel is launched before the one ahead of it has ended, and waits.

    That hides the time of the launch. Such a kernel waits before it reads or writes anything, so that its own end means
    the end of everything before it.
    """
    return {"launch_pdl": True} if early else {}


def launch_sizes(items: int) -> tuple[int, int]:
    """How many items the schedule kernel handles together, and the halvings of its searches among so many or rows.

    Few values, so that few variants are compiled: chunks of 256 or of 1024, and halvings for as many items as a chunk
    has, or for 2^20.
    """
    if items <= 256:
        return 256, 8
    return MOST_AT_ONCE, 10 if items <= MOST_AT_ONCE else 20
