"""A decode step as a picture (SVG), a lane for each backend: on the device where a profiler saw it, else on the host.

The same picture stands on the page. As a file it needs nothing else, and may go into a document.
"""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING, Any

from taut.audit.verdict import WASTE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

WIDTH, LEFT, RIGHT = 1000, 270, 70  # in the picture's own units: whole, names, room for a last number
ROW, LANE, HEADING = 17, 26, 30  # heights
FONT = 'font-family="system-ui, sans-serif"'
KERNEL, WASTED, REST, SCOPE = "#4a7fb5", "#d9534f", "#9aa3ad", "#8882"
KINDS = {"": "", "fills": "fill:", "copies": "copy:", "h2d": "upload:", "d2h": "download:"}
MOST_LANES = 64


class Drawing:
    """Shapes from top to bottom.

    Attributes:
        top: where the next one goes.
        shapes: as SVG.
    """

    def __init__(self) -> None:
        self.top = 0.0
        self.shapes: list[str] = []

    def text(self, x: float, words: str, *, size: int = 11, anchor: str = "start", bold: bool = False) -> None:
        """A line of words on the current row."""
        weight = ' font-weight="600"' if bold else ""
        place = f'x="{x:.1f}" y="{self.top + 12:.1f}" font-size="{size}" text-anchor="{anchor}"'
        self.shapes.append(f'<text {place}{weight} fill="currentColor">{escape(words)}</text>')

    def bar(self, x: float, width: float, height: float, colour: str, title: str) -> None:
        """A bar on the current row that says more when one points at it."""
        place = f'x="{x:.1f}" y="{self.top + 2:.1f}" width="{max(0.6, width):.1f}" height="{height - 4:.1f}"'
        self.shapes.append(f'<rect {place} fill="{colour}"><title>{escape(title)}</title></rect>')

    def heading(self, words: str, about: str) -> None:
        """What comes next, with a sentence about it."""
        self.top += 8
        self.text(0, words, size=13, bold=True)
        self.top += ROW
        self.text(0, about)
        self.top += HEADING - 8

    def svg(self, *, alone: bool) -> str:
        """All of it; `alone` as a file with a background of its own."""
        height = self.top + 6
        margin = 14 if alone else 0
        box = f'viewBox="{-margin} {-margin} {WIDTH + 2 * margin} {height + 2 * margin:.0f}"'
        if not alone:
            return f'<svg {box} role="img" {FONT}>{"".join(self.shapes)}</svg>'
        behind = f'<rect x="{-margin}" y="{-margin}" width="100%" height="100%" fill="#ffffff"/>'
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" {box} width="{WIDTH + 2 * margin}" role="img" color="#1f2937" '
            f"{FONT}>{behind}{''.join(self.shapes)}</svg>\n"
        )


def picture(report: Mapping[str, Any], *, alone: bool = True) -> str:
    """The picture of a report, as `taut audit --json` prints it; "" where no step was seen.

    Args:
        report: with one run or several.
        alone: whether it becomes a file of its own.
    """
    drawing, runs = Drawing(), report["runs"]
    if alone:
        work = report["work"]
        words = f"{work['model']}, {work['rows']} rows of up to {work['context']} tokens, in "
        drawing.heading(words + served(runs), f"taut audit {report['taut']}")
    observed = [run for run in runs if run["observed"] and run["observed"]["kernels"]]
    if observed:
        _layers(drawing, observed)
        _steps(drawing, observed)
    else:
        for run in runs:
            _host(drawing, run)
    return drawing.svg(alone=alone) if drawing.shapes else ""


def host_timeline(run: Mapping[str, Any]) -> str:
    """One run's last step as the host ran it, for a page; "" where none was seen."""
    drawing = Drawing()
    _host(drawing, run)
    return drawing.svg(alone=False) if drawing.shapes else ""


def served(runs: Sequence[Mapping[str, Any]]) -> str:
    """Which engines and devices these runs were on, in words."""
    return ", ".join(dict.fromkeys(f"{run['engine']} {run['release']} on {run['device']}" for run in runs))


def short(name: str) -> str:
    """A kernel's name without its namespaces, arguments and result, which C++ writes around it."""
    if name.startswith("Mem"):  # "Memcpy HtoD (Pageable -> Device)", as the profiler calls what is no kernel
        return name.partition(" (")[0]
    bare = name.replace("(anonymous namespace)::", "")
    found = re.match(r"(?:void |[\w:]+ )?(?:\w+::)*(\w+)\s*[<(]", bare)
    return found[1] if found else bare


def _layers(drawing: Drawing, runs: Sequence[Mapping[str, Any]]) -> None:
    """Of each run the layer in the middle, kernel by kernel, with what the host left idle cut out."""
    middle = [_middle_layer(run["observed"]["kernels"]) for run in runs]
    longest = max((end for _, end in middle), default=0.0)
    if not longest:
        return
    drawing.heading(
        "One layer's attention on the device, in a decode step",
        "Microseconds of each kernel, without the pauses between them. Red: fills and copies.",
    )
    scale = (WIDTH - LEFT - RIGHT) / longest
    for run, (kernels, end) in zip(runs, middle, strict=True):
        drawing.text(0, f"{run['asked']}: {end:.1f} µs a layer{_once_a_step(run['observed']['kernels'])}", bold=True)
        drawing.top += ROW
        for kernel, at in kernels:
            drawing.text(LEFT - 8, " ".join([KINDS[kernel["kind"]], short(kernel["name"])]).strip()[-42:], anchor="end")
            words = f"{kernel['name']} {kernel['kind']}".strip()
            drawing.bar(LEFT + at * scale, kernel["microseconds"] * scale, ROW, _colour(kernel), words)
            drawing.text(LEFT + (at + kernel["microseconds"]) * scale + 5, f"{kernel['microseconds']:.1f}")
            drawing.top += ROW
        drawing.top += 6


