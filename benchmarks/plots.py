"""Results as pictures: the roofline, latency over context, speed-ups, and whole engines. Needs matplotlib, but no GPU.

Drawn on a canvas of their own, without matplotlib's global state; the same results give the same file.
"""

from __future__ import annotations

import contextlib
import importlib.util
from typing import TYPE_CHECKING, Any

from taut.benchmarks import BenchmarkError
from taut.benchmarks.operations import OPERATIONS
from taut.benchmarks.results import EngineResults, KernelResults, is_ours

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from taut.benchmarks.results import Results, Row

OUR_COLOURS = ("#c2410c", "#f59e0b", "#7f1d1d")  # of our providers, where there are several
PEER_COLOURS = ("#1d4ed8", "#0f766e", "#7c3aed", "#64748b", "#a16207", "#be185d")  # told apart in grey too
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
FLOOR = "#94a3b8"
FORMATS = ("svg", "png")


def draw(results: Sequence[Results], folder: Path, form: str = "svg") -> list[Path]:
    """Every picture that these results have numbers for.

    Args:
        results: of one GPU.
        folder: where the pictures go.
        form: "svg" or "png".

    Returns:
        the files: roofline, latency, speedup, engines, each with the format's ending.

    Raises:
        BenchmarkError: they are of several GPUs, or matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchmarkError("pictures need matplotlib, which is missing here: pip install 'taut-attention[bench]'")
    if form not in FORMATS:
        raise BenchmarkError(f"{form} is no format of pictures here: there are {', '.join(FORMATS)}")
    gpus = sorted({one.about.gpu for one in results})
    if len(gpus) > 1:
        raise BenchmarkError(f"these results are of {' and '.join(gpus)}: draw those of one GPU at a time")
    kernels = [one for one in results if isinstance(one, KernelResults)]
    engines = [one for one in results if isinstance(one, EngineResults)]
    pictures: dict[str, Callable[[], Figure | None]] = {
        "roofline": lambda: roofline(kernels),
        "latency": lambda: latency(kernels),
        "speedup": lambda: speed_up(kernels),
        "engines": lambda: throughput(engines),
    }
    files = []
    with _style():
        for name, make in pictures.items():
            figure = make()
            if figure is None:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"{name}.{form}"
            _settle(figure)
            figure.savefig(file, metadata={"Date": None} if form == "svg" else {"Software": None}, dpi=150)
            files.append(file)
    return files


@contextlib.contextmanager
def _style() -> Iterator[None]:
    from matplotlib import rc_context

    settings: Any = {
        "svg.hashsalt": "taut", "svg.fonttype": "path", "font.size": 9, "axes.spines.top": False,
        "axes.spines.right": False, "axes.grid": True, "grid.color": "#e5e7eb", "grid.linewidth": 0.6,
        "axes.axisbelow": True, "axes.titlesize": 9, "axes.titleweight": "bold", "legend.frameon": False,
        "figure.facecolor": "white", "savefig.facecolor": "white",
    }  # fmt: skip
    with rc_context(settings):
        yield


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _settle(figure: Figure) -> None:
    """Keep axes where the layout puts them, rounded: its solver's last digits change from drawing to drawing."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        left, bottom, width, height = (round(number, 5) for number in axes.get_position().bounds)
        axes.set_position((left, bottom, width, height))


def _names(kernels: Sequence[KernelResults]) -> list[str]:
    """Whose times there are: ours first, then peers in the order of their appearance."""
    found = dict.fromkeys(name for one in kernels for row in one.rows for name in row.us)
    return sorted(found, key=lambda name: not is_ours(name))


def _colours(names: Sequence[str]) -> dict[str, str]:
    colours: dict[str, str] = {}
    for palette, wanted in ((OUR_COLOURS, True), (PEER_COLOURS, False)):
        mine = [name for name in names if is_ours(name) == wanted]
        colours |= {name: palette[i % len(palette)] for i, name in enumerate(mine)}
    return colours


def _title(results: Sequence[KernelResults] | Sequence[EngineResults], what: str) -> str:
    """What is drawn, where it was measured, with which releases and when; the files are of one GPU."""
    releases = dict.fromkeys(found for one in results for found in one.about.packages.items())
    packages = ", ".join(f"{name} {release}" for name, release in releases if name != "taut-attention")
    dates = ", ".join(sorted({one.about.date for one in results}))
    return f"{what}: {results[0].about.gpu}, {packages}, {dates}"


