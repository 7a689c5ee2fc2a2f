"""The second source: one pass of torch's profiler, for what the device really did. It needs a GPU.

`Profiler` marks the backend's parts of a step, as `Trace` tells them; `observed` reads the profile and tells for each
of them what was launched, filled, copied and waited for inside it: by the calls of the runtime that the profiler saw on
the host, and the kernels that it saw on the device. The trace names lines of code. The profile does not, but sees what
no operator of PyTorch's shows: what a library launches, copies and waits for by itself.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from taut.audit.floor import blocks_per_multiprocessor, waves_and_tail
from taut.audit.operations import COPIES, FILLS
from taut.audit.records import Device, Kernel, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

MARK = "taut audit|"
RUNTIME = frozenset({"cuda_runtime", "cuda_driver"})  # the categories of AMD's runtime too
DEVICE = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
WAITS = ("Synchronize", "StreamQuery", "EventQuery")
# What the profiler calls the limits of a multiprocessor.
LIMITS = {
    "most_threads": "maxThreadsPerMultiprocessor",
    "all_registers": "regsPerMultiprocessor",
    "all_shared_memory": "sharedMemPerMultiprocessor",
}
ACROSS = {"HtoD": "h2d", "DtoH": "d2h", "DtoD": "copies"}


class Profiler:
    """Profiles steps; see `watch.Source`.

    Attributes:
        device: what was seen in the last step.
    """

    def __init__(self) -> None:
        self.device = Device()
        self._allocations: Counter[str] = Counter()
        self._scope: str | None = None
        self._marked = False

    @contextmanager
    def step(self) -> Iterator[Step]:
        """Profile one step."""
        self._allocations.clear()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            yield Step("decode")
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "profile.json")
            profiled.export_chrome_trace(str(path))
            self.device = observed(json.loads(path.read_text()))
        for scope, count in self._allocations.items():
            self.device.counts[scope]["allocations"] = count

    @contextmanager
    def inside(self, name: str, what: str, by: str) -> Iterator[Callable[[Any], None]]:  # noqa: ARG002 - a source's
        """Mark what is the backend's own by the outermost scope that it is in."""
        outer = self._scope, self._marked
        self._scope = scope = self._scope or name
        try:
            if by != "backend" or self._marked:
                yield _ignore
                return
            self._marked = True
            before = _allocations()
            with record_function(MARK + scope):
                yield _ignore
            self._allocations[scope] += _allocations() - before
        finally:
            self._scope, self._marked = outer

    @contextmanager
    def operation(self, _name: str, _splits: Mapping[str, int]) -> Iterator[None]:
        """The profiler sees launches by itself."""
        yield


def observed(trace: Mapping[str, Any]) -> Device:
    """What a profile says, inside the marks.

    Args:
        trace: as torch's profiler exports it for Chrome.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    marks = [event for event in events if _category(event) == "user_annotation" and event["name"].startswith(MARK)]
    ran = [event for event in events if _category(event) in DEVICE and "correlation" in event.get("args", {})]
    on_device = {event["args"]["correlation"]: event for event in ran}  # of a captured graph's launch the last one
    properties: Mapping[str, Any] = (trace.get("deviceProperties") or [{}])[0]
    zero = min((event["ts"] for event in ran), default=0.0)
    found, seen = Device(), set()
    for mark in marks:
        scope = mark["name"].removeprefix(MARK)
        inside = [event for event in events if event is not mark and _within(event, mark)]
        counts = Counter(found.counts.get(scope, {}))
        counts["calls"] += 1
        fills = _outermost(inside, FILLS)
        copies = _outermost(inside, COPIES)
        counts["fills"] += len(fills)
        counts["copies"] += sum(not _crosses(copy, inside, on_device) for copy in copies)
        for call in (event for event in inside if _category(event) in RUNTIME):
            filling, copying = (any(_within(call, op) for op in operators) for operators in (fills, copies))
            kinds = _kinds_of_call(call, on_device, in_operator=filling or copying)
            counts += kinds
            correlation = call.get("args", {}).get("correlation")
            if correlation in on_device:
                across = [kind for kind in ACROSS.values() if kinds[kind]]
                kind = "fills" if filling or kinds["fills"] else across[0] if across else "copies" if copying else ""
                found.kernels.append(_kernel(on_device[correlation], scope, zero, kind, properties))
                seen.add(correlation)
        found.counts[scope] = dict(counts)
    rest = (event for event in ran if event["args"]["correlation"] not in seen)
    found.others = [_kernel(event, "", zero, "", properties) for event in rest]
    return found


def _kinds_of_call(
    call: Mapping[str, Any], on_device: Mapping[int, Mapping[str, Any]], *, in_operator: bool
) -> Counter[str]:
    """What one call of the runtime is; one inside a filling or copying operator of torch's is that operator's."""
    name = call["name"]
    if "LaunchKernel" in name:
        return Counter(launches=1)
    if any(word in name for word in WAITS):
        return Counter(syncs=1)
    if "Memset" in name:
        return Counter(fills=0 if in_operator else 1)
    if "Memcpy" in name:
        kind = _direction(call, on_device)
        return Counter({kind: 0 if in_operator and kind == "copies" else 1})
    return Counter()


def _direction(call: Mapping[str, Any], on_device: Mapping[int, Mapping[str, Any]]) -> str:
    copied = on_device.get(call.get("args", {}).get("correlation", -1), {}).get("name", "")
    return next((kind for word, kind in ACROSS.items() if word in copied), "copies")


def _crosses(
    operator: Mapping[str, Any], inside: Sequence[Mapping[str, Any]], on_device: Mapping[int, Mapping[str, Any]]
) -> bool:
    """Whether a copying operator led from host to device or back."""
    calls = [event for event in inside if "Memcpy" in event["name"] and _within(event, operator)]
    return any(_direction(call, on_device) != "copies" for call in calls)


def _outermost(events: Sequence[Mapping[str, Any]], words: frozenset[str]) -> list[Mapping[str, Any]]:
    """Operators of torch's with these names that are not part of another of them."""
    named = [event for event in events if event["name"].startswith("aten::") and event["name"][6:] in words]
    return [event for event in named if not any(other is not event and _within(event, other) for other in named)]


def _kernel(event: Mapping[str, Any], scope: str, zero: float, kind: str, properties: Mapping[str, Any]) -> Kernel:
    told = event["args"]
    grid = tuple(told.get("grid", ()))
    waves = tail = None
    if grid and "numSms" in properties and "block" in told:
        each = blocks_per_multiprocessor(
            prod(told["block"]),
            told.get("registers per thread", 0),
            told.get("shared memory", 0),
            **{limit: properties[name] for limit, name in LIMITS.items() if name in properties},
        )
        waves, tail = waves_and_tail(prod(grid), properties["numSms"], each)
    return Kernel(event["name"], scope, float(event["dur"]), grid, waves, tail, event["ts"] - zero, kind)


def _category(event: Mapping[str, Any]) -> str:
    return str(event.get("cat", ""))


def _within(event: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether an event of the host lies inside another of the same thread."""
    same = event.get("tid") == other.get("tid") and event.get("pid") == other.get("pid")
    return bool(same and other["ts"] <= event["ts"] and event["ts"] + event["dur"] <= other["ts"] + other["dur"])


def _allocations() -> int:
    return int(torch.cuda.memory_stats().get("allocation.all.allocated", 0))


def _ignore(_: Any) -> None:
    return None
