"""How the two sources are put around an engine's steps, whatever the engine.

A `Watch` stands in for methods of the engine's own objects. A source, the trace or torch's profiler, is switched on for
some of the steps; while none is, the methods are called as they are.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from taut.audit.records import Step

# Arguments of a kernel that say into how many parts a row is split.
SPLITS = ("SPLIT", "SEGMENT")


class Source(Protocol):
    """What records steps."""

    def step(self) -> AbstractContextManager[Step]:
        """Record one step."""
        ...

    def inside(self, name: str, what: str, by: str) -> AbstractContextManager[Callable[[Any], None]]:
        """Record a part of it; see `Trace.inside`."""
        ...

    def operation(self, name: str, splits: Mapping[str, int]) -> AbstractContextManager[None]:
        """Record a launch of a Triton kernel."""
        ...


class Watch:
    """Stands in for methods.

    Attributes:
        source: what records the coming steps; None for nothing.
        captured: arguments of launches during a graph's capture that say how rows are split, by kernel and argument.
    """

    def __init__(self) -> None:
        self.source: Source | None = None
        self.captured: dict[str, int] = {}
        self._compiled: list[str] = []
        self._splits: dict[str, int] = {}  # arguments of the launch that is under way
        self._in_step = False
        self._install()

    def use(self, source: Source | None) -> None:
        """Let a source record the coming steps; None: nothing does."""
        self.source = source

    def method(self, owner: Any, name: str, scope: str, what: str, by: str) -> None:
        """Stand in for a method of one object; nothing is done where it has none of this name.

        Args:
            owner: the object.
            name: of its method.
            scope: the layer's name, or "metadata".
            what: "layer" or "metadata".
            by: "backend" or "engine", whose code it is.
        """
        method = getattr(owner, name, None)
        if method is None:
            return

        @functools.wraps(method)
        def watched(*arguments: Any, **named: Any) -> Any:
            if self.source is None or not self._in_step:
                return method(*arguments, **named)
            with self.source.inside(scope, what, by) as returns:
                result = method(*arguments, **named)
                returns(result)
            return result

        setattr(owner, name, watched)

    def steps(
        self,
        owner: Any,
        name: str,
        has_work: Callable[[Sequence[Any]], bool],
        describe: Callable[[Step, Sequence[Any]], None],
    ) -> None:
        """Stand in for the method of one object that runs a step.

        Args:
            owner: the object.
            name: of its method.
            has_work: whether a call with these arguments runs anything; engines make calls that do not, when they
                schedule ahead, and those are no steps.
            describe: fills in what the step was, from its arguments, when it has run.
        """
        method = getattr(owner, name)

        @functools.wraps(method)
        def watched(*arguments: Any, **named: Any) -> Any:
            given = [*arguments, *named.values()]
            if self.source is None or self._in_step or not has_work(given):
                return method(*arguments, **named)
            before = len(self._compiled)
            self._in_step = True
            try:
                with self.source.step() as step:
                    result = method(*arguments, **named)
            finally:
                self._in_step = False
            step.compiled = self._compiled[before:]
            describe(step, given)
            return result

        setattr(owner, name, watched)

    # Triton

    def _install(self) -> None:
        """Be told of Triton's launches and compilations, for the life of this process."""
        try:
            import triton
            from triton.runtime import interpreter, jit
        except ImportError:
            return
        runtime: Any = getattr(getattr(triton, "knobs", None), "runtime", None)
        hooked = hasattr(getattr(runtime, "launch_enter_hook", None), "add")
        if hooked:  # sees launches of kernels that were compiled beforehand, too
            runtime.launch_enter_hook.add(lambda metadata: self._launched(str(metadata.get()["name"])))
        if hasattr(runtime, "jit_post_compile_hook"):
            runtime.jit_post_compile_hook = self._compiling(runtime.jit_post_compile_hook)
        run, watch = jit.JITFunction.run, self

        @functools.wraps(run)
        def watched_run(function: Any, *arguments: Any, **named: Any) -> Any:
            watch._splits = _splits(function.arg_names, arguments, named)
            try:
                watch._note_capture(function.__name__)
                if not hooked and not named.get("warmup"):
                    watch._launched(function.__name__)
                return run(function, *arguments, **named)
            finally:
                watch._splits = {}

        jit.JITFunction.run = watched_run
        execute = interpreter.GridExecutor.__call__

        @functools.wraps(execute)
        def watched_execution(executor: Any, *arguments: Any, **named: Any) -> Any:
            with watch._interpreted(executor.fn.__name__, _splits(executor.arg_names, arguments, named)):
                return execute(executor, *arguments, **named)

        interpreter.GridExecutor.__call__ = watched_execution

    def _launched(self, name: str) -> None:
        with self._interpreted(name, self._splits):
            pass

    @contextmanager
    def _interpreted(self, name: str, splits: dict[str, int]) -> Iterator[None]:
        if self.source is None or not self._in_step:
            yield
            return
        with self.source.operation(name, splits):
            yield

    def _note_capture(self, name: str) -> None:
        if self._splits and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            self.captured |= {f"{name}.{argument}": count for argument, count in self._splits.items()}

    def _compiling(self, others: Callable[..., Any] | None) -> Callable[..., Any]:
        def hook(**told: Any) -> Any:
            self._compiled.append(str(getattr(told.get("fn"), "name", told.get("repr", "a kernel"))))
            return others(**told) if others else None

        return hook


def _splits(names: Sequence[str], arguments: Sequence[Any], named: Mapping[str, Any]) -> dict[str, int]:
    """The arguments of a kernel that say into how many parts rows are split."""
    given = {**dict(zip(names, arguments, strict=False)), **named}
    return {
        name: value
        for name, value in given.items()
        if isinstance(value, int) and not isinstance(value, bool) and any(word in name.upper() for word in SPLITS)
    }
