"""Findings out of records, and what fails. Pure: data in, data out."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from taut.audit.floor import floor_bytes, split_bytes
from taut.audit.operations import KINDS
from taut.audit.records import Place  # noqa: TC001 - a report that is read back is held against these types

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from taut.audit.records import Device, Event, Layer, Run, Scope, Step

# What the profiler counts as the trace does: its allocations are those of a layer's output, too.
PROFILED = ("syncs", "h2d", "d2h", "copies", "fills", "launches")
# What can be asked to fail: what is counted of a step and no result needs, and what is judged of a whole run.
WASTE = ("syncs", "h2d", "d2h", "copies", "fills", "allocations")
JUDGED = (*WASTE, "compiled", "not_finite")
ADVICE = {
    "syncs": "keep the number on the device, or take the host's own copy of it",
    "h2d": "upload once a step from pinned memory, without waiting, or compute it on the device",
    "d2h": "keep it on the device, or take the host's own copy of it",
    "copies": "let the kernel take strides, or write where the result belongs",
    "fills": "let the kernel write what nobody else does; nothing has to be filled beforehand",
    "allocations": "keep the buffer from step to step, with whoever owns the step",
    "compiled": "compile it before the engine serves, for every shape that a step can have",
    "not_finite": "let the kernel write zeros where a row has no work",
    "frozen_splits": "choose the number of splits on the device, from the live lengths",
}
NO_STEP = "no such step was recorded"
IN_A_GRAPH = "no layer ran on the host's own call: what a captured graph does, the trace does not see"
ON_A_CPU = "on a CPU host and device are one: copies between them are seen on a GPU alone"


@dataclass(frozen=True)
class Finding:
    """One thing that a run does and no result needs, with the line that asks for it.

    Args:
        kind: one of `JUDGED`, or "frozen_splits".
        phase: "decode" or "prefill"; "run" for what belongs to no step.
        scope: "metadata" or "layer".
        by: "backend", or "engine" for what the engine does around it, which no verdict counts.
        operation: its name.
        count: times a step, all layers together.
        layers: how many layers do it.
        size: bytes that it moves or takes in a step, all layers together; None where it is not known.
        at: the innermost line that is not torch's.
        through: the innermost line in the backend's own files.
        advice: what to do about it.
    """

    kind: str
    phase: str
    scope: str
    by: str
    operation: str
    count: float
    layers: int
    size: int | None
    at: Place | None
    through: Place | None
    advice: str

    @property
    def where(self) -> str:
        """The line to look at: the backend's own, and the one below it that did it."""
        if self.through is None or self.through == self.at:
            return str(self.at or self.through or "?")
        return f"{self.through} > {self.at}"


@dataclass
class Row:
    """What one scope, or several alike, does in a step.

    Args:
        name: of the scope, or of the first and the last of those alike.
        scopes: how many are alike.
        counts: by kind, of one of them, what the backend does.
        scratch: bytes that one of them allocates and does not return.
        moved: bytes that its fills, copies and other operations of torch's move beside the kernels.
        floor: bytes that its attention must move at least; None for metadata.
        split_traffic: bytes of partial results; None where it is not known.
    """

    name: str
    scopes: int
    counts: dict[str, float]
    scratch: float
    moved: float
    floor: float | None = None
    split_traffic: float | None = None


@dataclass
class Summary:
    """A run, judged.

    Args:
        phase: "decode" or "prefill".
        steps: how many the trace saw in full; the counts are their average.
        left_out: how many it saw in part, some of their layers in captured graphs; they count for nothing.
        profiled: how many the profiler saw.
        rows: metadata, then the layers, those alike together.
        totals: by kind what a step does, all scopes together, as the source says that saw more; None: neither can.
        findings: the backend's first, those of the most bytes and counts first.
        unknown: by kind, why it cannot be seen.
    """

    phase: str
    steps: int
    left_out: int = 0
    profiled: int = 0
    rows: list[Row] = field(default_factory=list)
    totals: dict[str, float | None] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)


def summary(run: Run, phase: str) -> Summary:
    """What the steps of one phase do, on average."""
    recorded = [step for step in run.steps if step.kind == phase]
    steps = _seen_in_full(recorded)
    unknown = {"h2d": ON_A_CPU, "d2h": ON_A_CPU} if run.device == "cpu" else {}
    if not any(_layers_of(step) for step in steps):
        unknown |= dict.fromkeys(KINDS, IN_A_GRAPH if steps else NO_STEP)
    if run.padding is None or run.padding.finite is None:
        unknown["not_finite"] = run.padding.says if run.padding else "no rows without work were tried"
    rows = _alike(_rows(run, steps, run.partials if phase == "decode" else None))
    totals: dict[str, float | None] = {
        kind: sum(row.scopes * row.counts.get(kind, 0) for row in rows) for kind in KINDS
    }
    compiled = sum(len(step.compiled) for step in recorded) / max(1, len(recorded))
    totals |= {"compiled": compiled, "not_finite": run.padding.rows if run.padding and not run.padding.finite else 0}
    totals |= dict.fromkeys(unknown)
    findings = _findings(run, recorded, steps)
    profiled = run.observed is not None and phase == "decode"
    if run.observed is not None and profiled:
        findings += _seen_by_the_profiler_alone(run.observed, totals)
    return Summary(phase, len(steps), len(recorded) - len(steps), int(profiled), rows, totals, findings, unknown)


def _layers_of(step: Step) -> set[str]:
    return {scope.name for scope in step.scopes if scope.what == "layer"}


