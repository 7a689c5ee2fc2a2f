"""What is shown of a report, as words and tables; the terminal and the page draw the same ones, each in its own way."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from taut.audit.operations import KINDS
from taut.audit.verdict import JUDGED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from taut.audit.records import Kernel, Run
    from taut.audit.report import Report
    from taut.audit.verdict import Finding, Row, Summary

# What of a row of the summary is shown as bytes, by the words for it.
BYTES = {
    "scratch bytes": "scratch",
    "bytes beside the kernels": "moved",
    "bytes of partial results": "split_traffic",
    "bytes at least": "floor",
}


class Words(NamedTuple):
    """A cell or a sentence, and how it is shown; "waste" is what no result needs."""

    text: str
    style: Literal["", "waste", "dim", "good", "warning"] = ""


@dataclass(frozen=True)
class Table:
    """A table; a column of numbers is set to the right."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Words]]

    def is_number(self, column: int) -> bool:
        """Whether a column holds nothing but numbers."""
        texts = [row[column].text for row in self.rows]
        return column > 0 and all(text in ("", "?") or text[0].isdigit() for text in texts)


class Findings(Table):
    """The table of findings, which may be shown by their lines of code instead."""


def title(report: Report) -> str:
    """What was run, on what."""
    work = report.work
    made_up = " with made-up weights" if work["made_up"] else ""
    served = ", ".join(dict.fromkeys(f"{run.engine} {run.release} on {run.device}" for run in report.runs))
    return f"{work['model']}{made_up}, {work['rows']} rows of up to {work['context']} tokens, in {served}"


def side_by_side(report: Report) -> Table:
    """A step of each run, all scopes together."""
    rows = _rows(
        (*KINDS, "compiled", "not_finite"),
        lambda kind: [judged.totals[kind] for judged in report.judged],
        lambda name: [_size(_of_a_step(judged.rows, name)) for judged in report.judged],
    )
    held = [Words("held from step to step"), *(Words(_size(run.held)) for run in report.runs)]
    headings = ("what the backend does", *(run.asked for run in report.runs))
    return Table(f"A {report.judged[0].phase} step, all layers", headings, [*rows, held])


def heading(run: Run, judged: Summary) -> str:
    """What served, and how many steps which source has seen."""
    words = [f"{run.backend} in {run.engine} {run.release} on {run.device}"]
    words.append(f"{judged.steps} {judged.phase} step{'' if judged.steps == 1 else 's'} traced")
    if judged.left_out:
        words.append(f"{judged.left_out} more left out, since only a part of their layers ran on the host's own call")
    if judged.profiled:
        words.append(f"{judged.profiled} profiled")
    return ", ".join(words)


def parts(run: Run, judged: Summary) -> Iterator[Words | Table]:
    """What is shown of one run below its heading."""
    yield _counts(judged)
    yield from _notes(run, judged)
    if judged.findings:
        headings = ("finding", "a step", "in", "where", "operation", "bytes", "what to do")
        yield Findings("Findings", headings, [_finding(finding) for finding in judged.findings])
    else:
        yield Words("No finding.", "good")
    if run.observed is not None and run.observed.kernels:
        headings = ("kernel", "", "times", "microseconds", "grid", "waves", "idle in the last wave")
        rows = [_kernel(*busy) for busy in busiest(run.observed.kernels)]
        yield Table("A decode step on the device", headings, rows)


