"""`taut audit` of an engine on a GPU, over the two shapes of models that everything is measured with."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

from taut.benchmarks.models import MODELS

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = {name: shape["num_hidden_layers"] for name, shape in MODELS.items()}
WASTE = ("fills", "copies", "syncs", "h2d", "d2h")


def audited(engine: str, shape: str, folder: Path, options: dict[str, Any], *arguments: str) -> dict[str, Any]:
    """What the command says of a model of this shape, whose weights are made up.

    Args:
        engine: "vllm", "sglang".
        shape: a key of `MODELS`.
        folder: where its configuration is written.
        options: of the engine.
        arguments: further ones of the command.
    """
    (folder / "config.json").write_text(json.dumps(MODELS[shape]))
    code = "from taut.cli.main import run; run()"
    command = [sys.executable, "-c", code, "audit", str(folder), "--engine", engine, "--context", "1200", "--json"]
    command += [part for name, value in options.items() for part in ("--option", f"{name}={value}")]
    process = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert process.stdout.startswith("{"), process.stdout[-2000:] + process.stderr[-4000:]
    print(process.stdout[-20000:])  # noqa: T201 - for whoever runs this with -s
    return json.loads(process.stdout)


def observed(run: dict[str, Any]) -> Counter[str]:
    """What the profiler counted in the layers of one decode step."""
    total: Counter[str] = Counter()
    for scope, counts in run["observed"]["counts"].items():
        if scope != "metadata":
            total.update(counts)
    return total
