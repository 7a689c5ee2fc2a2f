"""`taut tune`: the tiles of this GPU for the shapes of given models, measured, as a table that TAUT_TABLE takes."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from taut.benchmarks import BenchmarkError
from taut.benchmarks.kernels import asked_with_option
from taut.benchmarks.models import model_named
from taut.benchmarks.operations import describe
from taut.benchmarks.results import Compared, write_whole
from taut.benchmarks.tables import render_comparison
from taut.benchmarks.tuning.problems import DECODE, PREFILL, Tuned, questions
from taut.benchmarks.tuning.search import Found, search
from taut.benchmarks.tuning.space import SPACES
from taut.benchmarks.tuning.writing import as_json, tuned_table
from taut.cli.bench import check_output, progress, wide_console
from taut.common_kernels.providers import ProviderError, registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from taut.benchmarks.results import About
    from taut.benchmarks.tuning.measure import Session
    from taut.benchmarks.tuning.search import Outcome
    from taut.common_kernels.problem import Problem
    from taut.common_kernels.tiles import Tile

Answers = list[tuple[Tuned, Found]]
SCHEMA = 1  # of the JSON; it rises when a key goes or changes its meaning
MOST = 80


def command(
    models: Annotated[
        list[str], typer.Argument(help="llama, deepseek, or models' folders (their config.json is enough).")
    ],
    tensor_parallel: Annotated[int, typer.Option("--tp", min=1, help="Devices that share the heads.")] = 1,
    page_size: Annotated[
        int | None, typer.Option("--page", min=1, help="Tokens in a page; 64 for latent attention and 16 else.")
    ] = None,
    cache_dtype: Annotated[
        str | None, typer.Option(help="Of the cache: bfloat16, float8_e4m3fn; the model's own.")
    ] = None,
    decode: Annotated[str, typer.Option(help="The grid of decode.")] = DECODE,
    prefill: Annotated[str, typer.Option(help="The grid of prefill.")] = PREFILL,
    provider: Annotated[
        str | None,
        typer.Option("--kernels", help="Whose tiles: triton or hopper; those that would serve if not given."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The table; tiles-TARGET.json here if not given.")
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="The table to begin from; that of the package if not given.")
    ] = None,
    most: Annotated[int, typer.Option(min=1, help="Tiles to measure for each question.")] = MOST,
    jobs: Annotated[
        int | None, typer.Option(min=0, help="Processes that compile; all cores but one if not given.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show whose tiles would be tuned, and where; without a GPU, triton's.")
    ] = False,
    as_data: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Measure which tiles are fastest on this GPU for these models, and write a tile table.

    Examples: taut tune llama deepseek | taut tune FOLDER --tp 8 --cache-dtype float8_e4m3fn -o mine.json | taut tune
    FOLDER --kernels triton | taut tune FOLDER --decode "rows=1..256 context=8k" --dry-run

    Use it with TAUT_TABLE=FILE. Every tile is checked against the reference before it is timed, and none is chosen that
    is slower than today's on any shape. Interrupted, it writes nothing.
    """
    check_output(output)
    try:
        target, provider_of = _who_serves(provider)
        asked = questions(
            {model.name: model.config for model in map(model_named, dict.fromkeys(models))},
            target=target, provider_of=provider_of, tensor_parallel=tensor_parallel, page_size=page_size,
            cache_dtype=cache_dtype, decode=decode, prefill=prefill,
        )  # fmt: skip
    except ProviderError as error:
        raise (asked_with_option(error) if provider else error) from None
    if dry_run:
        _dry_run(asked, as_data=as_data)
        return
    session = _session(table, max(1, (os.cpu_count() or 2) - 1) if jobs is None else jobs)
    place = output or Path(f"tiles-{session.facts.target}.json")
    check_output(place)
    found, failures = tune(session, asked, most)
    if found:
        _write(session, found, place, as_data=as_data)
    if failures:
        raise BenchmarkError(f"not tuned: {'; '.join(failures)}")


