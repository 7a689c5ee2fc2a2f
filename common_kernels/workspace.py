"""What the portable kernels need from one step to the next: a schedule and its scratch, and what the device is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from taut.common_kernels.problem import target_matches
from taut.common_kernels.schedule.triton_launch import DeviceSchedule
from taut.common_kernels.scratch import Scratch
from taut.common_kernels.targets import target_of

if TYPE_CHECKING:
    from taut.common_kernels.schedule.shape import ScheduleShape
    from taut.common_kernels.step import Step


@dataclass(frozen=True)
class DeviceFacts:
    """What tiles and parts are chosen by.

    Args:
        target: "sm_90", "gfx942".
        shared_memory: bytes that a program may use.
        multiprocessors: how many programs that fill one each run at once.
    """

    target: str
    shared_memory: int
    multiprocessors: int

    @property
    def native_float8(self) -> str:
        """Whose hardware converts e4m3 numbers as they are meant here, "nvidia" or "amd"; "" where it does not.

        CDNA3 has a format of its own.
        """
        if target_matches("sm_89+", self.target):
            return "nvidia"
        return "amd" if self.target == "gfx950" else ""

    @property
    def dependent_launch(self) -> bool:
        """Whether a kernel can be launched before the one ahead of it has ended, to wait for it on the device."""
        return target_matches("sm_90+", self.target)


# What the interpreter stands for on a CPU: the smallest GPU that the tables know, with few programs, for splits.
INTERPRETED = DeviceFacts("sm_80", 101_376, 4)


@lru_cache
def device_facts(device: str) -> DeviceFacts:
    """The facts of a device ("cuda:0"); those of `INTERPRETED` for a CPU."""
    if torch.device(device).type == "cpu":
        return INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    limit = "shared_memory_per_block" if torch.version.hip else "shared_memory_per_block_optin"
    return DeviceFacts(target_of(torch.device(device)), getattr(properties, limit), properties.multi_processor_count)


class ScheduledWorkspace:
    """A schedule and its scratch; see `Workspace` in `kernels`.

    Args:
        shape: of the schedule.
        max_rows: the most rows of a step.
        partial_rows: rows of one partial result.
        value_size: V.
        device: where everything lies.
    """

    def __init__(
        self, shape: ScheduleShape, max_rows: int, partial_rows: int, value_size: int, device: torch.device | str
    ) -> None:
        early = device_facts(str(device)).dependent_launch
        self.schedule = DeviceSchedule(shape, max_rows, device, early)
        self.scratch = Scratch(shape.parts, shape.max_items, partial_rows, value_size, device)
        self.items = shape.max_items

    @property
    def size_in_bytes(self) -> int:
        """Device memory that it holds."""
        return self.schedule.size_in_bytes + self.scratch.size_in_bytes

    def prepare(self, step: Step) -> None:
        """Make the schedule of a step, in one launch, without a host-device sync."""
        self.items = self.schedule.launch(step)
