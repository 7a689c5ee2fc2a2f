"""What a device is called here: "cpu", "sm_90" for NVIDIA's compute capability 9.0, "gfx942" for AMD's."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def target_of(device: torch.device) -> str:
    """The target of a torch device; for kinds that are neither, torch's own word for them ("xpu")."""
    import torch

    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
