"""The record of an audit as one HTML page that needs nothing else: the backends side by side, then each by itself."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from taut.audit.operations import KINDS
from taut.audit.picture import host_timeline, picture, served, short
from taut.audit.records import Kernel
from taut.audit.verdict import JUDGED, busiest, seen_by

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #888; --waste: #d9534f }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.15rem; margin-top: 2.4rem } h3 { font-size: 1rem; margin: 1.4rem 0 0 }
table { border-collapse: collapse; margin: .6rem 0 }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top }
th { text-align: left; font-weight: 600 }
td.n, th.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
code { font-size: .92em } .dim { color: var(--dim) } .waste { color: var(--waste); font-weight: 600 }
.wide { overflow-x: auto } svg { width: 100%; height: auto; display: block; margin: .6rem 0 }
"""
# What of a row of the summary is shown as bytes, by the words for it.
BYTES = {
    "scratch bytes": "scratch",
    "bytes beside the kernels": "moved",
    "bytes of partial results": "split_traffic",
    "bytes at least": "floor",
}


class Cell(str):
    """A cell's text, with the class that it is shown in; a plain string has none."""

    style = ""


def page(report: Mapping[str, Any]) -> str:
    """The page of a report, as `taut audit --json` prints it."""
    work, runs = report["work"], report["runs"]
    made_up = ", made-up weights" if work["made_up"] else ""
    words = f"{work['model']}{made_up}: {work['rows']} rows of up to {work['context']} tokens, {served(runs)}"
    failed = "".join(f'<p class="waste">fails: {escape(text)}</p>' for text in report["failed"])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>taut audit</title><style>{STYLE}</style>'
        f"<h1>taut audit</h1><p>{escape(words)}; taut {escape(report['taut'])}.</p>{failed}"
        f"{_side_by_side(runs)}{picture(report, alone=False)}{''.join(_run(run) for run in runs)}</html>\n"
    )


def _side_by_side(runs: Sequence[Mapping[str, Any]]) -> str:
    """A step of each run, all layers together."""
    judged = [run["summary"] for run in runs]
    rows = [[kind, *(_counted(kind, each["totals"][kind]) for each in judged)] for kind in (*KINDS, *JUDGED[-2:])]
    rows += [[words, *(size_text(of_a_step(each["rows"], name)) for each in judged)] for words, name in BYTES.items()]
    rows.append(["held from step to step", *(size_text(run["held"]) for run in runs)])
    heading = f"<h2>A {judged[0]['phase']} step, all layers</h2>"
    return heading + _table(["what the backend does", *(run["asked"] for run in runs)], rows)


