"""`taut tune`: the tiles of this GPU for the shapes of given models, measured, as a table that TAUT_TABLE takes."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from taut.benchmarks import BenchmarkError
from taut.benchmarks.kernels import asked_with_option
from taut.benchmarks.models import model_named
from taut.benchmarks.operations import describe
from taut.benchmarks.results import About, Compared, write_whole
from taut.benchmarks.tables import render_comparison
from taut.benchmarks.tuning.problems import DECODE, PREFILL, Tuned, questions
from taut.benchmarks.tuning.search import SPACES, Found, search
from taut.cli.bench import AsJson, check_output, progress, wide_console
from taut.common_kernels.providers import ProviderError, registry
from taut.common_kernels.tiles import TileTable, table_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from taut.common_kernels.problem import Problem
    from taut.common_kernels.workspace import DeviceFacts

Answers = list[tuple[Tuned, Found]]
SCHEMA = 1  # of the JSON; it rises when a key goes or changes its meaning


def command(
    models: Annotated[list[str], typer.Argument(help="llama, deepseek, or models' folders (a config.json is enough).")],
    tensor_parallel: Annotated[int, typer.Option("--tp", min=1, help="Devices that share the heads.")] = 1,
    page_size: Annotated[
        int | None, typer.Option("--page", min=1, help="Tokens in a page; 64 for MLA, else 16.")
    ] = None,
    cache_dtype: Annotated[str | None, typer.Option(help="bfloat16 or float8_e4m3fn; else the model's own.")] = None,
    decode: Annotated[str, typer.Option(help="The grid of decode.")] = DECODE,
    prefill: Annotated[str, typer.Option(help="The grid of prefill.")] = PREFILL,
    provider: Annotated[str | None, typer.Option("--kernels", help="triton or hopper; else what would serve.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The table; else tiles-TARGET.json.")] = None,
    table: Annotated[Path | None, typer.Option(help="The table to begin from; else that of the package.")] = None,
    most: Annotated[int, typer.Option(min=1, help="Tiles to measure for each question.")] = 80,
    jobs: Annotated[int | None, typer.Option(min=0, help="Processes that compile; else all cores but one.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be tuned; needs no GPU.")] = False,
    as_data: AsJson = False,
) -> None:
    """Measure which tiles are fastest on this GPU for these models, and write a tile table.

    Examples: taut tune llama deepseek | taut tune FOLDER --tp 8 --cache-dtype float8_e4m3fn -o mine.json | taut tune
    FOLDER --kernels triton | taut tune FOLDER --decode "rows=1..256 context=8k" --dry-run

    Use it with TAUT_TABLE=FILE. Every tile is checked against the reference before it is timed, and none is chosen that
    is slower than today's on any shape. Interrupted, it writes nothing.
    """
    check_output(output)
    facts = _facts()
    try:
        asked = questions(
            {model.name: model.config for model in map(model_named, dict.fromkeys(models))},
            provider_of=_who_serves(provider, on_gpu=facts is not None), page_size=page_size, decode=decode,
            prefill=prefill, target=facts.target if facts else "any", tensor_parallel=tensor_parallel,
            cache_dtype=cache_dtype,
        )  # fmt: skip
    except ProviderError as error:
        raise (asked_with_option(error) if provider else error) from None
    if dry_run:
        told = "{0.provider}: {0.name}, measured as {0.operation} at {1} shapes for {2}"
        lines = [told.format(one, len(one.shapes), " and ".join(one.models)) for one in asked]
        typer.echo(json.dumps([asdict(one) for one in asked], indent=1) if as_data else "\n".join(lines))
        return
    if facts is None:
        raise BenchmarkError("taut tune measures on a GPU, and torch finds none: try `taut doctor`, or --dry-run")
    place = output or Path(f"tiles-{facts.target}.json")
    check_output(place)
    base = table_for(facts.target, facts.shared_memory, str(table) if table else None)
    found, failures = tune(asked, base, facts, most, max(1, (os.cpu_count() or 2) - 1) if jobs is None else jobs)
    if found:
        _write(found, base, facts, place, as_data=as_data)
    if failures:
        raise BenchmarkError(f"not tuned: {'; '.join(failures)}")


def _facts() -> DeviceFacts | None:
    """Of the GPU that is tuned; None where torch is missing, or finds none."""
    try:
        import torch
    except ModuleNotFoundError:
        return None
    from taut.common_kernels.workspace import device_facts

    return device_facts("cuda:0") if torch.cuda.is_available() else None


def _who_serves(named: str | None, *, on_gpu: bool) -> Callable[[Problem], str]:
    """Which provider serves a problem on this machine, as engines would be told.

    Without a GPU the automatic choice stands as `triton`, which serves on every GPU. `named` is that of --kernels.

    Raises:
        ProviderError: no provider has this name. The function that is returned raises it where none can serve.
    """
    from taut.engine_plugins.settings import settings

    wanted = named or settings().kernels
    registry().check_name(wanted)
    if on_gpu:
        return lambda problem: registry().choose(problem, wanted).provider.name
    return lambda _problem: "triton" if wanted == "auto" else wanted


def tune(asked: list[Tuned], base: TileTable, facts: DeviceFacts, most: int, jobs: int) -> tuple[Answers, list[str]]:
    """The answers to the questions, and why others have none: today's tile cannot be measured."""
    import torch

    from taut.benchmarks.tuning.measure import Measurer, compilers

    torch.manual_seed(0)
    found: Answers = []
    failures = []
    with progress() as bar, compilers(jobs) as pool, tempfile.TemporaryDirectory() as folder:
        for number, one in enumerate(asked):
            task = bar.add_task(f"{number + 1} of {len(asked)}, {one.name}", total=most)
            timer = Measurer(one, base, facts, Path(folder), pool, counted=partial(bar.advance, task))
            start = base.tile(one.table_operation, one.facts)
            try:
                found.append((one, search(SPACES[one.table_operation], one.given, start, timer, most)))
            except BenchmarkError as error:
                failures.append(f"{one.name}: {error}")
            bar.update(task, visible=False)
    return found, failures


