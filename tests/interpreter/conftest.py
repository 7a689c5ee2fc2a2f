"""Runs the kernels on a CPU under Triton's interpreter, which must be asked for before triton is imported.

That is so when this folder has a pytest of its own: `pytest tests/interpreter`. In a process that has imported triton
for compiling, these tests are skipped.
"""

from __future__ import annotations

import os
import sys

import pytest

if "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    for item in items:
        if "interpreter" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason="triton is here to compile: run `pytest tests/interpreter` alone"))
