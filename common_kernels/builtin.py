"""The providers that come with this package, as data."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from taut.common_kernels.problem import OPERATIONS, Capability
from taut.common_kernels.providers import KernelProvider, hookimpl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from taut.common_kernels.kernels import Kernels
    from taut.common_kernels.problem import Operation


def _load_reference() -> Kernels:
    from taut.common_kernels import reference

    return reference


REFERENCE = KernelProvider(
    name="reference",
    summary="plain torch on any device: the oracle, and the choice where there is no GPU",
    priority=0,
    capabilities=tuple(Capability(cast("Operation", operation)) for operation in OPERATIONS),
    load=_load_reference,
    requires=("torch",),
    # It waits for the device in every call: right everywhere, fit to serve only where there is no device to wait for.
    automatic_on=("cpu",),
    graphs=False,
)


@hookimpl
def taut_kernels() -> Sequence[KernelProvider]:
    """The built-in providers."""
    return [REFERENCE]
