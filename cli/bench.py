"""`taut bench`: kernels beside their peers, whole engines, and the results as tables, comparisons and pictures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from taut.benchmarks import BenchmarkError
from taut.benchmarks.operations import OPERATIONS, describe, operation_named

if TYPE_CHECKING:
    from taut.benchmarks.kernels import Grid
    from taut.benchmarks.results import KernelResults, Results

app = typer.Typer(help="Measure kernels and engines, ours beside their peers; show, compare and draw the results.")

AsJson = Annotated[bool, typer.Option("--json", help="Print the results as JSON instead of tables.")]
SavedAs = Annotated[Path | None, typer.Option("--output", "-o", help="Keep the results in this file (JSON).")]


def progress() -> Progress:
    """The progress of a measurement, on standard error, gone when it is done."""
    return Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip


@app.command("kernels")
def kernels(
    operations: Annotated[
        list[str] | None, typer.Argument(help=f"Which: {', '.join(OPERATIONS)}; all if none is named.")
    ] = None,
    grid: Annotated[
        str,
        typer.Option(help="Shapes of one operation, 'heads=16,128 rows=1..64 context=4k,32k'; else the usual ones."),
    ] = "",
    provider: Annotated[
        list[str] | None, typer.Option("--kernels", help="Our kernel provider; several are measured side by side.")
    ] = None,
    table: Annotated[Path | None, typer.Option(help="A tile table in place of the packaged one.")] = None,
    peers: Annotated[bool, typer.Option(help="Measure the kernels of installed engines beside ours.")] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the rows and what each must move; needs no GPU.")
    ] = False,
    output: SavedAs = None,
    as_data: AsJson = False,
) -> None:
    """Measure operations on the GPU: ours, the peers installed here, the floor, and the fraction of it.

    Examples: taut bench kernels -o kernels.json | taut bench kernels mla_decode | taut bench kernels --dry-run |
    taut bench kernels paged_decode --grid "q_heads=32 rows=1,64 context=1k..128k"

    Exit status 1 if one of our kernels gives wrong numbers.
    """
    grids = _grids(operations or list(OPERATIONS), grid)
    check_output(output)
    if dry_run:
        _dry_run(grids, as_data=as_data)
        return
    results, wrong = _measure(grids, provider or ["auto"], table, with_peers=peers)
    _keep_and_show(results, output, as_data=as_data)
    for name in wrong:
        typer.echo(f"taut: wrong numbers: {name}", err=True)
    if wrong:
        raise typer.Exit(1)


def wide_console() -> Console:
    """As wide as the terminal; into a file or a pipe wide enough for every column."""
    return Console() if Console().is_terminal else Console(width=140)


def check_output(file: Path | None) -> None:
    """Refuse a place that cannot be written, before anything is measured.

    Raises:
        BenchmarkError: its folder is missing or not ours to write in, or it is a folder itself.
    """
    if file is None:
        return
    if file.is_dir():
        raise BenchmarkError(f"{file} is a folder: name the file to keep the results in")
    if not file.absolute().parent.is_dir() or not os.access(file.absolute().parent, os.W_OK):
        raise BenchmarkError(f"{file} cannot be written: its folder is missing or not writable")


def _grids(operations: list[str], grid: str) -> list[Grid]:
    from taut.benchmarks.kernels import Grid

    if grid and len(operations) != 1:
        raise BenchmarkError(
            "--grid is of one operation, since each has its own axes: taut bench kernels merge --grid ..."
        )
    return [Grid(operation_named(name), operation_named(name).shapes(grid)) for name in dict.fromkeys(operations)]


def _dry_run(grids: list[Grid], *, as_data: bool) -> None:
    rows: list[dict[str, Any]] = [
        {
            "operation": grid.operation.name,
            "shape": shape,
            "bytes": grid.operation.traffic(shape) if grid.operation.traffic else 0,
            "flops": grid.operation.work(shape),
        }
        for grid in grids
        for shape in grid.shapes
    ]
    if as_data:
        typer.echo(json.dumps(rows, indent=1))
        return
    table = Table("operation", "shape", "MB", "GFLOP", title=f"{len(rows)} rows", title_justify="left")
    for row in rows:
        table.add_row(
            row["operation"], describe(row["shape"]), f"{row['bytes'] / 1e6:.2f}", f"{row['flops'] / 1e9:.2f}"
        )
    Console().print(table)


def _measure(
    grids: list[Grid], providers: list[str], table: Path | None, *, with_peers: bool
) -> tuple[KernelResults, list[str]]:
    try:
        import torch
    except ModuleNotFoundError:
        raise BenchmarkError("measuring needs torch, which is missing here; --dry-run shows the rows") from None
    from taut.benchmarks import timing
    from taut.benchmarks.kernels import Bench, check_providers, wrong_rows
    from taut.benchmarks.peers import peers_for, projects
    from taut.benchmarks.results import KernelResults
    from taut.common_kernels.tiles import read_table

    check_providers(providers)
    if table:
        read_table(table)  # before anything is measured
    timing.need_gpu("taut bench kernels")
    said = Console(stderr=True)
    if with_peers:
        absent = [name for name, here in projects().items() if not here]
        said.print(f"not installed, so not measured: {', '.join(absent)}" if absent else "every peer is installed")
    torch.manual_seed(0)
    time = timing.microseconds
    bench = Bench("cuda:0", time, peers_for if with_peers else lambda _: (), providers, str(table) if table else None)
    rows = []
    with progress() as bar:
        task = bar.add_task("what the GPU can do at most", total=sum(len(grid.shapes) for grid in grids))
        ceilings = timing.measure_ceilings()
        for grid in grids:
            for shape in grid.shapes:
                bar.update(task, description=f"{grid.operation.name} {describe(shape)}")
                rows.append(bench.row(grid.operation, shape))
                bar.advance(task)
    results = KernelResults(about=timing.about(), ceilings=ceilings, rows=rows)
    return results, [row.name for row in wrong_rows(rows)]


@app.command("engines")
def engines(
    engine: Annotated[str, typer.Argument(help="vllm or sglang.")],
    model: Annotated[str, typer.Argument(help="llama or deepseek (shapes with made-up weights), or a model's folder.")],
    backends: Annotated[
        list[str] | None, typer.Argument(help="The engine's names of backends, 'stock' for its own choice, and 'taut'.")
    ] = None,
    load: Annotated[
        list[str] | None, typer.Option(help="Requests x tokens in / tokens out, 8x512/256; may be given several times.")
    ] = None,
    runs: Annotated[
        int, typer.Option(min=1, help="Of each load in each process; the first of several does not count.")
    ] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Processes of each backend, all backends in turn.")] = 1,
    options: Annotated[str, typer.Option(help="Further arguments of the engine, as a JSON object.")] = "{}",
    patience: Annotated[float, typer.Option(min=1, help="Seconds that a process may take.")] = 1800,
    output: SavedAs = None,
    as_data: AsJson = False,
) -> None:
    """Serve loads with whole engines: tokens/s, time to the first token and between tokens, stock and ours in turn.

    Examples: taut bench engines vllm llama | taut bench engines sglang FOLDER triton taut --load 4x1000/100 |
    taut bench engines vllm deepseek FLASH_ATTN_MLA TRITON_MLA taut --rounds 3 -o deepseek.json

    On a machine without a GPU the engines for CPUs are used, with a tiny load unless another is asked for. Where a
    backend fails the others are measured all the same, and kept.
    """
    from taut.benchmarks.engines import LOADS, ON_A_CPU, EngineFailedError, Plan, parse_load, run
    from taut.benchmarks.models import model_named
    from taut.benchmarks.results import EngineResults
    from taut.benchmarks.tables import engine_tables

    check_output(output)
    on_gpu = _on_gpu()
    plan = Plan(
        engine, model_named(model), backends or ["stock", "taut"],
        [parse_load(text) for text in load or (LOADS if on_gpu else ON_A_CPU)], runs, rounds, _object(options), on_gpu,
        patience,
    )  # fmt: skip
    said = Console(stderr=True)
    rows = {}
    failure = None
    try:
        with said.status("starting") as status:
            for row in run(plan, lambda words: status.update(words)):
                rows[row.backend] = row
                said.print(*engine_tables([row]))
    except EngineFailedError as error:
        typer.echo(error.log, err=True)
        failure = error
    if rows:
        from taut.benchmarks.timing import about

        _keep_and_show(EngineResults(about=about(), rows=list(rows.values())), output, as_data=as_data)
    if failure:
        raise failure


def _on_gpu() -> bool:
    try:
        import torch
    except ModuleNotFoundError:
        raise BenchmarkError("an engine needs torch, which is missing here: install the engine first") from None
    return torch.cuda.is_available()


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise BenchmarkError(f"--options is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise BenchmarkError("--options must be a JSON object: '{\"max_num_seqs\": 64}'")
    return found


@app.command("show")
def show(file: Annotated[Path, typer.Argument(help="A file of results.")], as_data: AsJson = False) -> None:
    """Print the tables of a file of results.

    Example: taut bench show kernels.json
    """
    from taut.benchmarks.results import read

    _keep_and_show(read(file), None, as_data=as_data)


@app.command("compare")
def compare(
    before: Annotated[Path, typer.Argument(help="A file of results.")],
    after: Annotated[Path, typer.Argument(help="Another one, of the same GPU.")],
    slower: Annotated[
        float | None, typer.Option(min=0, help="Exit status 1 if a row is slower by more than so many percent.")
    ] = None,
    as_data: AsJson = False,
) -> None:
    """Hold ours in two files against each other, row by row. Files of different GPUs are refused.

    Example: taut bench compare before.json after.json --slower 3
    """
    from taut.benchmarks.results import compare as compared
    from taut.benchmarks.results import read
    from taut.benchmarks.tables import render_comparison

    first, second = read(before), read(after)
    try:
        pairs = compared(first, second)
    except BenchmarkError as error:
        raise BenchmarkError(f"{before} and {after}: {error}") from None
    if as_data:
        typer.echo(json.dumps([pair.model_dump() | {"faster": pair.faster} for pair in pairs], indent=1))
    else:
        wide_console().print(render_comparison(pairs, second.about))
    if slower is not None and any(pair.faster < 1 / (1 + slower / 100) for pair in pairs):
        raise typer.Exit(1)


@app.command("plot")
def plot(
    files: Annotated[list[Path], typer.Argument(help="Files of results of one GPU.")],
    folder: Annotated[Path, typer.Option(help="Where the pictures go.")] = Path(),
    form: Annotated[str, typer.Option("--format", help="svg or png.")] = "svg",
) -> None:
    """Draw the roofline, latency over context, speed-ups and engines. Needs matplotlib, but no GPU.

    Examples: taut bench plot kernels.json engines.json --folder pictures | taut bench plot kernels.json --format png
    """
    from taut.benchmarks.plots import draw
    from taut.benchmarks.results import read

    drawn = draw([read(file) for file in files], folder, form)
    if not drawn:
        raise BenchmarkError("these files hold no rows that can be drawn")
    for file in drawn:
        typer.echo(file)


@app.command("schema")
def schema() -> None:
    """Print the JSON Schema of the files of results."""
    from taut.benchmarks.results import json_schema

    typer.echo(json.dumps(json_schema(), indent=1))


def _keep_and_show(results: Results, output: Path | None, *, as_data: bool) -> None:
    from taut.benchmarks.results import as_json, write
    from taut.benchmarks.tables import render

    if output:
        write(results, output)
        Console(stderr=True).print(f"kept in {output}", highlight=False)
    if as_data:
        typer.echo(as_json(results), nl=False)
    else:
        wide_console().print(render(results))