def of_a_step(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The bytes of this name of a whole step; None where no scope knows."""
    known = [row[name] * row["scopes"] for row in rows if row[name] is not None]
    return sum(known) if known else None


def of_a_scope(row: Mapping[str, Any], name: str) -> str:
    """The bytes of this name of one scope; "" where there is none to know, for metadata attends to nothing."""
    return "" if row["name"] == "metadata" and name in ("floor", "split_traffic") else size_text(row[name])


def _run(run: Mapping[str, Any]) -> str:
    judged = run["summary"]
    seen = seen_by(judged["phase"], judged["steps"], judged["left_out"], judged["profiled"])
    how = "" if judged["totals"]["launches"] is None else ", every layer on the host's own call, in no captured graph"
    parts = [f"<h2>{escape(run['asked'])}</h2><p><code>{escape(run['backend'])}</code>: {escape(seen + how)}.</p>"]
    parts.append(_counts(judged))
    parts += [f'<p class="dim">? {escape(", ".join(kinds))}: {escape(why)}</p>' for why, kinds in reasons(judged)]
    if run["padding"] and run["padding"]["finite"] is not None:
        parts.append(f"<p>Padded with {run['padding']['rows']} rows: {escape(run['padding']['says'])}.</p>")
    parts.append("<h3>Findings</h3>" + _findings(judged["findings"]))
    if run["observed"] and run["observed"]["kernels"]:
        parts.append("<h3>What ran on the device in a decode step</h3>" + _kernels(run["observed"]))
        parts.append(host_timeline(run))
    return "".join(parts)


def reasons(judged: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Why something cannot be seen, each reason once, with the kinds that it is the reason for."""
    found: dict[str, list[str]] = {}
    for kind, why in judged["unknown"].items():
        found.setdefault(why, []).append(kind)
    return list(found.items())


def _counts(judged: Mapping[str, Any]) -> str:
    names = [row["name"] if row["scopes"] == 1 else f"each of {row['scopes']} layers" for row in judged["rows"]]
    rows = []
    for kind in KINDS:
        known = kind not in judged["unknown"]
        cells = [_counted(kind, row["counts"].get(kind, 0) if known else None) for row in judged["rows"]]
        rows.append([kind, *cells, _counted(kind, judged["totals"][kind])])
    for words, name in BYTES.items():
        scopes = [of_a_scope(row, name) for row in judged["rows"]]
        rows.append([words, *scopes, size_text(of_a_step(judged["rows"], name))])
    return _table(["what the backend does", *names, "a step"], rows)


def _findings(findings: Sequence[Mapping[str, Any]]) -> str:
    if not findings:
        return "<p>None.</p>"
    rows = []
    for finding in findings:
        where = [f"{finding[name]['file']}:{finding[name]['line']}" for name in ("through", "at") if finding[name]]
        scope = f"{finding['layers']} layers" if finding["layers"] else finding["scope"]
        ours = finding["by"] == "backend"
        rows.append(
            [
                _styled(finding["kind"], "waste" if ours else "dim"),
                f"{finding['count']:g}",
                scope,
                " > ".join(dict.fromkeys(where)) or "?",
                finding["operation"],
                size_text(finding["size"]) if finding["size"] else "",
                finding["advice"] if ours else "of no concern here: the engine around the backend does it",
            ]
        )
    return _table(["finding", "a step", "in", "where", "operation", "bytes", "what to do"], rows)


def _kernels(device: Mapping[str, Any]) -> str:
    """What ran on the device in one decode step, by the profiler."""
    rows = []
    for kernel, times, microseconds in busiest([Kernel(**kernel) for kernel in device["kernels"]]):
        waves = "?" if kernel.waves is None else f"{kernel.waves:.2f}"
        tail = "?" if kernel.tail is None else f"{kernel.tail:.0%}"
        grid = " x ".join(map(str, kernel.grid))
        name = _styled(short(kernel.name), "waste" if kernel.kind else "")
        rows.append([name, kernel.kind, f"{times}", f"{microseconds:.1f}", grid, waves, tail])
    return _table(["kernel", "", "times", "microseconds", "grid", "waves", "idle in the last"], rows)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; a column of numbers is set to the right."""
    numbers = [all(_is_number(row[i]) for row in rows) and i > 0 for i in range(len(headings))]

    def cell(tag: str, text: str, number: bool) -> str:
        style = " ".join(filter(None, ["n" if number else "", getattr(text, "style", "")]))
        attribute = f' class="{style}"' if style else ""
        return f"<{tag}{attribute}>{escape(text)}</{tag}>"

    def line(tag: str, texts: Sequence[str]) -> str:
        return f"<tr>{''.join(cell(tag, text, number) for text, number in zip(texts, numbers, strict=True))}</tr>"

    return f'<div class="wide"><table>{line("th", headings)}{"".join(line("td", row) for row in rows)}</table></div>'


def _is_number(text: str) -> bool:
    return text in ("", "?") or text[0].isdigit()


def _styled(text: str, style: str) -> Cell:
    cell = Cell(text)
    cell.style = style
    return cell


def _counted(kind: str, count: float | None) -> Cell:
    """A count; red where it is one that no result needs."""
    return _styled(number_text(count), "waste" if kind in JUDGED and count else "")


def number_text(count: float | None) -> str:
    """A count in words; "?" for what nobody has seen."""
    return "?" if count is None else f"{count:g}"


def size_text(size: float | None) -> str:
    """Bytes in words."""
    if size is None:
        return "?"
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
