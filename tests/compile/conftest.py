"""Which instances `make test` compiles: all of them for three targets, for the others a cross-section.

The rest is marked exhaustive. `make compile` compiles it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

# One target without asynchronous matrix instructions, the one with Gluon kernels, and AMD's with the least memory.
WHOLE = {"sm_80", "sm_90", "gfx942"}
# Elsewhere: what fills a program's shared memory most, and what depends on how the target converts float8.
# sm_86, sm_89 and sm_120 have the same memory and tiles. Of these sm_86 alone has heads of 256, which compile longest.
FULLEST = {"256, all features", "many heads, several queries"}
FLOAT8 = {"float8", "float8, many heads", "taut_store_kv"}
CROSS_SECTION = {
    "sm_86": FULLEST | {"taut_store_kv"},
    "sm_89": FLOAT8,
    "sm_100": FULLEST | FLOAT8,
    "sm_120": FLOAT8,
    "gfx950": FLOAT8,
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is left to `make compile`."""
    for item in items:
        asked = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        target, case = asked.get("target"), asked.get("case", asked.get("kernel"))
        ours = item.path.parent == Path(__file__).parent
        if ours and case and target not in {None, *WHOLE} and case not in CROSS_SECTION[target]:
            item.add_marker(pytest.mark.exhaustive)
