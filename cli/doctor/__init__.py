"""`taut doctor`: what is installed, what would serve, and why; made to be pasted into an issue.

The doctor's own process imports no engine, since a broken one must not keep it from saying what is wrong: the probes
that need one run in a process of their own. torch is imported, because only torch knows which GPUs it can use.
"""

from __future__ import annotations

import logging
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import Annotated

import typer
from rich.console import Console

from taut.cli.config_file import read_model
from taut.cli.doctor.look import collect
from taut.cli.doctor.probes import probe
from taut.cli.doctor.report import as_json, render


def command(
    model: Annotated[Path | None, typer.Option(help="A model's folder or config.json: who serves it, and why.")] = None,
    engine: Annotated[str | None, typer.Option(help="Look for this engine only: vllm, sglang.")] = None,
    target: Annotated[str | None, typer.Option(help="Judge for this device instead: cpu, sm_90, gfx942.")] = None,
    bridge: Annotated[
        bool, typer.Option("--bridge", help="Show every entry of our ledger of the engine's internals.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave the probes of that ledger out: they import the engine.")
    ] = False,
    as_data: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Say what is installed, what would serve, and why. Exit status 1 if anything is wrong.

    Examples: taut doctor | taut doctor --model FOLDER | taut doctor --bridge | taut doctor --quick --json

    The report names no secrets and no home folder: it can be pasted into an issue as it is.

    The keys of --json, which stay: schema, taut, python, platform, torch (version, build; null where it is missing),
    triton, gpus, engines, entry_points, providers (with their capabilities), settings, model (null without --model),
    logs, bridge (empty with --quick), and findings (level: ok, note or wrong; about; says; advice). See docs/doctor.md.
    """
    logging.getLogger("taut").addHandler(logging.NullHandler())  # what would be logged stands among the findings
    config = None if model is None else read_model(model)
    with Console(stderr=True).status("looking around, and probing the engine (half a minute; --quick leaves it out)"):
        report = collect(engine=engine, model=config, target=target, probe=None if quick else probe)
    if as_data:
        typer.echo(as_json(report))
    else:
        Console().print(render(report, every_touch=bridge))
    if report.wrong:
        raise typer.Exit(1)
