"""A step as a picture (SVG), a lane for each backend: on the device where a profiler saw it, else on the host.

The same picture stands on the page. As a file it needs nothing else, and may go into a document.
"""

from __future__ import annotations

from collections import defaultdict
from html import escape
from typing import TYPE_CHECKING

from taut.audit.shown import short, title
from taut.audit.verdict import WASTE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from taut.audit.records import Kernel, Run
    from taut.audit.report import Report

WIDTH, LEFT, RIGHT = 1000, 270, 70  # in the picture's own units: whole, names, room for a last number
ROW, LANE, HEADING = 17, 26, 30  # heights
FONT = 'font-family="system-ui, sans-serif"'
KERNEL, WASTED, REST, SCOPE = "#4a7fb5", "#d9534f", "#9aa3ad", "#8882"
KINDS = {"": "", "fills": "fill: ", "copies": "copy: ", "h2d": "upload: ", "d2h": "download: "}
MOST_LANES = 64


class Drawing:
    """Shapes from top to bottom, in lanes along one scale of time.

    Attributes:
        top: where the next one goes.
        shapes: as SVG.
    """

    def __init__(self) -> None:
        self.top = 0.0
        self.shapes: list[str] = []
        self._begin, self._scale = 0.0, 1.0

    def text(self, x: float, words: str, *, size: int = 11, anchor: str = "start", bold: bool = False) -> None:
        """A line of words on the current row."""
        weight = ' font-weight="600"' if bold else ""
        place = f'x="{x:.1f}" y="{self.top + 12:.1f}" font-size="{size}" text-anchor="{anchor}"'
        self.shapes.append(f'<text {place}{weight} fill="currentColor">{escape(words)}</text>')

    def heading(self, words: str, about: str) -> None:
        """What comes next, with a sentence about it."""
        self.top += 8
        self.text(0, words, size=13, bold=True)
        self.top += ROW
        self.text(0, about)
        self.top += HEADING - 8

    def scale(self, begin: float, end: float, right: int = RIGHT) -> None:
        """Which times the lanes that follow run from and to, and how much room they leave behind them."""
        self._begin, self._scale = begin, (WIDTH - LEFT - right) / max(end - begin, 1e-9)

    def name(self, words: str, *, bold: bool = False) -> None:
        """What the current lane is of."""
        self.text(LEFT - 8, words, anchor="end", bold=bold)

    def bar(self, began: float, lasted: float, colour: str, says: str, height: float = ROW) -> None:
        """A bar on the current lane that says more when one points at it."""
        place = f'x="{self._at(began):.1f}" y="{self.top + 2:.1f}"'
        size = f'width="{max(0.6, lasted * self._scale):.1f}" height="{height - 4:.1f}"'
        self.shapes.append(f'<rect {place} {size} fill="{colour}"><title>{escape(says)}</title></rect>')

    def behind(self, ended: float, words: str) -> None:
        """Words behind a bar that ended then."""
        self.text(self._at(ended) + 5, words)

    def _at(self, time: float) -> float:
        return LEFT + (time - self._begin) * self._scale

    def svg(self, *, alone: bool) -> str:
        """All of it, "" where there is nothing; `alone` as a file with a background of its own."""
        if not self.shapes:
            return ""
        margin = 14 if alone else 0
        box = f'viewBox="{-margin} {-margin} {WIDTH + 2 * margin} {self.top + 6 + 2 * margin:.0f}"'
        if not alone:
            return f'<svg {box} role="img" {FONT}>{"".join(self.shapes)}</svg>'
        ground = f'<rect x="{-margin}" y="{-margin}" width="100%" height="100%" fill="#ffffff"/>'
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" {box} width="{WIDTH + 2 * margin}" role="img" color="#1f2937" '
            f"{FONT}>{ground}{''.join(self.shapes)}</svg>\n"
        )


def picture(report: Report, *, alone: bool = True) -> str:
    """The picture of a report with one run or several, `alone` as a file of its own; "" where no step was seen."""
    drawing = Drawing()
    if alone:
        drawing.heading(title(report), f"taut audit {report.taut}")
    if seen := [(run.asked, run.observed) for run in report.runs if run.observed and run.observed.kernels]:
        _layers(drawing, [(asked, device.kernels) for asked, device in seen])
        _steps(drawing, [(asked, [*device.kernels, *device.others]) for asked, device in seen])
    else:
        for run, judged in report.each:
            _host(drawing, run, judged.phase)
    return drawing.svg(alone=alone)


def host_timeline(run: Run, phase: str) -> str:
    """One run's last step as the host ran it, for a page; "" where none was seen."""
    drawing = Drawing()
    _host(drawing, run, phase)
    return drawing.svg(alone=False)