def roofline(kernels: Sequence[KernelResults]) -> Figure | None:
    """Every row's rate over its intensity, under the measured roof; ours filled, peers hollow. None without any."""
    rows = [row for one in kernels for row in one.rows if row.bytes and row.flops and row.us]
    if not rows:
        return None
    bandwidth = max(one.ceilings.bytes_per_second for one in kernels)
    rate = max(one.ceilings.flops_per_second for one in kernels)
    names = _names(kernels)
    colours = _colours(names)
    operations = list(dict.fromkeys(row.operation for row in rows))
    figure = _figure(8, 5)
    axes = figure.add_subplot()
    low = min(row.flops / row.bytes for row in rows) / 2
    high = max(row.flops / row.bytes for row in rows) * 2
    ridge = rate / bandwidth
    xs = sorted({low, high, min(max(ridge, low), high)})
    axes.plot(xs, [min(x * bandwidth, rate) / 1e12 for x in xs], color="black", linewidth=1.2, zorder=1)
    middle = (low * min(ridge, high)) ** 0.5
    axes.annotate(
        f"{bandwidth / 1e12:.2f} TB/s", (middle, middle * bandwidth / 1e12), (-6, 6), textcoords="offset points",
        ha="right", fontsize=8,
    )  # fmt: skip
    axes.annotate(f"{rate / 1e12:.0f} TFLOP/s", (high / 1.1, rate / 1e12), ha="right", va="bottom", fontsize=8)
    for row in rows:
        marker = MARKERS[operations.index(row.operation) % len(MARKERS)]
        for name, us in row.us.items():
            ours = is_ours(name)
            axes.plot(
                row.flops / row.bytes, row.flops / us / 1e6, marker=marker, markersize=7 if ours else 6, linestyle="",
                color=colours[name], markerfacecolor=colours[name] if ours else "none", zorder=3 if ours else 2,
            )  # fmt: skip
    for name in names:
        axes.plot([], [], marker="o", linestyle="", color=colours[name], label=name,
                  markerfacecolor=colours[name] if is_ours(name) else "none")  # fmt: skip
    for i, operation in enumerate(operations):
        axes.plot([], [], marker=MARKERS[i % len(MARKERS)], linestyle="", color="black", label=operation)
    axes.set(xscale="log", yscale="log", xlabel="products and sums per byte", ylabel="TFLOP/s")
    axes.set_title(_title(kernels, "Roofline"), loc="left")
    axes.legend(loc="lower right", fontsize=8, ncols=2)
    return figure


def latency(kernels: Sequence[KernelResults]) -> Figure | None:
    """Time over context, a panel for each shape that was measured at several contexts; None if there is none."""
    groups: dict[tuple[str, tuple[tuple[str, int], ...]], list[tuple[KernelResults, Row]]] = {}
    for one in kernels:
        for row in one.rows:
            if "context" in row.shape and row.us and row.bytes:
                rest = tuple((name, number) for name, number in row.shape.items() if name != "context")
                groups.setdefault((row.operation, rest), []).append((one, row))
    panels = {key: rows for key, rows in groups.items() if len({row.shape["context"] for _, row in rows}) > 1}
    if not panels:
        return None
    names = _names(kernels)
    colours = _colours(names)
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = _figure(3.6 * columns, 3.0 * lines + 0.6)
    for place, ((operation, rest), rows) in enumerate(panels.items()):
        axes = figure.add_subplot(lines, columns, place + 1)
        rows.sort(key=lambda pair: pair[1].shape["context"])
        contexts = [row.shape["context"] for _, row in rows]
        axes.plot(contexts, [one.floor(row) or 0.0 for one, row in rows], color=FLOOR, linestyle="--", label="floor")
        for name in names:
            points = [(row.shape["context"], row.us[name]) for _, row in rows if name in row.us]
            if points:
                width = 2.2 if is_ours(name) else 1.2
                axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colours[name], linewidth=width,
                          label=name, zorder=3 if is_ours(name) else 2)  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="cached tokens")
        axes.set_xticks(contexts, [_short(context) for context in contexts])
        axes.minorticks_off()
        axes.set_title(_shape_title(operation, dict(rest)), loc="left")
        if place % columns == 0:
            axes.set_ylabel("microseconds")
        axes.legend(fontsize=7)
    figure.suptitle(_title(kernels, "Latency over context"), x=0.01, ha="left", fontsize=9)
    return figure


