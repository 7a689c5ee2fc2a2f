"""What the trace sees of real operators, and the lines that it names."""

from __future__ import annotations

import inspect
from collections import Counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from taut.audit.trace import Trace
from taut.audit.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable

    from taut.audit.records import Event, Scope

MASK = torch.tensor([True, False, True])
ROWS = torch.tensor([2, 0, 1])


def traced(work: Callable[[torch.Tensor], object]) -> list[Event]:
    """The events of some work of a backend's on a tensor of 3 x 4 floats."""
    trace = Trace("cpu", frozenset({__name__}))
    tensor = torch.arange(12.0).reshape(3, 4)
    with trace.step() as step, trace.inside("a layer", "layer", "backend"):
        work(tensor)
    return step.scopes[0].events


def counted(events: list[Event]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for event in events:
        total.update(event.kinds)
    return {kind: count for kind, count in total.items() if count}


WORK: dict[str, tuple[Callable[[torch.Tensor], object], dict[str, int]]] = {
    "zero_": (lambda x: x.zero_(), {"fills": 1, "launches": 1}),
    "fill_": (lambda x: x[1:].fill_(1.0), {"fills": 1, "launches": 1}),
    "a scalar assigned": (lambda x: x.__setitem__(1, 5.0), {"fills": 1, "launches": 1}),
    "zeros": (lambda x: x.new_zeros(3), {"fills": 1, "launches": 1, "allocations": 1}),
    "full_like": (lambda x: torch.full_like(x, 7.0), {"fills": 1, "launches": 1, "allocations": 1}),
    "empty": (lambda x: torch.empty_like(x), {"allocations": 1}),
    "copy_": (lambda x: x[:1].copy_(x[1:2]), {"copies": 1, "launches": 1}),
    "contiguous": (lambda x: x.t().contiguous(), {"copies": 1, "launches": 1, "allocations": 1}),
    "contiguous already": (lambda x: x.contiguous(), {}),
    "cat": (lambda x: torch.cat([x, x]), {"copies": 1, "launches": 1, "allocations": 1}),
    "to another dtype": (lambda x: x.to(torch.bfloat16), {"copies": 1, "launches": 1, "allocations": 1}),
    "item": (lambda x: x[0, 0].item(), {"syncs": 1}),
    "int": (lambda x: int(x[0, 0]), {"syncs": 1}),
    "if": (lambda x: bool(x[0, 0]), {"syncs": 1}),
    "tolist": (lambda x: x.tolist(), {"syncs": 1}),
    "cpu": (lambda x: x.cpu(), {"syncs": 1}),
    "nonzero": (lambda x: x.nonzero(), {"syncs": 1, "launches": 1, "allocations": 1}),
    "an index by a mask": (lambda x: x[MASK], {"syncs": 1, "launches": 1, "allocations": 1}),
    "an index by numbers": (lambda x: x[ROWS], {"launches": 1, "allocations": 1}),
    "repeats of unknown size": (lambda _: ROWS.repeat_interleave(ROWS), {"syncs": 1, "launches": 2, "allocations": 2}),
    "repeats of known size": (
        lambda _: torch.repeat_interleave(ROWS, ROWS, output_size=3),
        {"launches": 2, "allocations": 2},
    ),
    "views": (lambda x: x.view(4, 3).t()[1:].unsqueeze(0).expand(2, 2, 4), {}),
    "arithmetic": (lambda x: x + 1, {"launches": 1, "allocations": 1}),
    "arithmetic in place": (lambda x: x.add_(1), {"launches": 1}),
}


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
@pytest.mark.parametrize("name", WORK)
def test_what_an_operator_makes_a_device_do(name: str, inference: bool) -> None:
    work, expected = WORK[name]
    with torch.inference_mode(inference):  # which dispatches what is otherwise taken apart beforehand
        assert counted(traced(work)) == expected


class Backend:
    """Stands in for a backend's object: a scratch that it keeps to itself, and a result that it returns."""

    def __init__(self) -> None:
        self.builder_ran = False

    def build(self) -> None:
        torch.ones(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scratch = torch.empty_like(x)
        scratch.copy_(x)
        return torch.empty_like(x)


class Layer:
    """Stands in for an engine's layer: it copies what the backend returned into a buffer of its own."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(x)
        output.copy_(self.backend.forward(x))
        output.zero_()
        return output


class Runner:
    """Stands in for a model runner."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def execute(self, x: torch.Tensor) -> None:
        torch.zeros(3)  # outside of attention: of no interest
        self.layer.backend.build()
        self.layer.forward(x)


def watched() -> tuple[Runner, Watch, Trace]:
    runner, watch = Runner(Layer(Backend())), Watch()
    watch.method(runner.layer.backend, "build", "metadata", "metadata", "backend")
    watch.method(runner.layer, "forward", "layer 0", "layer", "engine")
    watch.method(runner.layer.backend, "forward", "layer 0", "layer", "backend")
    has_work = lambda arguments: arguments[0] is None or len(arguments[0]) > 0  # noqa: E731
    watch.steps(runner, "execute", has_work, lambda step, arguments: setattr(step, "tokens", len(arguments[0])))
    return runner, watch, Trace("cpu", frozenset({__name__}))


def step_of(runner: Runner, watch: Watch, trace: Trace) -> list[Scope]:
    watch.source = trace
    runner.execute(torch.ones(3, 4))
    watch.source = None
    return trace.steps[-1].scopes


def test_scopes_and_whose_code_it_is() -> None:
    metadata, layer = step_of(*watched())
    assert (metadata.name, metadata.what, layer.name, layer.what) == ("metadata", "metadata", "layer 0", "layer")
    assert [event.name for event in metadata.events] == ["aten.ones"]
    seen = [(event.name, event.by, {kind for kind, count in event.kinds.items() if count}) for event in layer.events]
    assert seen == [
        ("aten.empty_like", "engine", {"allocations"}),
        ("aten.empty_like", "backend", {"allocations"}),
        ("aten.copy_", "backend", {"copies", "launches"}),
        ("aten.empty_like", "backend", {"outputs"}),
        ("aten.copy_", "backend", {"copies", "launches"}),  # the engine's line, for what the backend returned
        ("aten.zero_", "engine", {"fills", "launches"}),
    ]


def test_lines() -> None:
    _, layer = step_of(*watched())
    first = inspect.getsourcelines(Backend.forward)[1]
    backend = [event.at.line - first for event in layer.events if event.by == "backend" and event.at]
    copied_by_the_engine = inspect.getsourcelines(Layer.forward)[1] + 2 - first
    assert backend == [1, 2, 3, copied_by_the_engine]
    assert {event.at.file for event in layer.events if event.at} == {"unit/test_audit_trace.py"}


def test_a_helper_of_the_backends_is_the_place_and_the_backend_the_way_there() -> None:
    elsewhere: dict[str, Any] = {"__name__": "engine.helpers.merge"}
    exec(compile("def merge(x):\n    return x.zero_()\n", "/somewhere/merge.py", "exec"), elsewhere)
    (event,) = traced(lambda x: elsewhere["merge"](x))
    assert str(event.at) == "engine/helpers/merge.py:2"
    assert event.through is not None
    assert event.through.file == "unit/test_audit_trace.py"


def test_times_stand_inside_one_another() -> None:
    for scope in step_of(*watched()):
        for event in scope.events:
            assert scope.began <= event.began <= event.ended <= scope.ended


def test_nothing_is_recorded_outside_of_steps_and_without_a_source() -> None:
    runner, watch, trace = watched()
    runner.execute(torch.ones(3, 4))
    assert trace.steps == []
    watch.source = trace
    runner.layer.forward(torch.ones(3, 4))
    assert trace.steps == []


def test_a_call_without_work_is_no_step() -> None:
    """An engine that schedules ahead makes one when all is done: it would be an empty step among the others."""
    runner, watch, trace = watched()
    watch.source = trace
    runner.execute(torch.ones(3, 4))
    runner.execute(torch.ones(0, 4))
    assert [step.tokens for step in trace.steps] == [3]


def test_a_step_that_fails_leaves_nothing_behind() -> None:
    runner, watch, trace = watched()
    watch.source = trace
    with pytest.raises(TypeError):
        runner.execute(None)  # type: ignore[arg-type]
    assert counted(step_of(runner, watch, trace)[1].events)["fills"] == 1


LIBRARY = torch.library.Library("taut_audit_test", "DEF")
LIBRARY.define("whole(Tensor x) -> Tensor")
LIBRARY.impl("whole", lambda x: x + 1, "CompositeImplicitAutograd")


def test_an_operator_of_an_engine_is_one_launch_whatever_it_is_made_of() -> None:
    with torch.inference_mode():
        events = traced(lambda x: torch.ops.taut_audit_test.whole(x))
    assert [(event.name, event.kinds) for event in events] == [
        ("taut_audit_test.whole", {"allocations": 1, "launches": 1})
    ]


class WithHoles:
    """An operator that leaves one of its list of outputs undefined, as FlashAttention 3 does."""

    namespace, is_view = "vendor", False
    _schema = SimpleNamespace(name="vendor::forward", arguments=[])

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor | None]:
        return [x + 1, None]


def test_torch_can_take_back_what_an_operator_gave() -> None:
    """It takes no None in a list of tensors."""
    trace, x = Trace("cpu", frozenset({__name__})), torch.ones(3)
    with trace.step() as step, trace.inside("a layer", "layer", "backend"):
        result = trace.dispatched(WithHoles(), (x,), {})
    assert torch.equal(result[0], x + 1)
    assert result[1].numel() == 0
    assert [event.name for event in step.scopes[0].events] == ["vendor.forward"]


@torch.library.custom_op("taut_audit_test::opaque", mutates_args=("output",))
def opaque(output: torch.Tensor) -> None:
    """An operator written in Python, as engines wrap their attention in: inside it no mode sees anything."""
    INSIDE[0](output)


INSIDE: list[Callable[[torch.Tensor], Any]] = []


def test_an_operator_around_a_backend_is_not_a_launch_of_its_own() -> None:
    watch, trace = Watch(), Trace("cpu", frozenset({__name__}))

    class Around:
        def forward(self, x: torch.Tensor) -> None:
            torch.ops.taut_audit_test.opaque(x)

        def inner(self, x: torch.Tensor) -> None:
            x.zero_()

        def step(self, x: torch.Tensor) -> None:
            self.forward(x)

    around = Around()
    watch.method(around, "forward", "layer 0", "layer", "engine")
    watch.method(around, "inner", "layer 0", "layer", "backend")
    watch.steps(around, "step", lambda _: True, lambda *_: None)
    INSIDE[:] = [around.inner]
    watch.source = trace
    around.step(torch.ones(3))
    assert [(event.name, event.by) for event in trace.steps[0].scopes[0].events] == [("aten.zero_", "backend")]
    INSIDE[:] = [lambda x: x.zero_()]
    around.step(torch.ones(3))
    assert [event.name for event in trace.steps[1].scopes[0].events] == ["taut_audit_test.opaque"]


def test_a_launch_of_triton_is_one_event() -> None:
    """By whatever runs it: what the interpreter does in its place is not seen."""
    trace = Trace("cpu", frozenset())
    launch = trace.operation("kernel", {"NUM_KV_SPLITS": 8})
    with trace.step() as step, trace.inside("a layer", "layer", "backend"), launch:
        torch.zeros(3)
    assert [(event.name, event.kinds, event.splits) for event in step.scopes[0].events] == [
        ("triton.kernel", {"launches": 1}, {"NUM_KV_SPLITS": 8})
    ]


def test_a_launch_that_triton_tells_of_keeps_into_how_many_parts_it_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU Triton calls a hook when a kernel starts, with its name alone; the arguments are those of the call."""
    triton = pytest.importorskip("triton")
    from triton.runtime import interpreter, jit

    hooks: list[Callable[[Any], None]] = []
    told = SimpleNamespace(get=lambda: {"name": "stage1"})
    runtime = SimpleNamespace(launch_enter_hook=SimpleNamespace(add=hooks.append))
    monkeypatch.setattr(triton, "knobs", SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(jit.JITFunction, "run", lambda *_, **__: [hook(told) for hook in hooks])
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", interpreter.GridExecutor.__call__)
    watch, trace = Watch(), Trace("cpu", frozenset())
    kernel = SimpleNamespace(arg_names=["query", "NUM_KV_SPLITS"], __name__="stage1")
    backend = SimpleNamespace(forward=lambda: jit.JITFunction.run(kernel, None, NUM_KV_SPLITS=4))
    watch.method(backend, "forward", "a layer", "layer", "backend")
    runner = SimpleNamespace(step=lambda: backend.forward())
    watch.steps(runner, "step", lambda _: True, lambda *_: None)
    watch.source = trace
    runner.step()
    (event,) = trace.steps[0].scopes[0].events
    assert (event.name, event.splits) == ("triton.stage1", {"NUM_KV_SPLITS": 4})
