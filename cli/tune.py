"""`taut tune`: the tiles of this GPU for the shapes of given models, measured, as a table that TAUT_TABLE takes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from taut.benchmarks import BenchmarkError
from taut.benchmarks.operations import describe
from taut.benchmarks.tuning.problems import DECODE, PREFILL, Tuned, questions
from taut.cli.bench import check_output, progress, wide_console

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from rich.progress import TaskID

    from taut.benchmarks.tuning.journal import Journal
    from taut.benchmarks.tuning.search import Found, Outcome, Timer
    from taut.common_kernels.problem import Problem
    from taut.common_kernels.tiles import Tile, TileTable


SCHEMA = 1  # of the JSON; it rises when a key goes or changes its meaning
MOST = 80


def command(
    models: Annotated[
        list[str], typer.Argument(help="llama, deepseek, or models' folders (their config.json is enough).")
    ],
    tensor_parallel: Annotated[
        int, typer.Option("--tp", min=1, help="Devices that the heads are shared out over.")
    ] = 1,
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
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what an interrupted run has measured.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show whose tiles would be tuned, and where; without a GPU, triton's.")
    ] = False,
    as_data: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Measure which tiles are fastest on this GPU for these models, and write a tile table.

    Examples: taut tune llama deepseek | taut tune FOLDER --tp 8 --cache-dtype float8_e4m3fn -o mine.json | taut tune
    FOLDER --kernels triton | taut tune FOLDER --decode "rows=1..256 context=8k" --dry-run

    Use it with TAUT_TABLE=FILE. Every tile is checked against the reference before it is timed, and none is chosen that
    is slower than today's on any shape. Interrupted, the same command goes on where it was.
    """
    check_output(output)
    target, provider_of = _who_serves(provider)
    asked = questions(
        _configs(models),
        target=target,
        provider_of=provider_of,
        tensor_parallel=tensor_parallel,
        page_size=page_size,
        cache_dtype=cache_dtype,
        decode=decode,
        prefill=prefill,
    )
    if dry_run:
        _dry_run(asked, as_data=as_data)
        return
    tuning = Tuning.here(asked, table, output, most=most, jobs=jobs, fresh=fresh)
    try:
        found = tuning.run(Console(stderr=True))
    except KeyboardInterrupt:
        typer.echo(f"taut: stopped; the same command goes on from {tuning.journal.path}", err=True)
        raise typer.Exit(130) from None
    tuning.write(found)
    if as_data:
        typer.echo(json.dumps(outcome(tuning, found), indent=1))
    else:
        wide_console().print(render(asked, found))
        typer.echo(f"{tuning.output}: use it with TAUT_TABLE={tuning.output}")


def _configs(models: Sequence[str]) -> dict[str, dict[str, Any]]:
    from taut.benchmarks.models import model_named

    return {model.name: model.config for model in map(model_named, dict.fromkeys(models))}


def _who_serves(named: str | None) -> tuple[str, Callable[[Problem], str]]:
    """The target of this machine, and which provider serves a problem there, as engines would be told.

    Without a GPU the target is "any", and the automatic choice stands as `triton`, which serves on every GPU.

    Args:
        named: with --kernels; None for what TAUT_KERNELS says.
    """
    from taut.benchmarks.kernels import asked_with_option
    from taut.common_kernels.providers import ProviderError, registry
    from taut.engine_plugins.settings import settings

    wanted, target = named or settings().kernels, _target()

    def provider_of(problem: Problem) -> str:
        try:
            registry().check_name(wanted)
            if target is None:
                return "triton" if wanted == "auto" else wanted
            return registry().choose(problem, wanted).provider.name
        except ProviderError as error:
            raise (asked_with_option(error) if named else error) from None

    return target or "any", provider_of


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
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("kernels", "of the table", "asked with", "measured as", "shapes", "for"):
        table.add_column(heading, overflow="fold")
    for one in asked:
        table.add_row(
            one.provider,
            one.table_operation,
            describe(one.facts),
            one.operation,
            str(len(one.shapes)),
            ", ".join(one.models),
        )
    wide_console().print(table)


