"""What is asked of every jitted function, read from its source: no compiler is needed, and no GPU."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

import pytest

from jitted import KERNELS, jitted, largest_first

if TYPE_CHECKING:
    from pathlib import Path

MOST_PARAMETERS = {"gluon": 24, "triton": 16}
FILES = sorted({one.path for one in largest_first(KERNELS)})


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_jitted_function_takes_nothing_from_the_triton_that_others_patch(path: Path) -> None:
    """SGLang puts a function of its own in the place of `triton.next_power_of_2`, which Triton then does not compile.

    What is computed on the host comes in as a number.
    """
    for function in (one.function for one in jitted(path)):
        used = {
            ast.unparse(node)
            for statement in function.body
            for node in ast.walk(statement)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "triton"
        }
        assert not used, f"{function.name} uses {used}"


def test_only_kernels_take_many_parameters() -> None:
    """What belongs together travels together: a function below a kernel takes aggregates. Constexprs count."""
    functions = largest_first(KERNELS)
    assert any(one.is_kernel for one in functions)
    too_many = [
        f"{one.function.name} takes {one.parameters}, the most in {one.dialect} are {MOST_PARAMETERS[one.dialect]}"
        for one in functions
        if not one.is_kernel and one.parameters > MOST_PARAMETERS[one.dialect]
    ]
    assert too_many == []
