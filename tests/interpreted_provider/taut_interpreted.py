"""Our Triton kernels as a provider for a CPU: under Triton's interpreter, for who wants to see their launches there.

This folder on PYTHONPATH is an installed package: beside this module lie its entry point and its metadata. It is asked
for by name, with TRITON_INTERPRET=1 and TAUT_KERNELS=interpreted.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from taut.common_kernels.builtin import TRITON
from taut.common_kernels.providers import hookimpl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from taut.common_kernels.providers import KernelProvider


@hookimpl
def taut_kernels() -> Sequence[KernelProvider]:
    """What this package provides."""
    capabilities = tuple(replace(capability, targets=("cpu",)) for capability in TRITON.capabilities)
    return [replace(TRITON, name="interpreted", capabilities=capabilities, automatic_on=())]
