"""The doctor's report for people."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from taut.cli.doctor.report import Level, Model, Probed, Provider, Report

# Operations with a mask; for the others the features say nothing.
MASKED = ("paged_attention", "ragged_attention", "mla_decode")
STYLES: dict[Level, str] = {"ok": "green", "note": "yellow", "wrong": "bold red"}


def render(report: Report, *, every_touch: bool = False) -> Group:
    """The report for people; with `every_touch` every entry of the ledgers, and else how many there are."""
    torch = f"{report.torch.version}, {report.torch.build}" if report.torch else "missing"
    parts: list[Any] = [
        Text(f"taut {report.taut}   python {report.python}   {report.platform}", style="bold"),
        Text(f"torch {torch}   triton {report.triton or 'missing'}   GPUs {len(report.gpus)}"),
        _table(
            "Engines",
            ("engine", "installed", "made for", "serves", "plugin"),
            [
                (
                    engine.name,
                    f"{engine.distribution or ''} {engine.version}".strip() if engine.version else "no",
                    " to ".join(engine.releases),
                    ", ".join(engine.serves) or "nothing yet",
                    ("found" if engine.let_through else "filtered out") if engine.entry_point else "not found",
                )
                for engine in report.engines
            ],
        ),
    ]
    rows: list[tuple[str, ...]]
    if report.gpus:
        rows = [(str(gpu.index), gpu.name, gpu.target, f"{gpu.memory_gib} GiB") for gpu in report.gpus]
        parts.append(_table("GPUs", ("", "name", "target", "memory"), rows))
    rows = [(p.group, p.name, p.package or "unknown", p.loads) for p in report.entry_points]
    if rows:
        parts.append(_table("Entry points", ("group", "name", "of", "loads"), rows))
    rows = [(setting.name, setting.value or "unset", setting.source) for setting in report.settings]
    parts.append(_table("Settings", ("setting", "value", "from"), rows))
    parts.append(
        _table(
            "Kernel providers",
            ("provider", "priority", "summary", "from", "by itself on"),
            [(p.name, str(p.priority), p.summary, p.origin, ", ".join(p.automatic_on)) for p in report.providers],
        )
    )
    parts += [_capabilities(provider) for provider in report.providers]
    if report.model:
        parts += _render_model(report.model)
    if report.bridge:
        parts.append(_every_touch(report.bridge) if every_touch else _touches(report.bridge))
    if report.logs:
        rows = [(logged.engine, logged.when, logged.line or "nothing") for logged in report.logs]
        parts.append(_table("What each process of the engine logs, once", ("engine", "when", "line"), rows))
    findings = Table(title="Findings", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "about", "finding"):
        findings.add_column(column, overflow="fold")
    for finding in sorted(report.findings, key=lambda f: list(STYLES).index(f.level)):
        says = Text(finding.says)
        if finding.advice:
            says.append(f"\n-> {finding.advice}", style="italic")
        findings.add_row(Text(finding.level, style=STYLES[finding.level]), Text(finding.about), says)
    parts.append(findings)
    wrong = sum(finding.level == "wrong" for finding in report.findings)
    parts.append(Text(f"{wrong} wrong" if wrong else "Nothing is wrong.", style=STYLES["wrong" if wrong else "ok"]))
    return Group(*parts)


def _every_touch(bridge: Sequence[Probed]) -> Table:
    rows = [(p.engine, f"{p.since} to {p.until or 'now'}", p.verdict, p.what) for p in bridge]
    return _table("Bridge", ("engine", "releases", "here", "what"), rows)


def _touches(bridge: Sequence[Probed]) -> Table:
    """Entries of each ledger by their verdict: an engine of one release never has all of them."""
    rows = []
    for engine in dict.fromkeys(p.engine for p in bridge):
        mine = [p for p in bridge if p.engine == engine]
        verdicts = Counter(p.verdict.partition(":")[0] for p in mine)
        needed = [p for p in mine if p.needed]
        holding = sum(p.verdict == "here" for p in needed)
        counts = [str(verdicts[word]) for word in ("here", "not here", "failed", "not probed")]
        rows.append((engine, f"{holding} of {len(needed)}", *counts))
    title = "Bridge (`taut doctor --bridge` shows every entry)"
    return _table(title, ("engine", "needed and here", "here", "not here", "failed", "not probed"), rows)


def _capabilities(provider: Provider) -> Table:
    """What a provider can do: operations that can do the same share a row, a limit that is not set takes no space."""
    limits = ("dtypes", "cache_dtypes", "head_sizes", "value_sizes", "page_sizes", "max_query", "max_q_heads")

    def words(value: Any) -> str:
        return ", ".join(map(str, sorted(value))) if isinstance(value, frozenset) else str(value)

    rows: dict[str, list[str]] = {}
    for c in provider.capabilities:
        set_limits = [(name.replace("_", " "), getattr(c, name)) for name in limits if getattr(c, name) is not None]
        lines = [f"on {', '.join(c.targets)}", *(f"{name}: {words(value)}" for name, value in set_limits)]
        if c.operation in MASKED:
            lines.append(f"features: {words(c.features) or 'none'}")
        rows.setdefault("\n".join(lines), []).append(c.operation)
    title = f"What {provider.name} can do"
    return _table(title, ("operation", "with"), [("\n".join(names), can) for can, names in rows.items()])


def _render_model(model: Model) -> list[Table]:
    rows = []
    for one in model.asked:
        p = one.problem
        against = "\n".join(f"{name}: {'; '.join(reasons)}" for name, reasons in one.reasons.items())
        shape = f"heads {p.q_heads}/{p.kv_heads}, size {p.head_size}/{p.value_size}, {p.dtype}"
        asks = ", ".join([shape, *sorted(p.features)])
        rows.append((p.operation, asks, one.provider or "nobody", against or "-"))
    title = f"Model: {model.model_type} ({model.kind}) on {model.target}"
    tables = [_table(title, ("asks for", "with", "served by", "not by"), rows)]
    for engine, outcomes in model.outcomes.items():
        tables.append(_table(f"This model in {engine}", ("TAUT_ATTENTION", "gives"), list(outcomes.items())))
    return tables


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # Text: a stranger's [brackets] are no markup
    return table
