"""Which names of Triton and Gluon the kernels use, read from their sources."""

from __future__ import annotations

import ast
import importlib
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from taut.common_kernels import gluon_features

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

KERNELS = Path(__file__).resolve().parents[1] / "common_kernels"
# What a source asks of a module: one name, or several of which any will do (`gluon_features.first_of`).
Names = tuple[str, ...]


def names_used() -> dict[str, set[Names]]:
    """What the kernels' sources ask of each module of Triton, other modules aside.

    A name in an annotation counts. What is asked of a class or of a value is not a module's.
    """
    used: dict[str, set[Names]] = defaultdict(set)
    for path in sorted(KERNELS.rglob("*.py")):
        modules: dict[str, str] = {}  # by the name that the source has for each
        nodes = list(ast.walk(ast.parse(path.read_text(), str(path))))
        for name, place in (pair for node in nodes for pair in _imported(node)):
            if _is_module(place):
                modules[name] = place
            else:
                module, _, attribute = place.rpartition(".")
                used[module].add((attribute,))
        for node in nodes:
            if isinstance(node, ast.Attribute) and _module(node, modules) is None:
                owner = _module(node.value, modules)
                if owner is not None:
                    used[owner].add((node.attr,))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "first_of":
                owner = _module(node.args[0], modules)
                if owner is not None:
                    used[owner].add(_alternatives(node.args[1]))
    return used


def _imported(node: ast.AST) -> Iterator[tuple[str, str]]:
    """The names that an import of Triton binds, each with what it stands for."""
    if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("triton."):
        yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)
    if isinstance(node, ast.Import):
        for alias in node.names:
            if f"{alias.name}.".startswith("triton."):
                whole = alias.name if alias.asname else "triton"
                yield alias.asname or whole, whole


def _module(node: ast.expr, modules: Mapping[str, str]) -> str | None:
    """The module that an expression names; None if it names none."""
    if isinstance(node, ast.Name):
        return modules.get(node.id)
    owner = _module(node.value, modules) if isinstance(node, ast.Attribute) else None
    if owner is None or not _is_module(place := f"{owner}.{node.attr}"):
        return None
    return place


@cache
def _is_module(place: str) -> bool:
    try:
        importlib.import_module(place)
    except ImportError:
        return False
    return True


def _alternatives(names: ast.expr) -> Names:
    if isinstance(names, ast.Name):
        constant: Names = getattr(gluon_features, names.id)
        return constant
    return tuple(ast.literal_eval(names))