def _middle_layer(kernels: Sequence[Mapping[str, Any]]) -> tuple[list[tuple[Mapping[str, Any], float]], float]:
    """Of the layers the one whose time lies in the middle: each kernel and where it begins, and where the last ends."""
    layers: dict[str, list[Mapping[str, Any]]] = {}
    for kernel in kernels:
        if kernel["scope"] != "metadata":
            layers.setdefault(kernel["scope"], []).append(kernel)
    packed = sorted((_without_pauses(found) for found in layers.values()), key=lambda each: each[1])
    return packed[len(packed) // 2] if packed else ([], 0.0)


def _without_pauses(kernels: Sequence[Mapping[str, Any]]) -> tuple[list[tuple[Mapping[str, Any], float]], float]:
    """Kernels that overlap still do: a later one may be launched before the one ahead of it has ended."""
    placed, end, idle = [], 0.0, 0.0
    for kernel in sorted(kernels, key=lambda each: float(each["began"])):
        idle += max(0.0, kernel["began"] - idle - end)
        placed.append((kernel, kernel["began"] - idle))
        end = max(end, kernel["began"] - idle + kernel["microseconds"])
    return placed, end


def _once_a_step(kernels: Sequence[Mapping[str, Any]]) -> str:
    metadata = [
        f"{short(each['name'])} {each['microseconds']:.1f} µs" for each in kernels if each["scope"] == "metadata"
    ]
    return f"; once a step {', '.join(metadata)}" if metadata else ""


def _steps(drawing: Drawing, runs: Sequence[Mapping[str, Any]]) -> None:
    """A lane for the whole step of each run, as it ran."""
    every = [[*run["observed"]["kernels"], *run["observed"]["others"]] for run in runs]
    longest = max(kernel["began"] + kernel["microseconds"] for kernels in every for kernel in kernels)
    scale = (WIDTH - LEFT - RIGHT) / longest
    drawing.heading(
        "The whole decode step on the device",
        "Milliseconds, under the profiler and launched one by one: the pauses are the host's. Blue: attention. "
        "Red: its fills and copies. Grey: the rest of the model.",
    )
    for run, kernels in zip(runs, every, strict=True):
        drawing.text(LEFT - 8, run["asked"], anchor="end", bold=True)
        for kernel in sorted(kernels, key=lambda each: bool(each["scope"])):
            words = f"{kernel['scope']} {kernel['name']} {kernel['microseconds']:.1f} µs".strip()
            drawing.bar(
                LEFT + kernel["began"] * scale, kernel["microseconds"] * scale, LANE - 4, _colour(kernel), words
            )
        end = max(kernel["began"] + kernel["microseconds"] for kernel in kernels)
        drawing.text(LEFT + end * scale + 5, f"{end / 1000:.2f}")
        drawing.top += LANE


def _colour(kernel: Mapping[str, Any]) -> str:
    if not kernel["scope"]:
        return REST
    return WASTED if kernel["kind"] else KERNEL


def _host(drawing: Drawing, run: Mapping[str, Any]) -> None:
    """The last step of the phase that is shown, as the host ran it: a lane for each scope, with its operations."""
    phase = run["summary"]["phase"]
    shown = [step["scopes"] for step in run["steps"] if step["kind"] == phase and step.get("scopes")]
    if not shown:
        return
    scopes = shown[-1]
    begin, end = min(scope["began"] for scope in scopes), max(scope["ended"] for scope in scopes)
    scale = (WIDTH - LEFT) / max(end - begin, 1e-9)
    interpreter = " and that of Triton's interpreter" if run["interpreted"] else ""
    drawing.heading(
        f"{run['asked']}: the last {phase} step on the host",
        f"{(end - begin) / 1000:.2f} ms with the trace's own time{interpreter}. Blue: operations. Red: waste.",
    )
    for scope in scopes[:MOST_LANES]:
        drawing.text(LEFT - 8, scope["name"][-40:], anchor="end")
        _host_bar(drawing, scope, begin, scale, SCOPE, scope["name"])
        for event in scope["events"]:
            wasted = [kind for kind in WASTE if event["by"] == "backend" and event["kinds"].get(kind)]
            place = event["through"] or event["at"]
            where = f"{place['file']}:{place['line']}" if place else ""
            words = f"{event['name']} {', '.join(wasted)} {where}".strip()
            _host_bar(drawing, event, begin, scale, WASTED if wasted else KERNEL, words)
        drawing.top += ROW


def _host_bar(drawing: Drawing, thing: Mapping[str, Any], begin: float, scale: float, colour: str, title: str) -> None:
    left, width = LEFT + (thing["began"] - begin) * scale, (thing["ended"] - thing["began"]) * scale
    drawing.bar(left, width, ROW, colour, title)
