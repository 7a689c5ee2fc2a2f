"""The doctor's report for people."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from taut.cli.doctor.report import Finding, Level, Model, Report, Row

# Operations with a mask; for the others the features say nothing.
MASKED = ("paged_attention", "ragged_attention", "mla_decode")
LIMITS = ("dtypes", "cache_dtypes", "head_sizes", "value_sizes", "page_sizes", "max_query", "max_q_heads")
STYLES: dict[Level, str] = {"ok": "green", "note": "yellow", "wrong": "bold red"}


def render(report: Report, *, every_touch: bool = False) -> Group:
    """The report for people; with `every_touch` every entry of the ledgers, and else how many there are."""
    torch = "{version}, {build}".format(**report.torch) if report.torch else "missing"
    parts: list[Text | Table] = [
        Text(f"taut {report.taut}   python {report.python}   {report.platform}", "bold"),
        Text(f"torch {torch}   triton {report.triton or 'missing'}   GPUs {len(report.gpus)}"),
        *(table for title, rows in _tables(report, every_touch) for table in _table(title, rows)),
    ]
    wrong = sum(finding.level == "wrong" for finding in report.findings)
    parts.append(Text(f"{wrong} wrong" if wrong else "Nothing is wrong.", STYLES["wrong" if wrong else "ok"]))
    return Group(*parts)


def _tables(report: Report, every_touch: bool) -> Iterator[tuple[str, Sequence[Row]]]:
    """The title and the rows of each table; one without rows is not shown."""
    yield "Engines", list(map(_engine, report.engines))
    yield "GPUs", report.gpus
    points = [row | {"package": row["package"] or "unknown"} for row in report.entry_points]
    yield "Entry points", _only(points, "group", "name", "package", "loads")
    yield "Settings", report.settings
    yield "Kernel providers", _only(report.providers, "name", "priority", "summary", "origin", "automatic_on")
    for provider in report.providers:
        yield f"What {provider['name']} can do", _capabilities(provider)
    if report.model:
        yield from _model(report.model)
    if every_touch:
        touches = [touch | {"until": touch["until"] or "now"} for touch in report.bridge]
        yield "Bridge", _only(touches, "engine", "since", "until", "verdict", "what")
    else:
        yield "Bridge (`taut doctor --bridge` shows every entry)", _touches(report.bridge)
    logs = [row | {"line": row["line"] or "nothing"} for row in report.logs]
    yield "What each process of the engine logs, once", logs
    levels = list(STYLES)
    yield "Findings", [_finding(each) for each in sorted(report.findings, key=lambda each: levels.index(each.level))]


def _only(rows: Sequence[Row], *keys: str) -> list[Row]:
    return [{key: row[key] for key in keys} for row in rows]


def _engine(engine: Row) -> Row:
    return {
        "engine": engine["name"],
        "installed": f"{engine['distribution'] or ''} {engine['version'] or 'no'}".strip(),
        "made for": " to ".join(engine["releases"]),
        "serves": engine["serves"] or "nothing yet",
        "plugin": ("found" if engine["let_through"] else "filtered out") if engine["entry_point"] else "not found",
    }


def _finding(finding: Finding) -> Row:
    advice = Text(f"\n-> {finding.advice}" if finding.advice else "", "italic")
    level = Text(finding.level, STYLES[finding.level])
    return {"": level, "about": finding.about, "finding": Text(finding.says).append(advice)}


def _touches(bridge: Sequence[Row]) -> list[Row]:
    """Entries of each ledger by their verdict: an engine of one release never has all of them."""
    rows = []
    for engine in dict.fromkeys(touch["engine"] for touch in bridge):
        touches = [touch for touch in bridge if touch["engine"] == engine]
        verdicts = Counter(touch["verdict"].partition(":")[0] for touch in touches)
        needed = [touch["verdict"] == "here" for touch in touches if touch["needed"]]
        counts = {verdict: verdicts[verdict] for verdict in ("here", "not here", "failed", "not probed")}
        rows.append({"engine": engine, "needed and here": f"{sum(needed)} of {len(needed)}", **counts})
    return rows


def _capabilities(provider: Row) -> list[Row]:
    """What a provider can do: operations that can do the same share a row, a limit that is not set takes no space."""
    operations: dict[str, list[str]] = {}
    for c in provider["capabilities"]:
        limits = {name.replace("_", " "): getattr(c, name) for name in LIMITS if getattr(c, name) is not None}
        limits |= {"features": c.features or "none"} if c.operation in MASKED else {}
        lines = [f"on {_words(c.targets)}", *(f"{name}: {_words(value)}" for name, value in limits.items())]
        operations.setdefault("\n".join(lines), []).append(c.operation)
    return [{"operation": "\n".join(names), "with": can} for can, names in operations.items()]


def _model(model: Model) -> Iterator[tuple[str, list[Row]]]:
    rows = []
    for one in model.asked:
        p = one.problem
        against = "\n".join(f"{name}: {'; '.join(reasons)}" for name, reasons in one.reasons.items())
        shape = f"heads {p.q_heads}/{p.kv_heads}, size {p.head_size}/{p.value_size}, {p.dtype}"
        told = {"asks for": p.operation, "with": _words([shape, *sorted(p.features)])}
        rows.append(told | {"served by": one.provider or "nobody", "not by": against or "-"})
    yield f"Model: {model.model_type} ({model.kind}) on {model.target}", rows
    for engine, outcomes in model.outcomes.items():
        yield f"This model in {engine}", [{"TAUT_ATTENTION": mode, "gives": says} for mode, says in outcomes.items()]


def _table(title: str, rows: Sequence[Row]) -> Iterator[Table]:
    """A table whose columns are the keys of its rows."""
    if not rows:
        return
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for key in rows[0]:
        table.add_column(key, overflow="fold")
    for row in rows:  # [brackets] of a stranger's are no markup
        table.add_row(*(cell if isinstance(cell, Text) else Text(_words(cell)) for cell in row.values()))
    yield table


def _words(value: Any) -> str:
    if isinstance(value, frozenset):
        return ", ".join(map(str, sorted(value)))
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "unset" if value is None else str(value)