def _who_serves(named: str | None) -> tuple[str, Callable[[Problem], str]]:
    """The target of this machine, and which provider serves a problem there, as engines would be told.

    Without a GPU the target is "any", and the automatic choice stands as `triton`, which serves on every GPU.

    Args:
        named: with --kernels; None for what TAUT_KERNELS says.

    Raises:
        ProviderError: no provider has this name. The function that is returned raises it where none can serve.
    """
    from taut.engine_plugins.settings import settings

    wanted, target = named or settings().kernels, _target()
    registry().check_name(wanted)
    if target is None:
        return "any", lambda _problem: "triton" if wanted == "auto" else wanted
    return target, lambda problem: registry().choose(problem, wanted).provider.name


def _target() -> str | None:
    """The target of the GPU that would be tuned; None where torch is missing, or finds none."""
    try:
        import torch
    except ModuleNotFoundError:
        return None
    from taut.common_kernels.targets import target_of

    return target_of(torch.device("cuda:0")) if torch.cuda.is_available() else None


def _dry_run(asked: Sequence[Tuned], *, as_data: bool) -> None:
    if as_data:
        typer.echo(json.dumps([dataclasses.asdict(question) for question in asked], indent=1))
        return
    table = Table(
        *("kernels", "of the table", "asked with", "measured as", "shapes", "for"), box=box.SIMPLE_HEAD, pad_edge=False
    )
    for one in asked:
        facts, shapes, models = describe(one.facts), str(len(one.shapes)), ", ".join(one.models)
        table.add_row(one.provider, one.table_operation, facts, one.operation, shapes, models)
    wide_console().print(table)


def _session(table: Path | None, jobs: int) -> Session:
    """What tunes the GPU of this process.

    Args:
        table: to begin from; None for the package's.
        jobs: processes that compile.

    Raises:
        BenchmarkError: torch is missing, or can use no GPU.
    """
    try:
        import torch
    except ModuleNotFoundError:
        raise BenchmarkError("tuning needs torch, which is missing here; --dry-run shows what it would do") from None
    from taut.benchmarks import timing
    from taut.benchmarks.tuning.measure import Session
    from taut.common_kernels.tiles import table_for
    from taut.common_kernels.workspace import device_facts

    timing.need_gpu("taut tune")
    torch.manual_seed(0)
    facts = device_facts("cuda:0")
    return Session(table_for(facts.target, facts.shared_memory, str(table) if table else None), facts, "cuda:0", jobs)


def tune(session: Session, asked: Sequence[Tuned], most: int) -> tuple[Answers, list[str]]:
    """The answers to the questions, and why others have none: today's tile cannot be measured.

    Args:
        session: where.
        asked: the questions.
        most: tiles to measure for each.
    """
    found: Answers = []
    failures = []
    with progress() as bar, session.timers() as timer_of:
        for number, question in enumerate(asked):
            task = bar.add_task(f"{number + 1} of {len(asked)}, {question.name}", total=most)
            timer = timer_of(question)

            def counted(tiles: Sequence[Tile], limits: Sequence[float] | None) -> Iterator[Outcome]:
                for outcome in timer(tiles, limits):  # noqa: B023 - the search ends before the next question begins
                    bar.advance(task)  # noqa: B023
                    yield outcome

            start = session.base.tile(question.table_operation, question.facts)
            try:
                found.append((question, search(SPACES[question.table_operation], question.given, start, counted, most)))
            except BenchmarkError as error:
                failures.append(f"{question.name}: {error}")
            bar.update(task, visible=False)
    return found, failures


def _write(session: Session, found: Answers, place: Path, *, as_data: bool) -> None:
    """Write the table, and tell what came of it."""
    from taut.benchmarks.timing import about

    here = about()
    packages = [f"{name} {here.packages[name]}" for name in ("torch", "triton") if name in here.packages]
    measured = ", ".join([f"an {here.gpu}", *packages, here.date])
    chosen = [(question, one.best) for question, one in found]
    facts = session.facts
    table = tuned_table(session.base, chosen, target=facts.target, shared_memory=facts.shared_memory, measured=measured)
    write_whole(place, as_json(table))
    if as_data:
        told = {"schema": SCHEMA, "table": str(place), "measured": measured, "base": session.base.name}
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