@dataclasses.dataclass
class Tuning:
    """One run.

    Args:
        asked: the questions.
        base: today's table.
        output: where the new one goes.
        journal: what was measured so far.
        most: tiles to measure for each question.
        target: of the GPU.
        shared_memory: bytes that a program may use.
        measured: on what and when, for people.
        session: a context that gives the timer of a question.
    """

    asked: Sequence[Tuned]
    base: TileTable
    output: Path
    journal: Journal
    most: int
    target: str
    shared_memory: int
    measured: str
    session: AbstractContextManager[Callable[[Tuned], Timer]]

    @classmethod
    def here(
        cls,
        asked: Sequence[Tuned],
        table: Path | None,
        output: Path | None,
        *,
        most: int,
        jobs: int | None,
        fresh: bool,
    ) -> Tuning:
        """On the GPU of this process.

        Raises:
            BenchmarkError: there is none, or a journal of other circumstances is in the way.
        """
        try:
            import torch
        except ModuleNotFoundError:
            raise BenchmarkError(
                "tuning needs torch, which is missing here; --dry-run shows what it would do"
            ) from None
        from taut.benchmarks import timing
        from taut.benchmarks.tuning.journal import Journal
        from taut.benchmarks.tuning.measure import Session
        from taut.common_kernels.tiles import table_for
        from taut.common_kernels.workspace import device_facts

        timing.need_gpu("taut tune")
        torch.manual_seed(0)
        facts, about = device_facts("cuda:0"), timing.about()
        base = table_for(facts.target, facts.shared_memory, str(table) if table else None)
        place = output or Path(f"tiles-{facts.target}.json")
        check_output(place)
        journal = journal_of(place)
        if fresh:
            journal.unlink(missing_ok=True)
        depends = circumstances(asked, base, about.gpu, about.packages, most)
        compilers = max(1, (os.cpu_count() or 2) - 1) if jobs is None else jobs
        packages = ", ".join(f"{name} {about.packages[name]}" for name in ("torch", "triton") if name in about.packages)
        return cls(
            asked,
            base,
            place,
            Journal(journal, depends),
            most,
            facts.target,
            facts.shared_memory,
            f"an {about.gpu}, {packages}, {about.date}",
            Session(base, facts, "cuda:0", compilers),
        )

    def run(self, said: Console) -> list[Found]:
        """Every question's answer.

        Raises:
            BenchmarkError: today's tile of one cannot be measured.
        """
        from taut.benchmarks.tuning.search import SearchError, search, settle
        from taut.benchmarks.tuning.space import space_of

        if len(self.journal):
            said.print(f"going on from {self.journal.path}: {len(self.journal)} tiles are measured", highlight=False)
        found = []
        with progress() as bar, self.session as timer_of:
            for number, question in enumerate(self.asked):
                words = f"{number + 1} of {len(self.asked)}, {question.name}"
                task = bar.add_task(words, total=self.most)
                start = self.base.tile(question.table_operation, question.facts)
                timer = timer_of(question)
                kept = self.journal.kept(question.name, timer)

                def counted(
                    tiles: Sequence[Tile], limits: Sequence[float] | None, kept: Timer = kept, task: TaskID = task
                ) -> Iterator[Outcome]:
                    for one in kept(tiles, limits):
                        bar.advance(task)
                        yield one

                def again(turn: int, question: Tuned = question, timer: Timer = timer) -> Timer:
                    return self.journal.kept(f"{question.name}, again, {turn}", timer)

                space = space_of(question.table_operation)
                try:
                    best = search(space, question.given, start, counted, self.most)
                except SearchError as error:
                    raise BenchmarkError(f"{question.name}: {error}") from None
                bar.update(task, description=f"{words}: once more")
                found.append(settle(best, again))
                bar.update(task, visible=False)
        return found

    def write(self, found: Sequence[Found]) -> None:
        """Write the table, read it back, and remove the journal."""
        from taut.benchmarks.results import write_whole
        from taut.benchmarks.tuning.writing import as_json, tuned_table
        from taut.common_kernels.tiles import read_table

        chosen = [(question, one.best) for question, one in zip(self.asked, found, strict=True)]
        table = tuned_table(
            self.base, chosen, target=self.target, shared_memory=self.shared_memory, measured=self.measured
        )
        write_whole(self.output, as_json(table))
        read = read_table(self.output)
        assert all(read.tile(one.table_operation, one.facts) == tile for one, tile in chosen)
        self.journal.remove()


def journal_of(table: Path) -> Path:
    """Where the journal of a table lies: beside it."""
    return table.with_name(f"{table.name}.journal")


def circumstances(
    asked: Sequence[Tuned], base: TileTable, gpu: str, packages: dict[str, str], most: int
) -> dict[str, Any]:
    """What the times of a journal depend on."""
    from taut.benchmarks.tuning.writing import as_json

    names = ("taut-attention", "torch", "triton")
    return {
        "schema": SCHEMA,
        "gpu": gpu,
        "packages": {name: packages[name] for name in names if name in packages},
        "kernels": " and ".join(sorted({question.provider for question in asked})),
        "questions": _digest([dataclasses.asdict(question) for question in asked]),
        "table": f"{base.name} {_digest(as_json(base))}",
        "most": most,
    }


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def outcome(tuning: Tuning, found: Sequence[Found]) -> dict[str, Any]:
    """What `--json` prints; docs/tune.md tells of every key."""
    return {
        "schema": SCHEMA,
        "table": str(tuning.output),
        "measured": tuning.measured,
        "base": tuning.base.name,
        "questions": [
            {
                "provider": question.provider,
                "operation": question.table_operation,
                "facts": dict(question.facts),
                "models": list(question.models),
                "shapes": list(question.shapes),
                "before": {"tile": one.start, "us": list(one.before.us)},
                "after": {"tile": one.best, "us": list(one.after.us)},
                "gain": one.gain,
                "counts": one.counts,
                "complete": one.complete,
            }
            for question, one in zip(tuning.asked, found, strict=True)
        ],
    }


def render(asked: Sequence[Tuned], found: Sequence[Found]) -> Table:
    """A line for each question and shape, then the tile that was chosen."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("question, shape", overflow="fold")
    for heading in ("before us", "after us", "times as fast"):
        table.add_column(heading, justify="right", no_wrap=True)
    for question, one in zip(asked, found, strict=True):
        counts = ", ".join(f"{number} {status}" for status, number in sorted(one.counts.items()))
        note = "" if one.complete else "; cut short, --most allows more"
        table.add_row(Text(question.name, style="bold"), "", "", Text(f"{one.gain:.3f}", style="bold"))
        for shape, before, after in zip(question.shapes, one.before.us, one.after.us, strict=True):
            table.add_row("  " + describe(shape), f"{before:.1f}", f"{after:.1f}", f"{before / after:.3f}")
        changed = {name: number for name, number in one.best.items() if one.start.get(name) != number}
        words = f"with {describe(changed)}" if changed else "with the tile as it was"
        table.add_row(Text(f"  {words} ({counts}{note})", style="italic"), "", "", "")
    return table
