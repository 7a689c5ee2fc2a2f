"""The first source: every operation that the host asks for while metadata is built and layers run, with its line.

While a function of the engine or of the backend runs `inside` a `Trace`, each operator that PyTorch dispatches, each
launch of a Triton kernel and each reading of a tensor's content is kept as an `Event`. What the engine computes stays
the same. No GPU is needed; what a library launches without PyTorch or Triton is not seen.
"""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from taut.audit.operations import Operand, Operation, bytes_moved, fresh_memory, kinds_of
from taut.audit.records import Event, Place, Scope, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import FrameType

# Packages whose frames are not what asked for an operation.
TRANSPARENT = ("torch", "triton", "contextlib", "functools", "taut.audit")
# Methods that hand a tensor's content to the host. On a GPU they are dispatched; a CPU's tensors are read in place.
READS = frozenset({"tolist", "cpu"})


class Trace:
    """Records steps.

    Args:
        device: the type of the device that the engine computes on: "cpu", "cuda".
        modules: the modules of the backend's own classes.

    Attributes:
        steps: that were recorded.
    """

    def __init__(self, device: str, modules: frozenset[str]) -> None:
        self.device = device
        self.modules = modules
        self.steps: list[Step] = []
        self._step: Step | None = None
        self._scope: Scope | None = None
        self._by = "engine"
        self._quiet = False  # while an operation runs that has been seen
        self._entered = 0
        self._start = 0.0
        self._taken: dict[int, int] = {}  # memory -> which event of this scope took it
        self._returned: set[int] = set()  # memory of what the backend returned in this scope

    @contextmanager
    def step(self) -> Iterator[Step]:
        """Record one step."""
        self._step = step = Step("decode")
        self._start = time.perf_counter()
        try:
            yield step
        finally:
            self._step = None
            step.seconds = time.perf_counter() - self._start
            self.steps.append(step)

    @contextmanager
    def inside(self, name: str, what: str, by: str) -> Iterator[Callable[[Any], None]]:
        """Record what happens inside; gives the function to be called with what comes out.

        Args:
            name: of the layer, or "metadata".
            what: "layer" or "metadata".
            by: "backend" for what is the backend's own, "engine" for what the engine does around it.
        """
        outer = self._scope, self._by, self._quiet
        self._entered += 1
        scope = self._scope
        if scope is None:
            scope = self._scope = Scope(name, what, self._now())
            self._taken, self._returned = {}, set()
            if self._step is not None:
                self._step.scopes.append(scope)
        self._by, self._quiet = ("backend" if "backend" in (by, self._by) else "engine"), False
        try:
            # Once more inside another: an operator written in Python switches both off, and only what it calls again
            # may be seen.
            with _Dispatched(self), _Called(self):
                yield self._returns if self._by == "backend" else _ignore
        finally:
            self._scope, self._by, self._quiet = outer
            if outer[0] is None:
                scope.ended = self._now()

    @contextmanager
    def operation(self, name: str, splits: Mapping[str, int]) -> Iterator[None]:
        """A launch of a Triton kernel. What the interpreter does in its place is not seen."""
        if self._quiet or self._scope is None:
            yield
            return
        began, self._quiet = self._now(), True
        try:
            yield
        finally:
            self._quiet = False
        self._keep(f"triton.{name}", {"launches": 1}, began, splits=splits)

    def dispatched(self, function: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Run an operator, and keep what it did."""
        if self._quiet or self._scope is None:
            return function(*arguments, **named)
        if _made_of_others(function):
            with _Dispatched(self):
                return function.decompose(*arguments, **named)
        entered, began = self._entered, self._now()
        self._quiet = True
        try:
            result = _without_holes(function(*arguments, **named))
        finally:
            self._quiet = False
        if self._entered != entered:  # the way into a layer or a backend, whose operations were seen one by one
            return result
        operation = Operation(
            f"{function.namespace}.{function._schema.name.rpartition('::')[2]}",
            tuple(_operands((arguments, named))),
            tuple(_operands(result)),
            bool(function.is_view),
            bool(_argument(function, arguments, named, "non_blocking")),
            named.get("output_size") is not None,
        )
        kinds = kinds_of(operation, self.device)
        if kinds:
            self._keep(operation.name, kinds, began, operation)
        return result

    def read(self, name: str, method: Callable[[], Any]) -> Any:
        """Run a method that reads a tensor's content in place, which is seen on a CPU alone: there host and device are
        one.
        """
        if self._quiet or self._scope is None or self.device != "cpu":
            return method()
        began, self._quiet = self._now(), True
        try:
            result = method()
        finally:
            self._quiet = False
        self._keep(f"Tensor.{name}", {"syncs": 1}, began)
        return result

    def _keep(
        self,
        name: str,
        kinds: Mapping[str, int],
        began: float,
        operation: Operation | None = None,
        splits: Mapping[str, int] | None = None,
    ) -> None:
        assert self._scope is not None
        at, through = self._places()
        by, taken = self._by, {}
        if operation is not None:
            taken = fresh_memory(operation, self.device)
            sources = {operand.memory for operand in operation.inputs[1:2]}
            if by == "engine" and operation.word == "copy_" and sources & self._returned:
                by = "backend"  # the engine copies what the backend returned, since it did not write where it should
        for memory in taken:
            self._taken[memory] = len(self._scope.events)
        moved = None if operation is None and "launches" in kinds else bytes_moved(operation) if operation else 0
        size = sum(taken.values())
        event = Event(name, by, dict(kinds), began, self._now(), moved, size, at, through, dict(splits or {}))
        self._scope.events.append(event)

    def _returns(self, result: Any) -> None:
        """What a backend's function returned: its memory is the layer's output, no scratch."""
        if self._scope is None or self._scope.what != "layer":
            return
        memories = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        self._returned |= memories
        for memory in memories & self._taken.keys():
            kinds = self._scope.events[self._taken.pop(memory)].kinds
            kinds["allocations"] -= 1
            kinds["outputs"] = kinds.get("outputs", 0) + 1

    def _now(self) -> float:
        return (time.perf_counter() - self._start) * 1e6

    def _places(self) -> tuple[Place | None, Place | None]:
        """The innermost line that is not torch's, and the innermost of the backend's own."""
        at: Place | None = None
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            module = frame.f_globals.get("__name__", "")
            if at is None and not _transparent(module):
                at = _place(frame)
            if module in self.modules:
                return at, _place(frame)
            frame = frame.f_back
        return at, None


def _ignore(_: Any) -> None:
    return None


def _without_holes(result: Any) -> Any:
    """An operator's list of tensors as torch takes it back from Python, which a list with a None is not.

    FlashAttention 3 leaves those of its outputs undefined that it did not need.
    """
    if isinstance(result, list) and any(one is None for one in result):
        return [torch.empty(0) if one is None else one for one in result]
    return result


def _transparent(module: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in TRANSPARENT)


@cache
def _made_of_others(function: Any) -> bool:
    """Whether an operator of torch's only calls others; inference mode dispatches it nevertheless."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return function.namespace == "aten" and bool(has(function.name(), "CompositeImplicitAutograd"))


def _place(frame: FrameType) -> Place:
    module, code = frame.f_globals.get("__name__", "?"), frame.f_code
    name = code.co_filename.rpartition("/")[2]
    folder = module.replace(".", "/") if name == "__init__.py" else module.replace(".", "/").rpartition("/")[0]
    return Place(f"{folder}/{name}" if folder else name, frame.f_lineno, code.co_name)


def _operands(tree: Any) -> Iterator[Operand]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
            mask = leaf.dtype in (torch.bool, torch.uint8)
            yield Operand(leaf.device.type, leaf.untyped_storage().data_ptr(), leaf.numel() * leaf.element_size(), mask)


def _argument(function: Any, arguments: tuple[Any, ...], named: dict[str, Any], name: str) -> Any:
    """The value of an operator's argument, by position or by name; None where it has none of this name."""
    names = [argument.name for argument in function._schema.arguments]
    place = names.index(name) if name in names else len(arguments)
    return arguments[place] if place < len(arguments) else named.get(name)


class _Dispatched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives each operator to a trace."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = trace

    def __torch_dispatch__(
        self, function: Any, _types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        return self.trace.dispatched(function, arguments, named or {})


class _Called(TorchFunctionMode):
    """Gives each method that reads a CPU's tensor to a trace."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_function__(
        self, function: Any, _types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        if name not in READS:
            return function(*arguments, **(named or {}))
        return self.trace.read(name, lambda: function(*arguments, **(named or {})))
