"""A provider in a package of its own: attention of one head size, whose answer is always 42."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from taut.common_kernels.problem import Capability
from taut.common_kernels.providers import KernelProvider, hookimpl
from taut.common_kernels.reference import NoWorkspace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Answer:
    """Its kernels."""

    def workspace(self, *_: Any) -> NoWorkspace:
        """None is needed."""
        return NoWorkspace()

    def paged_attention(self, *arguments: Any, **_: Any) -> None:
        """Write 42 into the caller's output."""
        out: Tensor = arguments[-1]
        out.fill_(42.0)


@hookimpl
def taut_kernels() -> Sequence[KernelProvider]:
    """What this package provides."""
    capability = Capability("paged_attention", targets=("cpu",), head_sizes=frozenset({24}))
    return [KernelProvider("answer", "always 42", 100, (capability,), load=Answer)]  # type: ignore[arg-type]
