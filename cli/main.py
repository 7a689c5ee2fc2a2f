"""The command `taut`. What a subcommand needs beyond the package's own requirements it imports when it runs."""

from __future__ import annotations

import sys

import typer

import taut
from taut.benchmarks import BenchmarkError
from taut.cli import UserError, audit, bench, demo, doctor, tune
from taut.common_kernels.providers import ProviderError
from taut.common_kernels.tiles import TileError
from taut.engine_plugins.settings import SettingsError

app = typer.Typer(
    help="Attention without slack for vLLM and SGLang.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("audit")(audit.command)
app.add_typer(bench.app, name="bench", no_args_is_help=True)
app.command("demo")(demo.command)
app.command("doctor")(doctor.command)
app.command("tune")(tune.command)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"taut-attention {taut.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """Attention without slack for vLLM and SGLang."""


def run() -> None:
    """The console script. A user's mistake ends in one line and exit status 2; anything else is ours, and is shown."""
    try:
        app()
    except (UserError, BenchmarkError, SettingsError, ProviderError, TileError) as error:
        _stop(str(error))
    except FileNotFoundError as error:
        _stop(f"{error.filename or error}: no such file or folder")


def _stop(message: str) -> None:
    typer.echo(f"taut: {' '.join(message.split())}", err=True)
    sys.exit(2)
