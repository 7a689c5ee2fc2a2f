"""`gluon.jit`: the Python of a kernel, changed where Triton's compiler means something else by it, and launched."""

from __future__ import annotations

import ast
import builtins
import inspect
import random
import textwrap
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import triton.language as tl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gluon_emulator import language
from gluon_emulator.machine import Program, error_text, program, running, where
from gluon_emulator.shared import Descriptor, SharedMemory
from gluon_emulator.values import OF_TORCH, Constexpr, EmulationError, GlobalMemory, Tensor, to_tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg", "launch_pdl"}
SHARED_LIMIT = 232_448  # bytes that a program may have on sm_90


class Settings:
    """What holds for launches from here on.

    Attributes:
        seed: of everything random.
        replaced: what is called instead of a jitted function, by its name.
        left_out: file and line of a statement that is not run.
        launches: kernels that were launched: a test can see that it tested something.
    """

    seed: int = 0
    replaced: dict[str, Callable[..., Any]] = {}  # noqa: RUF012
    left_out: tuple[str, int] = ("", 0)
    launches: list[str] = []  # noqa: RUF012


@contextmanager
def without(file: str, line: int) -> Iterator[None]:
    """Run jitted functions without the statement of this line: a kernel that needs it must then be seen to fail."""
    Settings.left_out = (file, line)
    try:
        yield
    finally:
        Settings.left_out = ("", 0)


@contextmanager
def seeded(seed: int) -> Iterator[list[str]]:
    """Launch with a seed; gives the names of the kernels that are launched meanwhile."""
    before, first = Settings.seed, len(Settings.launches)
    Settings.seed = seed
    made: list[str] = []
    try:
        yield made
    finally:
        made += Settings.launches[first:]
        Settings.seed = before


def replace(name: str, function: Callable[..., Any]) -> None:
    """Call `function` in place of the jitted function of this name, on emulated tensors."""
    Settings.replaced[name] = function