def _seen_in_full(steps: Sequence[Step]) -> list[Step]:
    """Those whose layers all ran on the host's own call; all steps if no layer did in any of them."""
    everything = {name for step in steps for name in _layers_of(step)}
    return [step for step in steps if _layers_of(step) == everything]


def failures(judged: Summary, kinds: Iterable[str]) -> list[str]:
    """What fails of what was asked to, as sentences."""
    said = []
    for kind in kinds:
        count = judged.totals[kind]
        if count is None:
            said.append(f"{kind}: not seen here ({judged.unknown[kind]})")
        elif count:
            said.append(f"{kind}: {count:g} a {judged.phase} step")
    return said


def _seen_by_the_profiler_alone(device: Device, totals: dict[str, float | None]) -> list[Finding]:
    """What the device did and no operator of torch's shows; the totals become those of the source that saw more."""
    seen: Counter[str] = Counter()
    for counts in device.counts.values():
        seen.update({kind: count for kind, count in counts.items() if kind in PROFILED})
    found = []
    for kind in PROFILED:
        if totals[kind] is None:  # in a captured graph, which the marks of the profiler do not reach either
            continue
        more = seen[kind] - (totals[kind] or 0)
        if kind in WASTE and more > 0:
            found.append(_of_run(kind, "decode", "seen by the profiler alone", more))
        totals[kind] = max(seen[kind], totals[kind] or 0)
    return found


def _rows(run: Run, steps: Sequence[Step], partials: int | None) -> list[Row]:
    """A row for each scope, averaged over the steps; `partials` are a layer's, where a schedule of ours tells."""
    layers = {layer.name: layer for layer in run.layers}
    scopes: dict[str, list[tuple[Step, Scope]]] = defaultdict(list)
    for step in steps:
        for scope in step.scopes:
            scopes[scope.name].append((step, scope))
    rows = []
    for name, found in scopes.items():
        events = [event for _, scope in found for event in scope.events if event.by == "backend"]
        counts = Counter[str]()
        for event in events:
            counts.update(event.kinds)
        row = Row(
            name,
            1,
            {kind: times / len(steps) for kind, times in counts.items() if times},
            sum(event.taken for event in events if not event.kinds.get("outputs")) / len(steps),
            sum(event.moved or 0 for event in events) / len(steps),
        )
        if layer := layers.get(name):
            row.floor = sum(floor_bytes(layer, step.lengths, step.tokens) for step, _ in found) / len(steps)
            row.split_traffic = _split_traffic(layer, found, len(steps)) if partials is None else partials
        rows.append(row)
    return rows


def _split_traffic(layer: Layer, found: Sequence[tuple[Step, Scope]], steps: int) -> float | None:
    """Bytes of partial results in a step, where a launch says into how many parts it splits each row."""
    splits = [(step, max(event.splits.values())) for step, scope in found for event in scope.events if event.splits]
    widest = {id(step): (step.tokens, count) for step, count in sorted(splits, key=lambda each: each[1])}
    if not widest:
        return None
    return sum(split_bytes(rows, layer.q_heads, count, layer.value_size) for rows, count in widest.values()) / steps


def _alike(rows: Sequence[Row]) -> list[Row]:
    """Rows that differ in their name alone as one, in the order of the first of each."""
    groups: dict[object, list[Row]] = defaultdict(list)
    for row in rows:
        key = tuple(sorted(row.counts.items())), row.scratch, row.moved, row.floor, row.split_traffic
        groups[key if row.floor is not None else row.name].append(row)
    for first, *others in groups.values():
        if others:
            first.name, first.scopes = f"{first.name} … {others[-1].name}", 1 + len(others)
    return [group[0] for group in groups.values()]


def _findings(run: Run, recorded: Sequence[Step], steps: Sequence[Step]) -> list[Finding]:
    """What the steps that were seen in full do, and what was compiled in any of those that were recorded."""
    phase = recorded[0].kind if recorded else "run"
    groups: dict[Finding, list[tuple[str, Event]]] = defaultdict(list)  # by what is the same of them
    for step in steps:
        for scope in step.scopes:
            for event in scope.events:
                for kind in WASTE:
                    if event.kinds.get(kind):
                        same = _of_run(kind, phase, event.name, 0)
                        same = replace(same, scope=scope.what, by=event.by, at=event.at, through=event.through)
                        groups[same].append((scope.name, event))
    found = []
    for same, events in groups.items():
        sizes = [event.taken if same.kind == "allocations" else event.moved for _, event in events]
        known = [size for size in sizes if size is not None]
        count = sum(event.kinds[same.kind] for _, event in events) / len(steps)
        layers = len({name for name, _ in events}) if same.scope == "layer" else 0
        size = sum(known) // len(steps) if len(known) == len(sizes) else None
        found.append(replace(same, count=count, layers=layers, size=size))
    found.sort(key=lambda finding: (finding.by != "backend", WASTE.index(finding.kind), -finding.count))
    compiled = Counter(name for step in recorded for name in step.compiled)
    found += [_of_run("compiled", phase, name, times / len(recorded)) for name, times in compiled.items()]
    if run.padding is not None and run.padding.finite is False:
        found.append(_of_run("not_finite", "run", run.padding.says, run.padding.rows))
    found += [_of_run("frozen_splits", "run", name, count) for name, count in run.captured_splits.items()]
    return found


def _of_run(kind: str, phase: str, operation: str, count: float) -> Finding:
    return Finding(kind, phase, "run", "backend", operation, count, 0, None, None, None, ADVICE[kind])
