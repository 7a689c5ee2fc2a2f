"""A report as one HTML page that needs nothing else: the backends side by side, then each by itself."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from taut.audit.picture import host_timeline, picture
from taut.audit.shown import Table, Words, heading, parts, side_by_side, title

if TYPE_CHECKING:
    from taut.audit.records import Run
    from taut.audit.report import Report
    from taut.audit.verdict import Summary

STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #888; --waste: #d9534f }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.15rem; margin-top: 2.4rem } h3 { font-size: 1rem; margin: 1.4rem 0 0 }
table { border-collapse: collapse; margin: .6rem 0 }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top }
th { text-align: left; font-weight: 600 }
td.n, th.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
.dim { color: var(--dim) } .waste { color: var(--waste); font-weight: 600 } .warning { font-weight: 600 }
.wide { overflow-x: auto } svg { width: 100%; height: auto; display: block; margin: .6rem 0 }
"""


def page(report: Report) -> str:
    """The page of a report."""
    whole = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>taut audit</title><style>{STYLE}</style>',
        f"<h1>taut audit</h1><p>{escape(title(report))}; taut {escape(report.taut)}.</p>",
        *(_element("p", Words(f"fails: {sentence}", "waste")) for sentence in report.failed),
        _table(side_by_side(report), "h2"),
        picture(report, alone=False),
        *(_run(run, judged) for run, judged in report.each),
        "</html>\n",
    ]
    return "".join(whole)


def _run(run: Run, judged: Summary) -> str:
    drawn = [_table(part) if isinstance(part, Table) else _element("p", part) for part in parts(run, judged)]
    # A step on the host stands in the picture above where no device was seen.
    timeline = host_timeline(run, judged.phase) if run.observed and run.observed.kernels else ""
    return f"<h2>{escape(run.asked)}</h2><p>{escape(heading(run, judged))}.</p>{''.join(drawn)}{timeline}"


def _table(table: Table, level: str = "h3") -> str:
    numbers = [table.is_number(column) for column in range(len(table.headings))]

    def line(tag: str, cells: list[Words]) -> str:
        return f"<tr>{''.join(_element(tag, *each) for each in zip(cells, numbers, strict=True))}</tr>"

    lines = [line("th", [Words(heading) for heading in table.headings]), *(line("td", [*row]) for row in table.rows)]
    above = f"<{level}>{escape(table.title)}</{level}>" if table.title else ""
    return f'{above}<div class="wide"><table>{"".join(lines)}</table></div>'


def _element(tag: str, words: Words, number: bool = False) -> str:
    classes = " ".join(filter(None, ["n" if number else "", words.style]))
    attribute = f' class="{classes}"' if classes else ""
    return f"<{tag}{attribute}>{escape(words.text)}</{tag}>"