class Jitted:
    """A jitted function: `kernel[grid](...)` launches it, a jitted function calls it.

    Args:
        fn: as written.
        do_not_specialize: parameters that stay scalars if they are 1.
    """

    def __init__(self, fn: Callable[..., Any], do_not_specialize: Sequence[str | int] = ()) -> None:
        self.fn = fn
        self.__name__ = fn.__name__
        self.__doc__ = fn.__doc__
        self.signature = inspect.signature(fn)
        self.arg_names = list(self.signature.parameters)
        self.kept = {self.arg_names[name] if isinstance(name, int) else name for name in do_not_specialize}
        self._rewritten: dict[int, Callable[..., Any]] = {}  # by the line that is left out

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        program()  # there must be one
        function = Settings.replaced.get(self.__name__)
        if function is None:
            file, line = Settings.left_out
            line = line if file == self.fn.__code__.co_filename else 0
            if line not in self._rewritten:
                self._rewritten[line] = rewritten(self.fn, line)
            function = self._rewritten[line]
        return function(*arguments, **named)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **named: Any) -> None:
            self.launch(grid, arguments, named)

        return launch

    def launch(self, grid: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Run all programs, one after the other, in a random order."""
        options = {name: named.pop(name) for name in list(named) if name not in self.arg_names}
        unknown = set(options) - OPTIONS
        if unknown:
            raise EmulationError(
                f"{self.__name__} has no parameter and a launch no option {', '.join(sorted(unknown))}"
            )
        if options.get("num_ctas", 1) != 1:
            raise EmulationError("clusters are not emulated")
        bound = self.signature.bind(*arguments, **named)
        bound.apply_defaults()
        given = bound.arguments
        sizes = grid(given) if callable(grid) else grid
        sizes = tuple(sizes) if isinstance(sizes, Sequence) else (sizes,)
        sizes = (*sizes, 1, 1)[:3]
        memories: dict[int, GlobalMemory] = {}
        values = {name: self._argument(name, value, memories) for name, value in given.items()}
        Settings.launches.append(self.__name__)
        places = [(x, y, z) for z in range(sizes[2]) for y in range(sizes[1]) for x in range(sizes[0])]
        seed = f"{Settings.seed} {self.__name__}"
        random.Random(seed).shuffle(places)
        for place in places:
            one = Program(
                place, sizes, options.get("num_warps", 4), f"{seed} {place}", SHARED_LIMIT,
                bool(options.get("launch_pdl")),
            )  # fmt: skip
            with running(one):
                try:
                    self(**values)
                    one.finish()
                except Exception as error:
                    lines = f"program {place} of {self.__name__}, seed {Settings.seed}: {where(error)}"
                    raise EmulationError(f"{error_text(error)}\n  {lines}") from error

    def _argument(self, name: str, value: Any, memories: dict[int, GlobalMemory]) -> Any:
        if "constexpr" in str(self.signature.parameters[name].annotation) or (
            self.signature.parameters[name].annotation is Constexpr
        ):
            return value
        if isinstance(value, torch.Tensor):
            memory = memories.setdefault(id(value), GlobalMemory(value, name))
            return Tensor(torch.tensor(memory.start), tl.pointer_type(OF_TORCH[value.dtype]), None, memory)
        if isinstance(value, TensorDescriptor):
            memory = GlobalMemory(value.base, name)
            dtype = OF_TORCH[value.base.dtype]
            shape, strides = (
                [to_tensor(int(n), kind) for n in numbers]
                for numbers, kind in ((value.shape, tl.int32), (value.strides, tl.int64))
            )
            block = [int(size) for size in value.block_shape]
            return Descriptor(memory, memory.start, shape, strides, block, value.layout, dtype, value.padding)
        if type(value) is int and value == 1 and name not in self.kept:
            return 1  # which the launcher makes a constant of
        if isinstance(value, (bool, int, float)):
            return to_tensor(value)
        return value


def jit(fn: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`gluon.jit`, with and without options."""
    if fn is None:
        return lambda function: jit(function, **options)
    return Jitted(fn, options.get("do_not_specialize") or ())


# What the compiler means by Python's own words.
def assigned(value: Any) -> Any:
    """A number that is given a name without `constexpr` becomes a scalar on the device."""
    if isinstance(value, (bool, int, float)):
        return to_tensor(value)
    return value


def constant(value: Any) -> Any:
    """What is given a name with `constexpr` is known to the compiler."""
    if isinstance(value, (Tensor, SharedMemory)):
        raise EmulationError("a constexpr is given a value of the device")
    return value


def counted(*bounds: Any) -> Iterator[Tensor]:
    """`range`: the variable of the loop is a scalar on the device."""
    dtype = tl.int32
    for bound in bounds:
        if isinstance(bound, Tensor) and bound.dtype == tl.int64:
            dtype = tl.int64
    for i in builtins.range(*(int(bound) for bound in bounds)):
        yield to_tensor(i, dtype)


def _extreme(name: str) -> Callable[..., Any]:
    def choose(*values: Any) -> Any:
        if any(isinstance(value, Tensor) for value in values):
            result = values[0]
            for value in values[1:]:
                result = getattr(language, {"max": "maximum", "min": "minimum"}[name])(result, value)
            return result
        return getattr(builtins, name)(*values)

    return choose


WORDS = {
    "_emulated_assigned": assigned,
    "_emulated_constant": constant,
    "_emulated_range": counted,
    "_emulated_max": _extreme("max"),
    "_emulated_min": _extreme("min"),
}
CALLED_INSTEAD = {"range": "_emulated_range", "max": "_emulated_max", "min": "_emulated_min"}


class _Rewriter(ast.NodeTransformer):
    def __init__(self, left_out: int) -> None:
        self.left_out = left_out

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        return ast.Pass() if node.lineno == self.left_out else self.generic_visit(node)

    def _call(self, name: str, value: ast.expr) -> ast.Call:
        return ast.Call(ast.Name(name, ast.Load()), [value], [])

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id in CALLED_INSTEAD:
            node.func.id = CALLED_INSTEAD[node.func.id]
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        self.generic_visit(node)
        several = isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
        if several:
            node.value.elts = [self._call("_emulated_assigned", value) for value in node.value.elts]  # type: ignore[attr-defined]
        else:
            node.value = self._call("_emulated_assigned", node.value)
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        self.generic_visit(node)
        target = node.target
        assert isinstance(target, ast.Name), "a += is of a name"
        total = ast.BinOp(ast.Name(target.id, ast.Load()), node.op, node.value)
        return ast.Assign([target], self._call("_emulated_assigned", total))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        if node.value is None:
            return node
        word = "_emulated_constant" if "constexpr" in ast.unparse(node.annotation) else "_emulated_assigned"
        return ast.Assign([node.target], self._call(word, node.value))


def rewritten(fn: Callable[..., Any], left_out: int = 0) -> Callable[..., Any]:
    """A function with the compiler's meaning of assignments and loops; its lines stay where they are, but for one."""
    lines, first = inspect.getsourcelines(fn)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    ast.increment_lineno(tree, first - 1)
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    definition.returns = None
    for argument in (*definition.args.args, *definition.args.kwonlyargs):
        argument.annotation = None
    changed = ast.fix_missing_locations(_Rewriter(left_out).visit(tree))
    code = compile(changed, inspect.getsourcefile(fn) or "?", "exec", dont_inherit=True)
    fn.__globals__.update(WORDS)
    made: dict[str, Any] = {}
    exec(code, fn.__globals__, made)
    return made[fn.__name__]