def _write(found: Answers, base: TileTable, facts: DeviceFacts, place: Path, *, as_data: bool) -> None:
    """Write the table, and tell what came of it."""
    from taut.benchmarks.timing import about

    here = about()
    packages = [f"{name} {here.packages[name]}" for name in ("torch", "triton") if name in here.packages]
    measured = ", ".join([f"an {here.gpu}", *packages, here.date])
    names = "; ".join(question.name for question, _ in found)
    about_it = f"measured on {measured}: {names}. The rest as in {base.name}: {base.about}"
    table = replace(base, about=about_it, targets=(facts.target,), shared_memory=facts.shared_memory)
    for question, one in found:
        table = table.answering(question.table_operation, question.facts, one.best)
    write_whole(place, table.as_json())
    if as_data:
        told = {"schema": SCHEMA, "table": str(place), "measured": measured, "base": base.name}
        typer.echo(json.dumps(told | {"questions": [_as_data(*answer) for answer in found]}, indent=1))
    else:
        wide_console().print(render(found, here))
        typer.echo(f"{place}: use it with TAUT_TABLE={place}")


def _as_data(question: Tuned, one: Found) -> dict[str, Any]:
    """A question of what `--json` prints; docs/tune.md tells of every key."""
    return {
        "provider": question.provider,
        "operation": question.table_operation,
        "facts": dict(question.facts),
        "models": list(question.models),
        "shapes": list(question.shapes),
        "before": {"tile": one.start, "us": list(one.before.us)},
        "after": {"tile": one.best, "us": list(one.after.us)},
        "gain": one.gain,
        "counts": one.counts,
        "complete": not one.cut_short,
    }


def render(found: Answers, about: About) -> Group:
    """A line for each shape, then for each question the tile that was chosen."""
    pairs = [
        Compared(what=f"{question.table_operation} {describe(shape)}", unit="us", before=before, after=after)
        for question, one in found
        for shape, before, after in zip(question.shapes, one.before.us, one.after.us, strict=True)
    ]
    lines = []
    for question, one in found:
        changed = {name: number for name, number in one.best.items() if one.start.get(name) != number}
        tile = f"{one.gain:.3f} times as fast with {describe(changed)}" if changed else "the tile as it was"
        counts = ", ".join(f"{number} {status}" for status, number in sorted(one.counts.items()))
        note = f"; cut short, {one.cut_short}" if one.cut_short else ""
        lines.append(Text.assemble((question.name, "bold"), f": {tile} ({counts}{note})"))
    return Group(render_comparison(pairs, about), *lines)
