"""Our vLLM classes against real releases of vLLM, each in a process of its own; `make contract` fetches them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from contract.releases import RELEASES, fetch

SCRIPT = Path(__file__).parent / "held_against.py"


@pytest.mark.parametrize("release", os.environ.get("VLLM_RELEASES", "").split() or RELEASES)
def test_release(release: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TAUT_")}
    environment |= {"PYTHONPATH": str(fetch(release)), "VLLM_NO_USAGE_STATS": "1", "VLLM_PLUGINS": ""}
    process = subprocess.run(
        [sys.executable, "-W", "ignore", SCRIPT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    lines = process.stdout.splitlines()
    assert [line for line in lines if line.startswith("PROBLEM")] == []
    assert f"HELD vLLM {release}" in lines
