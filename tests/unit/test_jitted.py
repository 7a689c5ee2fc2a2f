"""What is asked of every jitted function, read from its source: no compiler is needed, and no GPU."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "common_kernels"
FILES = sorted(
    path for path in KERNELS.rglob("*.py") if "@triton.jit" in path.read_text() or "@gluon.jit" in path.read_text()
)


def jitted(path: Path) -> list[ast.FunctionDef]:
    return [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(one) for one in node.decorator_list)
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_jitted_function_takes_nothing_from_the_triton_that_others_patch(path: Path) -> None:
    """SGLang puts a function of its own in the place of `triton.next_power_of_2`, which Triton then does not compile.

    What is computed on the host comes in as a number.
    """
    functions = jitted(path)
    assert functions
    for function in functions:
        used = {
            ast.unparse(node)
            for statement in function.body
            for node in ast.walk(statement)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "triton"
        }
        assert not used, f"{function.name} uses {used}"
