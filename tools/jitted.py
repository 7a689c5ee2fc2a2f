"""The jitted functions of common_kernels, read from their sources; run, the parameters that each takes, most first.

python tools/jitted.py [FOLDER]     of another checkout's common_kernels, or of this one's
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import NamedTuple

KERNELS = Path(__file__).resolve().parents[1] / "common_kernels"


class Jitted(NamedTuple):
    """A function that Triton or Gluon compiles.

    Args:
        path: its file.
        dialect: "triton" or "gluon".
        function: its source.
    """

    path: Path
    dialect: str
    function: ast.FunctionDef

    @property
    def is_kernel(self) -> bool:
        """Whether the host launches it: by such names a trace tells our kernels."""
        return self.function.name.startswith("taut_")

    @property
    def parameters(self) -> int:
        """How many parameters it takes, constexprs included."""
        taken = self.function.args
        return len([*taken.posonlyargs, *taken.args, *taken.kwonlyargs, *filter(None, (taken.vararg, taken.kwarg))])


def jitted(path: Path) -> list[Jitted]:
    """The functions of a file that are decorated with `triton.jit` or `gluon.jit`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef):
            continue
        for decorator in node.decorator_list:
            module, _, name = ast.unparse(decorator).partition("(")[0].rpartition(".")
            if name == "jit":
                found.append(Jitted(path, module, node))
    return found


def largest_first(folder: Path) -> list[Jitted]:
    """All of a folder's, by their parameters, the most first."""
    found = [one for path in folder.rglob("*.py") for one in jitted(path)]
    return sorted(found, key=lambda one: (-one.parameters, str(one.path), one.function.lineno))


def main() -> None:
    """The command line."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else KERNELS
    for one in largest_first(folder):
        kind = "kernel" if one.is_kernel else ""
        print(f"{one.parameters:3} {one.dialect:6} {kind:6} {one.path.relative_to(folder)}:{one.function.name}")


if __name__ == "__main__":
    main()
