"""`taut audit`: where a step of an engine wastes time in its attention, with the lines of code that do it.

The work is done by `taut.audit`, in a process of the engine's own; here stand the options and what is printed.
"""

from __future__ import annotations

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
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from taut.audit.page import page
from taut.audit.picture import picture
from taut.audit.process import EngineFailedError, run_engine
from taut.audit.report import Report, ReportError, read_report
from taut.audit.shown import Findings, Table, Words, heading, parts, side_by_side
from taut.audit.verdict import JUDGED, failures
from taut.audit.work import Request
from taut.cli import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from taut.audit.records import Run

STYLES = {"waste": "red", "warning": "yellow", "good": "green"}
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
        try:
            report = read_report(Path(model))
        except ReportError as error:
            raise UserError(str(error)) from None
    else:
        chosen = engine.value if engine else _installed()
        asked = [request_of(chosen, model, name, rows, context, steps, layers, made_up, option or []) for name in
                 ([backend] if against is None else [backend, against])]  # fmt: skip
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what has been started is ended on the way out
        report = Report.of(asked[0], [_run(request, console) for request in asked], phase.value)
    report.failed = failures(report.judged[0], judged)
    if html is not None:
        html.write_text(page(report), encoding="utf-8")
    if picture_file is not None:
        picture_file.write_text(picture(report), encoding="utf-8")
    if as_json:
        typer.echo(report.as_json())
    else:
        _show(report, console)
        for name, file in (("page", html), ("picture", picture_file)):
            if file is not None:
                console.print(f"The {name}: {file}")
        for sentence in report.failed:
            console.print(f"[red]fails[/] {escape(report.runs[0].asked)}: {sentence}")
    if report.failed:
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
    can_be_asked = ("model", "fail_on", "as_json", "html", "picture_file")
    for option in called.command.params:
        source = called.get_parameter_source(str(option.name))
        if getattr(source, "name", "") == "COMMANDLINE" and option.name not in can_be_asked:
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


def _show(report: Report, console: Console) -> None:
    """Each run, its findings by their lines of code, then several runs side by side."""
    for run, judged in report.each:
        console.print(f"[bold]{escape(run.asked)}[/]: {escape(heading(run, judged))}", soft_wrap=True)
        for part in parts(run, judged):
            if isinstance(part, Findings):
                _show_findings(part, console)
            else:
                console.print(_table(part) if isinstance(part, Table) else _text(part))
        console.print()
    if len(report.runs) > 1:
        console.print(_table(side_by_side(report)))


def _show_findings(findings: Findings, console: Console) -> None:
    """Each line of code with what it does, then what to do about each kind."""
    places: dict[str, list[Text]] = {}
    for kind, count, scope, where, operation, size, _ in findings.rows:
        says = f": {operation.text}{', ' * bool(size.text)}{size.text}"
        line = Text.assemble(f"    {count.text} x ", _text(kind), says)
        places.setdefault(f"[bold]{escape(where.text)}[/] ({escape(scope.text)})", []).append(line)
    for place, lines in list(places.items())[:MOST_PLACES]:
        console.print(place, highlight=False, soft_wrap=True)
        console.print(*lines, sep="\n")
    if len(places) > MOST_PLACES:
        console.print(f"… and {len(places) - MOST_PLACES} more lines of code: --json has them all")
    for says in dict.fromkeys(f"{row[0].text}: {row[-1].text}" for row in findings.rows):
        console.print(Text(says, "dim"))


def _table(table: Table) -> RichTable:
    drawn = RichTable(box=box.SIMPLE_HEAD, title=table.title or None, title_justify="left")
    for column, name in enumerate(table.headings):
        drawn.add_column(Text(name), justify="right" if table.is_number(column) else "left", overflow="fold")
    for row in table.rows:
        drawn.add_row(*map(_text, row))
    return drawn


def _text(words: Words) -> Text:
    """Text, for a stranger's [brackets] are no markup."""
    return Text(words.text, STYLES.get(words.style, words.style))