def speed_up(kernels: Sequence[KernelResults]) -> Figure | None:
    """For each row how many times faster the faster of ours is than each peer; None without peers."""
    rows = [row for one in kernels for row in one.rows if row.ours() and row.peers()]
    if not rows:
        return None
    mine = [name for name in _names(kernels) if is_ours(name)]
    colours = _colours([name for name in _names(kernels) if not is_ours(name)])
    operations = list(dict.fromkeys(row.operation for row in rows))
    counts = [sum(row.operation == operation for row in rows) for operation in operations]
    figure = _figure(9, 1.2 + 0.9 * len(operations) + 0.3 * len(rows))
    grid = figure.add_gridspec(len(operations), 1, height_ratios=[count + 1.2 for count in counts])
    ratios = [us / (row.ours() or us) for row in rows for us in row.peers().values()]
    lowest, highest = min(1.0, *ratios), max(1.0, *ratios)
    for place, operation in enumerate(operations):
        axes = figure.add_subplot(grid[place])
        _bars(axes, [row for row in rows if row.operation == operation], colours)
        axes.set(xscale="log", xlim=(lowest / 1.4, highest * 1.4))
        ticks = [2.0**i for i in range(-6, 10) if lowest / 1.4 <= 2.0**i <= highest * 1.4]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_title(operation, loc="left")
    axes.set_xlabel("times as fast as the peer (above 1: taut is faster)")
    what = "taut beside each peer" if len(mine) < 2 else f"the faster of {' and '.join(mine)} beside each peer"
    figure.suptitle(_title(kernels, what), x=0.01, ha="left", fontsize=9)
    return figure


def _bars(axes: Axes, rows: Sequence[Row], colours: dict[str, str]) -> None:
    peers = [name for name in colours if any(name in row.us for row in rows)]
    height = 0.8 / len(peers)
    for i, peer in enumerate(peers):
        at = [(y, row.us[peer] / (row.ours() or 1)) for y, row in enumerate(rows) if peer in row.us]
        places = [y + (i - (len(peers) - 1) / 2) * height for y, _ in at]
        ratios = [ratio for _, ratio in at]
        axes.barh(places, [ratio - 1 for ratio in ratios], height, left=1, color=colours[peer], label=peer)
        for y, ratio in zip(places, ratios, strict=True):
            right = ratio >= 1
            axes.annotate(
                f"{ratio:.2f}", (ratio, y), (3 if right else -3, 0), textcoords="offset points", va="center",
                ha="left" if right else "right", fontsize=6,
            )  # fmt: skip
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [_row_name(row, rows) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(peers), fontsize=7, borderpad=0)


def throughput(engines: Sequence[EngineResults]) -> Figure | None:
    """Tokens a second of each backend, a panel for each engine, model and load that several served; None without."""
    panels: dict[tuple[str, str, str], dict[str, float]] = {}
    for one in engines:
        for row in one.rows:
            for load in row.loads:
                panels.setdefault((row.engine, row.model, load.name), {})[row.backend] = load.tokens_per_second
    panels = {key: speeds for key, speeds in panels.items() if len(speeds) > 1}
    if not panels:
        return None
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    most = max(len(speeds) for speeds in panels.values())
    figure = _figure(4.2 * columns, (0.9 + 0.32 * most) * lines + 0.4)
    for place, ((engine, model, name), speeds) in enumerate(panels.items()):
        axes = figure.add_subplot(lines, columns, place + 1)
        colours = [OUR_COLOURS[0] if is_ours(name) else FLOOR for name in speeds]
        bars = axes.barh(range(len(speeds)), list(speeds.values()), color=colours, height=0.6)
        axes.bar_label(bars, [f"{speed:.0f}" for speed in speeds.values()], padding=3, fontsize=8)
        axes.set_yticks(range(len(speeds)), list(speeds))
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("tokens/s")
        axes.set_title(f"{engine}, {model}, {name}", loc="left")
    figure.suptitle(_title(engines, "Whole engines"), x=0.01, ha="left", fontsize=9)
    return figure


def _shape_title(operation: str, shape: dict[str, int]) -> str:
    usual = OPERATIONS[operation].axes if operation in OPERATIONS else {}
    first = next(iter(shape), None)
    telling = [name for name, number in shape.items() if name in (first, "rows") or usual.get(name) != number]
    return f"{operation}\n" + " ".join(f"{name}={_short(shape[name])}" for name in telling)


def _row_name(row: Row, among: Sequence[Row]) -> str:
    """What tells a row apart from the others."""
    varying = [name for name in row.shape if len({other.shape.get(name) for other in among}) > 1]
    return " ".join(f"{name}={_short(row.shape[name])}" for name in varying) or row.operation


def _short(number: int) -> str:
    return f"{number // 1024}k" if number >= 1024 and number % 1024 == 0 else str(number)
