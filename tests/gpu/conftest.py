"""Tests that need a GPU; skipped where there is none. Those of kernels run for each provider that has kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from taut.common_kernels import builtin

if TYPE_CHECKING:
    from collections.abc import Callable

    from taut.common_kernels.problem import Problem


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" not in item.path.parts:
            continue
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(params=[builtin.TRITON, builtin.HOPPER], ids=lambda provider: provider.name)
def serving(request: pytest.FixtureRequest) -> Callable[[Problem], Any]:
    """Gives a provider's operations for a problem; skips the test where the provider does not serve it."""

    def operations(problem: Problem) -> Any:
        reasons = request.param.refusals(problem)
        if reasons:
            pytest.skip(f"{request.param.name}: {'; '.join(reasons)}")
        return request.param.kernels

    return operations
