"""`taut bench engines` with the real engine and a tiny load."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

from taut.benchmarks.results import EngineResults, read

if TYPE_CHECKING:
    from pathlib import Path


def test_a_load_is_served_and_timed(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "it.json"
    arguments = ["bench", "engines", "vllm", str(model), "taut", "--load", "2x24/6", "--runs", "2", "-o", str(file)]
    command = [sys.executable, "-c", "from taut.cli.main import run; run()", *arguments]
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    results = read(file)
    assert isinstance(results, EngineResults)
    (row,) = results.rows
    (load,) = row.loads
    assert (load.requests, load.tokens_in, load.tokens_out) == (2, 24, 6)
    assert [run.warm_up for run in load.runs] == [True, False]
    assert row.serves
    run = load.counted
    assert run.first_token_ms is not None
    assert run.between_tokens_ms is not None
    assert 0 < run.first_token_ms.p50 <= run.first_token_ms.p99 <= 1e3 * run.seconds
    assert 0 < run.between_tokens_ms.p50 <= run.between_tokens_ms.p99
    assert "tokens/s" in done.stdout
