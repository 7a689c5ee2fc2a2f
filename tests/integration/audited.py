"""`taut audit` as users start it, over two layers of the small model, and what it must find in a planted backend."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from integration.engine import MODEL

TESTS = Path(__file__).resolve().parents[1]
LAYERS = 2
PLANTED = ("fills", "syncs", "allocations", "copies")
WASTE = ("syncs", "copies", "fills", "allocations")
PATIENCE = 1200  # seconds for two engines on a busy machine
# Small, since the interpreter takes its time.
WORK = ("--layers", str(LAYERS), "--rows", "3", "--context", "24", "--steps", "2")
LENGTHS = [[8, 16, 24], [9, 17, 25], [10, 18, 26]]


def command(*arguments: str, model: Path = MODEL, dtype: str = "float32") -> list[str]:
    code = "from taut.cli.main import run; run()"
    return [sys.executable, "-c", code, "audit", str(model), "--option", f"dtype={dtype}", *arguments]


def environment() -> dict[str, str]:
    """Where planted backends are found, and our Triton kernels as a provider that the interpreter runs."""
    paths = [str(TESTS), str(TESTS / "interpreted_provider"), os.environ.get("PYTHONPATH", "")]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("TAUT_")}
    variables |= {"TRITON_INTERPRET": "1", "TAUT_KERNELS": "interpreted", "HF_HUB_OFFLINE": "1"}
    return variables | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def audit(*arguments: str, **model: Any) -> tuple[dict[str, Any], int]:
    """The report and the exit status; `model` as `command` takes it."""
    with subprocess.Popen(
        command(*WORK, "--json", *arguments, **model),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            said, complained = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.terminate()  # it ends its engines on the way out
            raise
    assert said.startswith("{"), said[-1000:] + complained[-3000:]
    return json.loads(said), process.returncode


def planted_lines(module: str) -> dict[str, int]:
    """Where a fixture says that it wastes what: kind -> line."""
    lines = (TESTS / f"{module}.py").read_text().splitlines()
    return {found[1]: i for i, line in enumerate(lines, 1) if (found := re.search(r"# planted: (\w+)$", line))}


def assert_exactly_what_is_planted(summary: dict[str, Any], module: str) -> None:
    """One of each kind a layer, at its line, and nothing else that the backend does in a layer."""
    wasted = [finding for finding in summary["findings"] if finding["by"] == "backend" and finding["scope"] == "layer"]
    found = Counter({(finding["kind"], finding["through"]["line"]): finding["count"] for finding in wasted})
    lines = planted_lines(module)
    assert sorted(lines) == sorted(PLANTED)
    assert found == dict.fromkeys(lines.items(), LAYERS)
    assert {finding["through"]["file"] for finding in wasted} == {f"{module}.py"}
    assert {finding["layers"] for finding in wasted} == {LAYERS}


def assert_ours_wastes_nothing(run: dict[str, Any], *, outputs: int, launches: int = 2) -> None:
    """Our Triton kernels, launch by launch: a schedule a step, a store and an attention a layer, and nothing else.

    Args:
        run: of the report.
        outputs: that a layer has to allocate, since its engine hands no buffer over.
        launches: of a layer.
    """
    totals = run["summary"]["totals"]
    assert run["backend"].startswith("taut.adapters.")
    assert {kind: totals[kind] for kind in WASTE} == dict.fromkeys(WASTE, 0)
    assert totals["outputs"] == outputs * LAYERS
    assert 0 < run["held"] < 1 << 23  # and not the cache, which it refers to
    assert run["partials"] is not None
    layers = [row for row in run["summary"]["rows"] if row["floor"] is not None]
    assert [(row["scopes"], row["counts"]["launches"]) for row in layers] == [(LAYERS, launches)]
    assert run["summary"]["findings"] == [] or {found["by"] for found in run["summary"]["findings"]} == {"engine"}
