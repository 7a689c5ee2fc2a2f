"""`taut audit` of an engine on a GPU, over the two shapes of models that everything is measured with.

An engine's start takes most of an audit. Those of a module start at once and share the GPU: what is counted stays the
same, times would not.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from taut.benchmarks.models import MODELS

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = {name: shape["num_hidden_layers"] for name, shape in MODELS.items()}
WASTE = ("fills", "copies", "syncs", "h2d", "d2h")
STEPS = 3  # decode steps that are traced


def audited(
    engine: str, asked: list[tuple[str, str]], folder: Path, options: dict[str, Any]
) -> dict[tuple[str, str], dict[str, Any]]:
    """What the command says of these shapes and backends, each by itself, all at once; weights are made up.

    The reports stay in `folder` as JSON, as pages and as pictures.

    Args:
        engine: "vllm", "sglang".
        asked: a key of `MODELS` and a backend.
        folder: where the models' configurations are written, too.
        options: of the engine.
    """
    for shape in {shape for shape, _ in asked}:
        (folder / shape).mkdir()
        (folder / shape / "config.json").write_text(json.dumps(MODELS[shape]))
    with ThreadPoolExecutor(len(asked)) as pool:
        waiting = {key: pool.submit(_audit, engine, *key, folder, options) for key in asked}
    return {key: future.result() for key, future in waiting.items()}


def _audit(engine: str, shape: str, backend: str, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    code = "from taut.cli.main import run; run()"
    left = folder / f"{shape}-{backend}"
    command = [sys.executable, "-c", code, "audit", str(folder / shape), "--engine", engine, "--backend", backend]
    command += ["--context", "1200", "--steps", str(STEPS), "--json"]
    command += ["--html", f"{left}.html", "--picture", f"{left}.svg"]
    command += [part for name, value in options.items() for part in ("--option", f"{name}={value}")]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.stdout.startswith("{"), process.stdout[-2000:] + process.stderr[-4000:]
    left.with_suffix(".json").write_text(process.stdout)
    run: dict[str, Any] = json.loads(process.stdout)["runs"][0]
    shown = json.dumps({name: run[name] for name in ("held", "partials", "padding", "summary")})
    print(f"{shape} {backend}: {shown}\n{process.stderr[-1000:]}")  # noqa: T201 - with -s: the counts, how long it took
    return run


def observed(run: dict[str, Any]) -> Counter[str]:
    """What the profiler counted in the layers of one decode step."""
    total: Counter[str] = Counter()
    for scope, counts in run["observed"]["counts"].items():
        if scope != "metadata":
            total.update(counts)
    return total


def assert_both_sources_saw_whole_steps(run: dict[str, Any]) -> None:
    """Each source at least one step, and every count is a whole number: no step was averaged in that was none."""
    summary = run["summary"]
    assert (summary["left_out"], summary["profiled"]) == (0, 1)
    assert summary["steps"] >= STEPS  # more where requests do not begin together
    assert all(count == int(count) for row in summary["rows"] for count in row["counts"].values()), summary["rows"]


def assert_wastes_nothing(run: dict[str, Any], layers: int, *, allocations: int) -> None:
    """Neither source saw a fill, a copy or a wait; rows without work are finite; no cache is counted as ours.

    Args:
        run: of the report.
        layers: that the model has.
        allocations: in all layers of a step, for an engine that offers no tensor for their outputs.
    """
    found, totals = observed(run), run["summary"]["totals"]
    for kind in WASTE:
        assert (found[kind], totals[kind]) == (0, 0), kind
    assert found["allocations"] <= allocations
    assert totals["allocations"] == 0
    assert 2 * layers <= found["launches"] <= 3 * layers  # store, attention, at most one merge
    assert run["observed"]["kernels"]
    assert 0 < run["held"] < 1 << 30
    assert run["partials"] is not None