def _layers(drawing: Drawing, runs: Sequence[tuple[str, list[Kernel]]]) -> None:
    """Of each run the layer in the middle, kernel by kernel, with what the host left idle cut out."""
    middle = [_middle_layer(kernels) for _, kernels in runs]
    longest = max(end for _, end in middle)
    if not longest:
        return
    drawing.heading(
        "One layer's attention on the device, in a decode step",
        "Microseconds of each kernel, without the pauses between them. Red: fills and copies.",
    )
    drawing.scale(0, longest)
    for (asked, kernels), (placed, end) in zip(runs, middle, strict=True):
        once = [f"{short(each.name)} {each.microseconds:.1f} µs" for each in kernels if each.scope == "metadata"]
        drawing.text(0, f"{asked}: {end:.1f} µs a layer{'; once a step ' * bool(once)}{', '.join(once)}", bold=True)
        drawing.top += ROW
        for kernel, at in placed:
            drawing.name((KINDS[kernel.kind] + short(kernel.name))[-42:])
            drawing.bar(at, kernel.microseconds, _colour(kernel), f"{kernel.name} {kernel.kind}".strip())
            drawing.behind(at + kernel.microseconds, f"{kernel.microseconds:.1f}")
            drawing.top += ROW
        drawing.top += 6


def _middle_layer(kernels: Sequence[Kernel]) -> tuple[list[tuple[Kernel, float]], float]:
    """Of the layers the one whose time lies in the middle: each kernel and where it begins, and where the last ends."""
    layers: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        if kernel.scope != "metadata":
            layers[kernel.scope].append(kernel)
    packed = sorted((_without_pauses(found) for found in layers.values()), key=lambda each: each[1])
    return packed[len(packed) // 2] if packed else ([], 0.0)


def _without_pauses(kernels: Sequence[Kernel]) -> tuple[list[tuple[Kernel, float]], float]:
    """Kernels that overlap still do: a later one may be launched before the one ahead of it has ended."""
    placed, end, idle = [], 0.0, 0.0
    for kernel in sorted(kernels, key=lambda each: each.began):
        idle += max(0.0, kernel.began - idle - end)
        placed.append((kernel, kernel.began - idle))
        end = max(end, kernel.began - idle + kernel.microseconds)
    return placed, end


def _steps(drawing: Drawing, runs: Sequence[tuple[str, list[Kernel]]]) -> None:
    """A lane for the whole step of each run, as it ran."""
    ends = [max(kernel.began + kernel.microseconds for kernel in kernels) for _, kernels in runs]
    drawing.heading(
        "The whole decode step on the device",
        "Milliseconds, under the profiler and launched one by one: the pauses are the host's. Blue: attention. "
        "Red: its fills and copies. Grey: the rest of the model.",
    )
    drawing.scale(0, max(ends))
    for (asked, kernels), end in zip(runs, ends, strict=True):
        drawing.name(asked, bold=True)
        for kernel in sorted(kernels, key=lambda each: bool(each.scope)):
            says = f"{kernel.scope} {kernel.name} {kernel.microseconds:.1f} µs".strip()
            drawing.bar(kernel.began, kernel.microseconds, _colour(kernel), says, LANE - 4)
        drawing.behind(end, f"{end / 1000:.2f}")
        drawing.top += LANE


def _colour(kernel: Kernel) -> str:
    if not kernel.scope:
        return REST
    return WASTED if kernel.kind else KERNEL


def _host(drawing: Drawing, run: Run, phase: str) -> None:
    """The last step of a phase, as the host ran it: a lane for each scope, with its operations."""
    scopes = next((step.scopes for step in reversed(run.steps) if step.kind == phase and step.scopes), None)
    if scopes is None:
        return
    begin, end = min(scope.began for scope in scopes), max(scope.ended for scope in scopes)
    interpreter = " and that of Triton's interpreter" if run.interpreted else ""
    drawing.heading(
        f"{run.asked}: the last {phase} step on the host",
        f"{(end - begin) / 1000:.2f} ms with the trace's own time{interpreter}. Blue: operations. Red: waste.",
    )
    drawing.scale(begin, end, right=0)
    for scope in scopes[:MOST_LANES]:
        drawing.name(scope.name[-40:])
        drawing.bar(scope.began, scope.ended - scope.began, SCOPE, scope.name)
        for event in scope.events:
            wasted = [kind for kind in WASTE if event.by == "backend" and event.kinds.get(kind)]
            words = f"{event.name} {', '.join(wasted)} {event.through or event.at or ''}".strip()
            drawing.bar(event.began, event.ended - event.began, WASTED if wasted else KERNEL, words)
        drawing.top += ROW
