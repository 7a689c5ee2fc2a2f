"""What the doctor found: as data, for programs, and for people. docs/doctor.md tells what each field holds."""

from __future__ import annotations

import json
import platform
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

import taut

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Level = Literal["ok", "note", "wrong"]
Row = dict[str, Any]  # a row of a table, and an object of the JSON
STYLES: dict[Level, str] = {"ok": "green", "note": "yellow", "wrong": "bold red"}
MASKED = ("paged_attention", "ragged_attention", "mla_decode")  # of the other operations the features say nothing
LIMITS = ("dtypes", "cache_dtypes", "head_sizes", "value_sizes", "page_sizes", "max_query", "max_q_heads")


@dataclass
class Report:
    """Everything the doctor found, each field a key of the JSON."""

    schema: int = 1  # rises when a key goes or changes its meaning
    taut: str = taut.__version__
    python: str = field(default_factory=platform.python_version)
    platform: str = field(default_factory=lambda: f"{platform.system()} {platform.machine()}")
    torch: Row | None = None
    triton: str | None = None
    gpus: list[Row] = field(default_factory=list)
    engines: list[Row] = field(default_factory=list)
    entry_points: list[Row] = field(default_factory=list)
    providers: list[Row] = field(default_factory=list)
    settings: list[Row] = field(default_factory=list)
    model: Row | None = None
    logs: list[Row] = field(default_factory=list)
    bridge: list[Row] = field(default_factory=list)
    findings: list[Row] = field(default_factory=list)

    @property
    def wrong(self) -> bool:
        """Whether anything has to be put right."""
        return any(finding["level"] == "wrong" for finding in self.findings)

    def add(self, level: Level, about: str, says: str, advice: str = "") -> None:
        """Add a finding: what there is to say about something, and what to do; "" where nothing is to be done."""
        self.findings.append({"level": level, "about": about, "says": tidy(says), "advice": tidy(advice)})


def tidy(text: str) -> str:
    """One line, with the home folder as `~` and no password of an address: a report is pasted in public."""
    home = str(Path.home())
    text = re.sub(r"(://)[^/@\s]+@", r"\1", " ".join(text.split()))
    return text.replace(home, "~") if len(home) > 1 else text


def as_json(report: Report) -> str:
    """The report for programs. Its keys are told of in docs/doctor.md and stay."""
    return json.dumps(asdict(report), indent=2, default=sorted)  # a set is sorted


def render(report: Report, *, every_touch: bool = False) -> Group:
    """The report for people; with `every_touch` every entry of the ledgers, and else how many there are."""
    torch = "{version}, {build}".format(**report.torch) if report.torch else "missing"
    wrong = sum(finding["level"] == "wrong" for finding in report.findings)
    return Group(
        Text(f"taut {report.taut}   python {report.python}   {report.platform}", "bold"),
        Text(f"torch {torch}   triton {report.triton or 'missing'}   GPUs {len(report.gpus)}"),
        *(_table(title, rows) for title, rows in _tables(report, every_touch) if rows),
        Text(f"{wrong} wrong" if wrong else "Nothing is wrong.", STYLES["wrong" if wrong else "ok"]),
    )


def _tables(report: Report, every_touch: bool) -> Iterator[tuple[str, Sequence[Row]]]:
    """The title and the rows of each table."""
    yield "Engines", list(map(_engine, report.engines))
    yield "GPUs", report.gpus
    yield "Entry points", _only(report.entry_points, "group", "name", "package", "loads")
    yield "Settings", report.settings
    yield "Kernel providers", _only(report.providers, "name", "priority", "summary", "origin", "automatic_on")
    for provider in report.providers:
        yield f"What {provider['name']} can do", _capabilities(provider)
    if model := report.model:
        yield "Model: {model_type} ({kind}) on {target}".format(**model), list(map(_asked, model["asked"]))
        for engine, modes in model["outcomes"].items():
            yield f"This model in {engine}", [{"TAUT_ATTENTION": mode, "gives": gives} for mode, gives in modes.items()]
    if every_touch:
        touches = [touch | {"until": touch["until"] or "now"} for touch in report.bridge]
        yield "Bridge", _only(touches, "engine", "since", "until", "verdict", "what")
    else:
        yield "Bridge (`taut doctor --bridge` shows every entry)", _touches(report.bridge)
    logs = [row | {"line": row["line"] or "nothing"} for row in report.logs]
    yield "What each process of the engine logs, once", logs
    yield "Findings", [_finding(each) for level in STYLES for each in report.findings if each["level"] == level]


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


def _capabilities(provider: Row) -> list[Row]:
    """What a provider can do: operations that can do the same share a row, a limit that is not set takes no space."""
    operations: dict[str, list[str]] = {}
    for c in provider["capabilities"]:
        limits = {name.replace("_", " "): getattr(c, name) for name in LIMITS if getattr(c, name) is not None}
        limits |= {"features": c.features or "none"} if c.operation in MASKED else {}
        lines = [f"on {_words(c.targets)}", *(f"{name}: {_words(value)}" for name, value in limits.items())]
        operations.setdefault("\n".join(lines), []).append(c.operation)
    return [{"operation": "\n".join(names), "with": can} for can, names in operations.items()]


def _asked(asked: Row) -> Row:
    p, against = asked["problem"], [f"{name}: {'; '.join(reasons)}" for name, reasons in asked["reasons"].items()]
    shape = f"heads {p.q_heads}/{p.kv_heads}, size {p.head_size}/{p.value_size}, {p.dtype}"
    told = {"asks for": p.operation, "with": _words([shape, *sorted(p.features)])}
    return told | {"served by": asked["provider"] or "nobody", "not by": "\n".join(against) or "-"}


def _touches(bridge: Sequence[Row]) -> list[Row]:
    """Entries of each ledger by their verdict: an engine of one release never has all of them."""
    rows = []
    for engine in dict.fromkeys(touch["engine"] for touch in bridge):
        touches = [touch for touch in bridge if touch["engine"] == engine]
        needed = [touch["verdict"] == "here" for touch in touches if touch["needed"]]
        verdicts = [touch["verdict"].partition(":")[0] for touch in touches]
        counts = {verdict: verdicts.count(verdict) for verdict in ("here", "not here", "failed", "not probed")}
        rows.append({"engine": engine, "needed and here": f"{sum(needed)} of {len(needed)}", **counts})
    return rows


def _finding(finding: Row) -> Row:
    says = Text(finding["says"]).append(f"\n-> {finding['advice']}" if finding["advice"] else "", "italic")
    return {"": Text(finding["level"], STYLES[finding["level"]]), "about": finding["about"], "finding": says}


def _table(title: str, rows: Sequence[Row]) -> Table:
    """A table whose columns are the keys of its rows."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for key in rows[0]:
        table.add_column(key, overflow="fold")
    for row in rows:  # [brackets] of a stranger's are no markup
        table.add_row(*(cell if isinstance(cell, Text) else Text(_words(cell)) for cell in row.values()))
    return table


def _words(value: Any) -> str:
    if isinstance(value, (list, tuple, frozenset)):
        return ", ".join(map(str, sorted(value) if isinstance(value, frozenset) else value))
    return "unset" if value is None else str(value)
