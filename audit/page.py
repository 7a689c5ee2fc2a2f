"""The record of an audit as one HTML page that needs nothing else: tables, findings, and the last step's timeline."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from taut.audit.operations import KINDS
from taut.audit.records import Kernel
from taut.audit.verdict import WASTE, busiest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #8888; --layer: #8882; --op: #4a7fb5; --waste: #d9534f }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2.2rem }
table { border-collapse: collapse; margin: .8rem 0 }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line) }
th { text-align: left; font-weight: 600 } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
code { font-size: .92em } .dim { color: var(--dim) } .waste { color: var(--waste); font-weight: 600 }
svg { width: 100%; height: auto; display: block } svg text { font: 10px system-ui, sans-serif; fill: currentColor }
"""
WIDTH, LANE, LEFT = 1000, 16, 150  # of the timeline, in its own units
MOST_LANES = 64


def page(report: Mapping[str, Any]) -> str:
    """The page of a report, as `taut audit --json` prints it."""
    work = report["work"]
    words = f"{work['model']}, {work['rows']} rows of up to {work['context']} tokens, {work['engine']}"
    parts = [_run(run) for run in report["runs"]]
    if len(report["runs"]) > 1:
        parts.insert(0, _side_by_side(report["runs"]))
    failed = "".join(f'<p class="waste">fails: {escape(text)}</p>' for text in report["failed"])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>taut audit</title><style>{STYLE}</style>'
        f"<h1>taut audit</h1><p>{escape(words)}; taut {escape(report['taut'])}</p>{failed}{''.join(parts)}</html>\n"
    )


def _side_by_side(runs: Sequence[Mapping[str, Any]]) -> str:
    kinds = (*KINDS, "compiled", "not_finite")
    rows = [[kind, *(_number(run["summary"]["totals"][kind]) for run in runs)] for kind in kinds]
    phase = runs[0]["summary"]["phase"]
    return f"<h2>a {phase} step, all layers</h2>" + _table(["", *(run["asked"] for run in runs)], rows)


def _run(run: Mapping[str, Any]) -> str:
    judged = run["summary"]
    heading = f"<h2>{escape(run['asked'])}</h2><p><code>{escape(run['backend'])}</code> in {run['engine']} "
    heading += f"{escape(run['release'])} on {escape(run['device'])}; {judged['steps']} {judged['phase']} steps</p>"
    names = [row["name"] if row["scopes"] == 1 else f"each of {row['scopes']} layers" for row in judged["rows"]]
    rows = []
    for kind in KINDS:
        known = kind not in judged["unknown"]
        cells = [_number(row["counts"].get(kind, 0)) if known else "?" for row in judged["rows"]]
        rows.append([kind, *cells, _number(judged["totals"][kind])])
    table = _table(["what the backend does", *names, "a step"], rows)
    unknown = "".join(f'<p class="dim">? {kind}: {escape(why)}</p>' for kind, why in judged["unknown"].items())
    device = _kernels(run["observed"]) if run["observed"] else ""
    return heading + table + unknown + _findings(judged["findings"]) + device + _timeline(run["steps"], judged["phase"])


def _findings(findings: Sequence[Mapping[str, Any]]) -> str:
    if not findings:
        return "<p>No finding.</p>"
    rows = []
    for finding in findings:
        where = [_place(finding[name]) for name in ("through", "at") if finding[name]]
        scope = f"{finding['layers']} layers" if finding["layers"] else finding["scope"]
        rows.append(
            [
                finding["kind"],
                finding["by"],
                f"{finding['count']:g}",
                scope,
                finding["operation"],
                " > ".join(dict.fromkeys(where)),
            ]
        )
    return _table(["finding", "by", "a step", "in", "operation", "where"], rows)


def _kernels(device: Mapping[str, Any]) -> str:
    """What ran on the device in one decode step, by the profiler."""
    rows = []
    for kernel, times, microseconds in busiest([Kernel(**kernel) for kernel in device["kernels"]]):
        waves, tail = (None, None) if kernel.waves is None or kernel.tail is None else (kernel.waves, kernel.tail)
        grid = " x ".join(map(str, kernel.grid))
        rows.append([kernel.name, str(times), f"{microseconds:.1f}", grid, _number(waves), _number(tail)])
    return _table(["kernel, in a decode step", "times", "microseconds", "grid", "waves", "idle in the last"], rows)


def _timeline(steps: Iterable[Mapping[str, Any]], phase: str) -> str:
    """The last step of a phase: a lane for each scope, its operations where the host ran them."""
    shown = [step["scopes"] for step in steps if step["kind"] == phase and step.get("scopes")]
    if not shown:
        return ""
    scopes = shown[-1]
    begin, end = min(scope["began"] for scope in scopes), max(scope["ended"] for scope in scopes)
    scale = (WIDTH - LEFT) / max(end - begin, 1e-9)
    shapes = []
    for lane, scope in enumerate(scopes[:MOST_LANES]):
        top = lane * LANE
        shapes.append(f'<text x="0" y="{top + 11}">{escape(scope["name"][-24:])}</text>')
        shapes.append(_bar(scope, begin, scale, top, "var(--layer)", scope["name"]))
        for event in scope["events"]:
            wasted = [kind for kind in WASTE if event["kinds"].get(kind)]
            where = _place(event["through"] or event["at"]) if event["through"] or event["at"] else ""
            title = f"{event['name']} {', '.join(wasted)} {where}"
            shapes.append(_bar(event, begin, scale, top, "var(--waste)" if wasted else "var(--op)", title))
    height = min(len(scopes), MOST_LANES) * LANE
    words = f"The last {phase} step as the host ran it, {(end - begin) / 1000:.2f} ms with the trace's own time."
    return f'<p>{words}</p><svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(shapes)}</svg>'


def _bar(thing: Mapping[str, Any], begin: float, scale: float, top: int, colour: str, title: str) -> str:
    left, width = LEFT + (thing["began"] - begin) * scale, max(0.6, (thing["ended"] - thing["began"]) * scale)
    return (
        f'<rect x="{left:.1f}" y="{top + 2}" width="{width:.1f}" height="{LANE - 4}" fill="{colour}">'
        f"<title>{escape(title.strip())}</title></rect>"
    )


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cell(tag: str, text: str, number: bool) -> str:
        return f"<{tag}{' class=n' if number else ''}>{escape(text)}</{tag}>"

    head = "".join(cell("th", text, False) for text in headings)
    body = "".join(
        "<tr>" + "".join(cell("td", text, text.replace(".", "").isdigit()) for text in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _place(place: Mapping[str, Any]) -> str:
    return f"{place['file']}:{place['line']}"


def _number(count: float | None) -> str:
    return "?" if count is None else f"{count:g}"
