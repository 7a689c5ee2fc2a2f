"""What docstrings say of parameters and errors, held against the code: no stale name, none left out.

The style is Google's. A docstring may have no section "Args"; that of a class describes what constructs it. The entry
`others` stands for parameters that another docstring describes.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (
    *("adapters", "audit", "benchmarks", "cli", "common_kernels", "configs", "engine_plugins", "package", "tools"),
    "tests",
)
SOURCES = {path: ast.parse(path.read_text()) for name in FOLDERS for path in sorted((ROOT / name).rglob("*.py"))}
CLASSES = {node.name: node for tree in SOURCES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def entries(docstring: str, section: str) -> list[str] | None:
    """The names that a section of a docstring has entries for; None where there is no such section."""
    found = re.search(rf"^{section}:\n((?:(?: {{4}}.*)?(?:\n|\Z))*)", inspect.cleandoc(docstring), flags=re.MULTILINE)
    if not found:
        return None
    heads = re.findall(r"^ {4}(\S[^:]*):(?:\s|$)", found.group(1), flags=re.MULTILINE)
    return [name.strip(" *`") for head in heads for name in head.split(",")]


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    taken = function.args
    named = [
        *taken.posonlyargs,
        *taken.args,
        *filter(None, [taken.vararg]),
        *taken.kwonlyargs,
        *filter(None, [taken.kwarg]),
    ]
    return [one.arg for one in named if one.arg not in ("self", "cls")]


def constructed_from(cls: ast.ClassDef) -> list[str]:
    """What constructs a class: the parameters of its `__init__`, or else its fields, inherited ones first."""
    for node in cls.body:
        if isinstance(node, FUNCTIONS) and node.name == "__init__":
            return parameters(node)
    inherited = [
        name for base in cls.bases if (known := CLASSES.get(ast.unparse(base))) for name in constructed_from(known)
    ]
    own = [
        node.target.id
        for node in cls.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and is_field(node)
    ]
    return [*inherited, *(name for name in own if name not in inherited)]


def is_field(node: ast.AnnAssign) -> bool:
    made = ast.unparse(node.value) if node.value else ""
    return "ClassVar" not in ast.unparse(node.annotation) and "init=False" not in made


def documented(tree: ast.Module) -> Iterator[tuple[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, *FUNCTIONS)) and (docstring := ast.get_docstring(node)):
            yield node, docstring


def problems(tree: ast.Module) -> list[str]:
    """What is wrong in a file, a line each."""
    found = []
    for node, docstring in documented(tree):
        where = f"{node.name} (line {node.lineno})"
        takes = constructed_from(node) if isinstance(node, ast.ClassDef) else parameters(node)
        said = entries(docstring, "Args")
        if said is not None:
            named = [name for name in said if name != "others" or name in takes]
            found += [f"{where}: no parameter `{name}`" for name in named if name not in takes]
            if len(named) == len(said):
                unsaid = [name for name in takes if name not in named and not name.startswith("_")]
                found += [f"{where}: `{name}` is not described" for name in unsaid]
            known = [name for name in named if name in takes]
            if known != sorted(known, key=takes.index):
                found.append(f"{where}: not in the order of the signature, {', '.join(takes)}")
        found += [
            f"{where}: raises `{name}`?" for name in entries(docstring, "Raises") or () if not is_error(name, tree)
        ]
    return found


def is_error(name: str, tree: ast.Module) -> bool:
    """Whether an error is Python's, or the file, or one of ours."""
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return hasattr(builtins, name) or name in CLASSES or name in imported or "." in name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_say_what_is_there(path: Path) -> None:
    assert problems(SOURCES[path]) == []


PLANTED = '''
class Point:
    """A place.

    Args:
        x: to the right.
        {0}: upwards.
    """

    x: int
    y: int


def moved(point, by, *, twice=False):
    """Another place.

    Args:
        {1}
        twice: whether twice.

    Raises:
        {2}: it would not move.
    """
'''
RIGHT = ("y", "point, by: both.", "ValueError")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (RIGHT, []),
        (("y", "others: as in `math`.", "OSError"), []),
        (("z", *RIGHT[1:]), ["Point (line 2): no parameter `z`", "Point (line 2): `y` is not described"]),
        (("y", "point: which.", "ValueError"), ["moved (line 14): `by` is not described"]),
        (
            ("y", "by, point: both.", "ValueError"),
            ["moved (line 14): not in the order of the signature, point, by, twice"],
        ),
        (("y", "others: of `math`.\n        angle: none.", "OSError"), ["moved (line 14): no parameter `angle`"]),
        ((*RIGHT[:2], "MovingError"), ["moved (line 14): raises `MovingError`?"]),
    ],
)
def test_what_is_stale_or_missing_is_found(words: tuple[str, ...], said: list[str]) -> None:
    assert problems(ast.parse(PLANTED.format(*words))) == said
