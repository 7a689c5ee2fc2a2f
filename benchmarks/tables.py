"""Results for people: tables on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from taut.benchmarks.kernels import TOLERANCE
from taut.benchmarks.results import EngineResults, KernelResults, is_ours

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import RenderableType

    from taut.benchmarks.results import About, Compared, EngineRow, Results, Row, Spread


def render(results: Results) -> Group:
    """All tables of a file of results."""
    return render_kernels(results) if isinstance(results, KernelResults) else render_engines(results)


def render_kernels(results: KernelResults) -> Group:
    """A table for each operation, then how much faster ours is than each peer, and what was left out."""
    ceilings = results.ceilings
    parts: list[RenderableType] = [
        Text(_where(results.about), style="bold"),
        Text(
            f"measured at most {ceilings.bytes_per_second / 1e12:.2f} TB/s and "
            f"{ceilings.flops_per_second / 1e12:.0f} TFLOP/s"
        ),
    ]
    parts += [_operation(results, name) for name in dict.fromkeys(row.operation for row in results.rows)]
    for peer, ratio in results.speed_ups().items():
        parts.append(Text(f"taut to {peer}: {ratio:.2f} times as fast (geometric mean over the rows of both)"))
    reasons = {f"{name}: {why}" for row in results.rows for name, why in row.left_out.items()}
    parts += [Text(f"left out in some rows: {reason}", style="yellow") for reason in sorted(reasons)]
    return Group(*parts)


def _operation(results: KernelResults, operation: str) -> Group:
    rows = [row for row in results.rows if row.operation == operation]
    axes = list(rows[0].shape)
    varying = [name for name in axes if len({row.shape[name] for row in rows}) > 1]
    fixed = " ".join(f"{name}={rows[0].shape[name]}" for name in axes if name not in varying)
    names = list(dict.fromkeys(name for row in rows for name in row.us))
    peers, ours = [n for n in names if not is_ours(n)], [n for n in names if is_ours(n)]
    title = f"{operation}{', ' + fixed if fixed else ''}: microseconds"
    columns = [[heading, *cells] for heading, cells in _columns(results, rows, [*varying], peers + ours)]
    return numbers_table(title, columns)


def _columns(
    results: KernelResults, rows: Sequence[Row], axes: Sequence[str], names: Sequence[str]
) -> Iterator[tuple[Text, list[Text]]]:
    """Headings and cells; what no row has is left out."""
    for axis in axes:
        yield Text(axis), [Text(str(row.shape[axis])) for row in rows]
    for name in names:
        yield Text(name), [_time(row, name) for row in rows]
    for i, heading in enumerate(("to best", "of floor", "rate")):
        cells = [Text(_rates(results, row)[i]) for row in rows]
        if any(cell.plain != "-" for cell in cells):
            yield Text(heading), cells


def numbers_table(title: str, columns: Sequence[Sequence[Text]], left: int = 0) -> Group:
    """A table of numbers that are never cut; the first `left` columns are words.

    Args:
        title: above it.
        columns: each a heading and its cells.
        left: how many columns stand on the left.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for place, (heading, *cells) in enumerate(columns):
        width = max(len(cell.plain) for cell in cells)
        table.add_column(heading, justify="left" if place < left else "right", overflow="fold", min_width=width)
    for line in zip(*(column[1:] for column in columns), strict=True):
        table.add_row(*line)
    return Group(Text(title, style="bold"), table)


def _time(row: Row, name: str) -> Text:
    """A time; struck out in red where the numbers are wrong."""
    if name not in row.us:
        return Text("-", style="dim")
    wrong = row.errors.get(name, 0.0) > TOLERANCE
    text = f"{row.us[name]:.1f}" + (" WRONG" if wrong else "")
    return Text(text, style="bold red" if wrong else "bold" if is_ours(name) else "")


def _rates(results: KernelResults, row: Row) -> tuple[str, str, str]:
    """Ours to the best peer, the fraction of the floor, and the rate of what the floor is made of."""
    ours, floor = row.ours(), results.floor(row)
    if ours is None:
        return "-", "-", "-"
    best = min(row.peers().values(), default=None)
    to_best = "-" if best is None else f"{ours / best:.2f}"
    if floor is None:
        return to_best, "-", "-"
    moved = row.bytes / results.ceilings.bytes_per_second >= row.flops / results.ceilings.flops_per_second
    rate = f"{row.bytes / ours / 1e6:.2f} TB/s" if moved else f"{row.flops / ours / 1e6:.0f} TF/s"
    return to_best, f"{floor / ours:.0%}", rate


def render_engines(results: EngineResults) -> Group:
    """A table for each engine and model, with a line for each backend and load."""
    return Group(Text(_where(results.about), style="bold"), *engine_tables(results.rows))


def engine_tables(rows: Sequence[EngineRow]) -> list[Group]:
    """Throughput, latencies in milliseconds of the median run that counts, and what was said of memory."""
    tables = []
    for engine, model in dict.fromkeys((row.engine, row.model) for row in rows):
        of_model = [row for row in rows if (row.engine, row.model) == (engine, model)]
        lines = [
            (
                load.name,
                Text(row.backend, style="bold" if is_ours(row.backend) else ""),
                f"{load.tokens_per_second:.0f}",
                f"{load.counted.seconds:.3f}",
                *_spread(load.counted.first_token_ms),
                *_spread(load.counted.between_tokens_ms),
            )
            for row in of_model
            for load in row.loads
        ]
        lines.sort(key=lambda line: line[0])
        headings = (
            "load", "backend", "tokens/s", "seconds", "first token ms p50", "p99", "between tokens ms p50", "p99",
        )  # fmt: skip
        cells = [
            [c if isinstance(c, Text) else Text(c) for c in column] for column in zip(headings, *lines, strict=True)
        ]
        memory = [Text(f"{row.backend}: {', '.join(row.kv_cache)}") for row in of_model if row.kv_cache]
        tables.append(Group(numbers_table(f"{engine}, {model}", cells, left=2), *memory))
    return tables


def _spread(times: Spread | None) -> tuple[str, str]:
    return ("-", "-") if times is None else (f"{times.p50:.1f}", f"{times.p99:.1f}")


def render_comparison(pairs: Sequence[Compared], about: About) -> Group:
    """Before, after, and how many times faster."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("row", overflow="fold")
    for heading in ("before", "after", "", "times as fast"):
        table.add_column(heading, justify="right", no_wrap=True)
    for pair in pairs:
        style = "red" if pair.faster < 0.98 else "green" if pair.faster > 1.02 else ""
        ratio = Text(f"{pair.faster:.2f}", style=style)
        table.add_row(Text(pair.what), f"{pair.before:.1f}", f"{pair.after:.1f}", pair.unit, ratio)
    return Group(Text(_where(about), style="bold"), table)


def _where(about: About) -> str:
    packages = ", ".join(f"{name} {release}" for name, release in about.packages.items())
    return f"{about.gpu} ({about.target}), {about.date}: {packages}"
