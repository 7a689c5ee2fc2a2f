"""`taut audit`: where a step of an engine wastes time in its attention, with the lines of code that do it.

The work is done by `taut.audit`, in a process of the engine's own; here stand the options and what is printed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import TypeAdapter
from rich import box
from rich.console import Console
from rich.table import Table

import taut
from taut.audit.operations import KINDS
from taut.audit.page import BYTES, number_text, of_a_scope, of_a_step, page, reasons, size_text
from taut.audit.picture import picture, short
from taut.audit.process import EngineFailedError, run_engine
from taut.audit.records import SCHEMA, Device, Run
from taut.audit.verdict import JUDGED, Finding, Summary, busiest, failures, seen_by, summary
from taut.audit.work import Request
from taut.cli import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt")
MOST_PLACES = 20


class Engine(str, Enum):
    """The engines that can be audited."""

    vllm = "vllm"
    sglang = "sglang"


class Phase(str, Enum):
    """Which steps are shown and judged."""

    decode = "decode"
    prefill = "prefill"


def command(
    called: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="A model's folder (config.json alone will do), or its name; or a file that --json has printed: it is "
            "shown again, and no engine runs."
        ),
    ],
    engine: Annotated[Engine | None, typer.Option(help="The engine; by default the one that is installed.")] = None,
    backend: Annotated[
        str,
        typer.Option(
            help="taut, stock (what the engine itself chooses), a name that the engine knows (TRITON_MLA, triton), or "
            "package.module:Class of a backend that is being written."
        ),
    ] = "taut",
    against: Annotated[str | None, typer.Option(help="Another backend, to be put beside it.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Requests in the batch.")] = 4,
    context: Annotated[int, typer.Option(min=1, help="Tokens of the longest prompt; the others are shorter.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps to record.")] = 3,
    layers: Annotated[int, typer.Option(min=0, help="Run only so many layers, with made-up weights; 0: all.")] = 0,
    made_up: Annotated[bool, typer.Option("--made-up", help="Make the weights up even where there are some.")] = False,
    option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, an argument of the engine's own, such as dtype=float16.")
    ] = None,
    phase: Annotated[Phase, typer.Option(help="Which steps are shown and judged.")] = Phase.decode,
    fail_on: Annotated[
        str, typer.Option(help=f"What must not happen, separated by commas: {', '.join(JUDGED)}. Exit status 1.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON; see docs/audit.md.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write the record to this file, as a page by itself.")] = None,
    picture_file: Annotated[
        Path | None,
        typer.Option(
            "--picture", help="Write the picture of a step to this file, as SVG: on the device, else on the host."
        ),
    ] = None,
) -> None:
    """Show where a step of an engine wastes time in its attention, and which lines of code do it.

    The engine runs in a process of its own, with one of its backends or ours, over a small batch. Each operation of the
    metadata's building and of each layer's attention is recorded: host-device syncs, copies, fills, launches,
    allocations. A folder with a config.json alone is run with made-up weights.

    Examples:

    taut audit .models/SmolLM2-135M-Instruct --against stock

    taut audit deepseek/ --layers 4 --backend TRITON_MLA --against taut --html report.html

    taut audit llama/ --backend my_package.attention:Backend --fail-on syncs,copies,fills,allocations

    taut audit llama/ --against stock --json > report.json; taut audit report.json --html page.html --picture step.svg

    The exit status is 1 when something named with --fail-on happens, or cannot be seen on this machine.
    """
    judged = _kinds(fail_on)
    console = Console(stderr=as_json)
    if Path(model).is_file():
        _only_shown(called)
        report, runs, judgements = read_report(Path(model))
    else:
        chosen = engine.value if engine else _installed()
        asked = [request_of(chosen, model, name, rows, context, steps, layers, made_up, option or []) for name in
                 ([backend] if against is None else [backend, against])]  # fmt: skip
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what has been started is ended on the way out
        runs = [_run(request, console) for request in asked]
        judgements = [summary(run, phase.value) for run in runs]
        report = report_of(asked[0], runs, judgements)
    failed = report["failed"] = failures(judgements[0], judged)
    if html is not None:
        html.write_text(page(report), encoding="utf-8")
    if picture_file is not None:
        picture_file.write_text(picture(report), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(report, indent=1))
    else:
        for run, judgement in zip(runs, judgements, strict=True):
            _show(run, judgement, console)
        if len(runs) == 2:
            _compare(runs, judgements, console)
        for name, file in (("page", html), ("picture", picture_file)):
            if file is not None:
                console.print(f"The {name}: {file}")
        for sentence in failed:
            console.print(f"[red]fails[/] {runs[0].asked}: {sentence}")
    if failed:
        raise typer.Exit(1)


# What was asked


def _kinds(asked: str) -> list[str]:
    kinds = [kind.strip() for kind in asked.split(",") if kind.strip()]
    for kind in kinds:
        if kind not in JUDGED:
            raise UserError(f"--fail-on {kind}: nothing of this name is judged. There are {', '.join(JUDGED)}")
    return kinds


def _only_shown(called: typer.Context) -> None:
    """Refuse what cannot be asked of a report: nothing runs, and its phase is chosen."""
    for option in called.command.params:
        source = called.get_parameter_source(str(option.name))
        if getattr(source, "name", "") == "COMMANDLINE" and option.name not in (
            "model",
            "fail_on",
            "as_json",
            "html",
            "picture_file",
        ):
            raise UserError(f"{option.opts[0]}: this is a report, which is only shown again; leave the option away")


def _installed() -> str:
    found = [engine.value for engine in Engine if find_spec(engine.value)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError("neither vLLM nor SGLang is installed here: `taut audit` runs one of them")
    raise UserError("vLLM and SGLang are both installed here: name one, --engine vllm or --engine sglang")


def request_of(
    engine: str,
    model: str,
    backend: str,
    rows: int,
    context: int,
    steps: int,
    layers: int,
    made_up: bool,
    options: Sequence[str],
) -> Request:
    """What an engine's process is asked to do.

    Raises:
        UserError: the engine or the model is not there, or an argument cannot be read.
    """
    if not find_spec(engine):
        raise UserError(f"--engine {engine}: {engine} is not installed here")
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise UserError(f"{model} holds no config.json: name the folder of a model in Hugging Face format")
        made_up = made_up or not any(next(folder.glob(pattern), None) for pattern in WEIGHTS)
        model = str(folder.resolve())
    elif folder.is_absolute() or model.startswith(".") or model.count("/") != 1:
        raise UserError(f"{model}: no such folder, and no model's name of the form ORGANISATION/NAME")
    plugin = ""
    if ":" in backend:
        module, _, name = backend.partition(":")
        if not module or not name:
            raise UserError(f"--backend {backend}: write package.module:Class")
        plugin = f"{module}.{name}"
    return Request(
        engine=engine,
        model=model,
        asked=backend,
        flag="" if plugin or backend in ("taut", "stock") else backend,
        plugin=plugin,
        rows=rows,
        context=context,
        steps=steps,
        layers=layers,
        made_up=made_up or layers > 0,
        options=dict(_option(text) for text in options),
    )


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UserError(f"--option {text}: write NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def environment_of(request: Request) -> dict[str, str]:
    """The variables of an engine's process: the user's own, and what makes it run here and alone."""
    variables = {name: value for name, value in os.environ.items() if name != "TAUT_ATTENTION"}
    usual = {
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    # The engine's core must be where it is watched.
    needed = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TAUT_ATTENTION": "on" if request.asked == "taut" else "off"}
    return usual | variables | needed


def _run(request: Request, console: Console) -> Run:
    words, began = f"{request.asked}: ", time.monotonic()
    with console.status(f"{words}starting {request.engine} (a minute on a small machine)") as status:

        def follow(said: str) -> None:
            status.update(words + said)
            if not console.is_terminal:  # a log shows no status: a line each
                console.print(f"{words}{said}, after {time.monotonic() - began:.0f} s", highlight=False)

        try:
            return run_engine(request, environment_of(request), follow)
        except EngineFailedError as error:
            raise UserError(str(error)) from None


# What is shown


def report_of(request: Request, runs: Sequence[Run], judgements: Sequence[Summary]) -> dict[str, Any]:
    """The record, as docs/audit.md describes it. Of the steps of a run the events of the last one of each kind stay."""
    shown = []
    for run, judgement in zip(runs, judgements, strict=True):
        record = dataclasses.asdict(run)
        last = {step["kind"]: step for step in record["steps"]}
        for step in record["steps"]:
            if step is not last[step["kind"]]:
                del step["scopes"]
        shown.append(record | {"summary": dataclasses.asdict(judgement)})
    asked = dataclasses.asdict(request)
    work = {name: asked[name] for name in ("engine", "rows", "context", "steps", "layers", "made_up", "options")}
    work["model"] = Path(request.model).name  # a machine's folders are nobody's business in a report
    return {"schema": SCHEMA, "taut": taut.__version__, "work": work, "runs": shown, "failed": []}


def read_report(file: Path) -> tuple[dict[str, Any], list[Run], list[Summary]]:
    """A record that was printed before, with its runs and what was made of them; `report_of` read backwards.

    Raises:
        UserError: the file is none, or of a later release.
    """
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        judgements = TypeAdapter(list[Summary]).validate_python([run.pop("summary") for run in report["runs"]])
        runs = TypeAdapter(list[Run]).validate_python(report["runs"])
        schema = report["schema"]
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{file} is no report that `taut audit --json` has printed: {reason}") from None
    if schema != SCHEMA:
        raise UserError(f"{file} is a report of schema {schema}; this release of taut reads {SCHEMA}")
    # With all that later releases have added to what was written then.
    whole = [
        dataclasses.asdict(run) | {"summary": dataclasses.asdict(judgement)}
        for run, judgement in zip(runs, judgements, strict=True)
    ]
    return report | {"runs": whole}, runs, judgements


def _show(run: Run, judged: Summary, console: Console) -> None:
    """One run as a table and the list of its findings."""
    console.print(
        f"[bold]{run.asked}[/]: {run.backend} in {run.engine} {run.release} on {run.device}, "
        f"{seen_by(judged.phase, judged.steps, judged.left_out, judged.profiled)}",
        soft_wrap=True,
    )
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("what the backend does")
    for row in judged.rows:
        table.add_column(row.name if row.scopes == 1 else f"each of {row.scopes} layers", justify="right")
    table.add_column("a step", justify="right")
    for kind in KINDS:
        cells = ["?" if kind in judged.unknown else f"{row.counts.get(kind, 0):g}" for row in judged.rows]
        table.add_row(kind, *cells, number_text(judged.totals[kind]))
    scopes = [vars(row) for row in judged.rows]
    for words, name in BYTES.items():
        table.add_row(words, *(of_a_scope(row, name) for row in scopes), size_text(of_a_step(scopes, name)))
    console.print(table)
    if run.kernels.endswith("reference"):
        console.print(
            "The reference kernels serve, plain torch: right on every device, and no measure of what a GPU runs.",
            style="yellow",
        )
    if padded := [step.padded for step in run.steps if step.kind == judged.phase and step.padded]:
        console.print(f"Rows of a step that are padding: {max(padded)}", highlight=False)
    if run.held is not None:
        console.print(f"The backend's objects hold {size_text(run.held)} from step to step.", highlight=False)
    _show_findings(judged, console)
    if run.observed is not None and run.observed.kernels:
        _show_kernels(run.observed, console)
    for why, kinds in reasons(vars(judged)):
        console.print(f"? {', '.join(kinds)}: {why}", style="dim", highlight=False)
    console.print()


def _show_kernels(device: Device, console: Console) -> None:
    """What ran on the device in one decode step, by the profiler."""
    table = Table(box=box.SIMPLE_HEAD, title="a decode step on the device", title_justify="left")
    for heading in ("kernel", "times", "microseconds", "grid", "waves", "tail"):
        table.add_column(heading, justify="left" if heading == "kernel" else "right", overflow="fold")
    for kernel, times, microseconds in busiest(device.kernels):
        waves = "?" if kernel.waves is None else f"{kernel.waves:.2f}"
        tail = "?" if kernel.tail is None else f"{kernel.tail:.0%}"
        grid = " x ".join(map(str, kernel.grid)) or "?"
        table.add_row(short(kernel.name), str(times), f"{microseconds:.1f}", grid, waves, tail)
    console.print(table)


def _show_findings(judged: Summary, console: Console) -> None:
    """The findings by their lines of code."""
    if not judged.findings:
        console.print("[green]No finding.[/]")
        return
    places: dict[tuple[str, str], list[Finding]] = {}
    for finding in judged.findings:
        around = "" if finding.by == "backend" else "the engine around it, "
        layers = f"{finding.layers} layers" if finding.layers > 1 else "1 layer"
        scope = "" if finding.scope == "run" else layers if finding.layers else finding.scope
        places.setdefault((finding.where, around + scope), []).append(finding)
    for (where, scope), found in list(places.items())[:MOST_PLACES]:
        console.print(f"[bold]{where}[/]" + (f" ({scope})" if scope else ""), highlight=False, soft_wrap=True)
        for finding in found:
            size = f", {size_text(finding.size)}" if finding.size else ""
            console.print(f"    {finding.count:g} x {finding.kind}: {finding.operation}{size}", highlight=False)
    if len(places) > MOST_PLACES:
        console.print(f"… and {len(places) - MOST_PLACES} more lines of code: --json has them all")
    for kind, advice in {finding.kind: finding.advice for finding in judged.findings}.items():
        console.print(f"[dim]{kind}: {advice}[/]", highlight=False)


def _compare(runs: Sequence[Run], judgements: Sequence[Summary], console: Console) -> None:
    """Two runs side by side, all scopes of a step together."""
    table = Table(box=box.SIMPLE_HEAD, title=f"a {judgements[0].phase} step, all layers", title_justify="left")
    for heading in ("", *(run.asked for run in runs)):
        table.add_column(heading, justify="right" if heading else "left")
    for kind in (*KINDS, "compiled", "not_finite"):
        table.add_row(kind, *(number_text(judgement.totals[kind]) for judgement in judgements))
    for words, name in BYTES.items():
        sizes = (of_a_step([vars(row) for row in judgement.rows], name) for judgement in judgements)
        table.add_row(words, *map(size_text, sizes))
    table.add_row("held from step to step", *(size_text(run.held) for run in runs))
    console.print(table)