def busiest(kernels: Sequence[Kernel]) -> list[tuple[Kernel, int, float]]:
    """Of each kernel and grid one launch, how often it ran in a step, for how many microseconds; the longest first."""
    groups: dict[tuple[object, ...], list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        groups[kernel.name, kernel.grid].append(kernel)
    found = [(group[0], len(group), sum(kernel.microseconds for kernel in group)) for group in groups.values()]
    return sorted(found, key=lambda each: -each[2])


def short(name: str) -> str:
    """A kernel's name without its namespaces, arguments and result, which C++ writes around it."""
    if name.startswith("Mem"):  # "Memcpy HtoD (Pageable -> Device)", as the profiler calls what is no kernel
        return name.partition(" (")[0]
    bare = name.replace("(anonymous namespace)::", "")
    found = re.match(r"(?:void |[\w:]+ )?(?:\w+::)*(\w+)\s*[<(]", bare)
    return found[1] if found else bare


def _counts(judged: Summary) -> Table:
    """What each scope does in a step."""
    names = [row.name if row.scopes == 1 else f"each of {row.scopes} layers" for row in judged.rows]

    def counted(kind: str) -> list[float | None]:
        known = kind not in judged.unknown
        return [*(row.counts.get(kind, 0) if known else None for row in judged.rows), judged.totals[kind]]

    def sizes(name: str) -> list[str]:
        return [*(_of_a_scope(row, name) for row in judged.rows), _size(_of_a_step(judged.rows, name))]

    return Table("", ["what the backend does", *names, "a step"], _rows(KINDS, counted, sizes))


def _rows(
    kinds: Sequence[str], counted: Callable[[str], list[float | None]], sizes: Callable[[str], list[str]]
) -> list[list[Words]]:
    """A row for each kind and for each name of bytes; "?" is what nobody has seen."""

    def cell(kind: str, count: float | None) -> Words:
        return Words("?" if count is None else f"{count:g}", "waste" if kind in JUDGED and count else "")

    rows = [[Words(kind), *(cell(kind, count) for count in counted(kind))] for kind in kinds]
    return rows + [[Words(words), *map(Words, sizes(name))] for words, name in BYTES.items()]


def _notes(run: Run, judged: Summary) -> Iterator[Words]:
    """What is to be known of a run beside its counts."""
    if judged.totals["launches"] is not None:
        yield Words("In these steps every layer ran on the host's own call, in no captured graph.")
    if run.kernels.endswith("reference"):
        why = "plain torch: right on every device, and no measure of what a GPU runs"
        yield Words(f"The reference kernels serve, {why}.", "warning")
    if padded := [step.padded for step in run.steps if step.kind == judged.phase and step.padded]:
        yield Words(f"Rows of a step that are padding: {max(padded)}.")
    if run.padding is not None and run.padding.finite is not None:
        yield Words(f"Padded with {run.padding.rows} rows: {run.padding.says}.")
    if run.held is not None:
        yield Words(f"The backend's objects hold {_size(run.held)} from step to step.")
    for why in dict.fromkeys(judged.unknown.values()):
        yield Words(f"? {', '.join(kind for kind in judged.unknown if judged.unknown[kind] == why)}: {why}", "dim")


def _finding(finding: Finding) -> list[Words]:
    judged = finding.by == "backend"
    layers = f"{finding.layers} layer{'' if finding.layers == 1 else 's'}"
    scope = layers if finding.layers else "the run" if finding.scope == "run" else finding.scope
    told = (
        f"{finding.count:g}",
        scope if judged else f"the engine around it, {scope}",
        finding.where,
        finding.operation,
        _size(finding.size) if finding.size else "",
        finding.advice if judged else "of no concern here: the engine around the backend does it",
    )
    return [Words(finding.kind, "waste" if judged else "dim"), *map(Words, told)]


def _kernel(kernel: Kernel, times: int, microseconds: float) -> list[Words]:
    waves = "?" if kernel.waves is None else f"{kernel.waves:.2f}"
    tail = "?" if kernel.tail is None else f"{kernel.tail:.0%}"
    grid = " x ".join(map(str, kernel.grid)) or "?"
    told = (kernel.kind, str(times), f"{microseconds:.1f}", grid, waves, tail)
    return [Words(short(kernel.name), "waste" if kernel.kind else ""), *map(Words, told)]


def _of_a_step(rows: Sequence[Row], name: str) -> float | None:
    """The bytes of this name of a whole step; None where no scope knows."""
    known = [getattr(row, name) * row.scopes for row in rows if getattr(row, name) is not None]
    return sum(known) if known else None


def _of_a_scope(row: Row, name: str) -> str:
    """The bytes of this name of one scope; "" where there is none to know, for metadata attends to nothing."""
    return "" if row.name == "metadata" and name in ("floor", "split_traffic") else _size(getattr(row, name))


def _size(size: float | None) -> str:
    """Bytes in words."""
    if size is None:
        return "?"
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
