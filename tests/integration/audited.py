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
PATIENCE = 400  # seconds for two engines on a busy machine


def command(*arguments: str) -> list[str]:
    code = "from taut.cli.main import run; run()"
    return [sys.executable, "-c", code, "audit", str(MODEL), "--option", "dtype=float32", *arguments]


def environment() -> dict[str, str]:
    """Where planted backends are found, and nothing is fetched."""
    paths = [str(TESTS), os.environ.get("PYTHONPATH", "")]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("TAUT_")}
    return variables | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}


def audit(*arguments: str) -> tuple[dict[str, Any], int]:
    """The report and the exit status."""
    process = subprocess.run(
        command("--layers", str(LAYERS), "--json", *arguments),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert process.stdout.startswith("{"), process.stdout[-1000:] + process.stderr[-3000:]
    return json.loads(process.stdout), process.returncode


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


def assert_no_layer_wastes(summary: dict[str, Any]) -> None:
    assert [finding for finding in summary["findings"] if finding["scope"] == "layer"] == []
