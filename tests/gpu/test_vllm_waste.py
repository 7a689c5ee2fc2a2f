"""A decode step inside vLLM, counted on the GPU: our layers fill, copy, wait for and allocate nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM beside a GPU")

from taut.benchmarks.models import MODELS

LAYERS = {name: shape["num_hidden_layers"] for name, shape in MODELS.items()}


@pytest.mark.parametrize("shape", ["llama", "deepseek"])
def test_a_decode_step_wastes_nothing(shape: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODELS[shape]))
    counts = tmp_path / "counts.json"
    environment = os.environ | {"TAUT_ATTENTION": "on", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, Path(__file__).with_name("waste.py"), tmp_path, counts]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert counts.exists(), process.stdout[-2000:] + process.stderr[-4000:]
    found = json.loads(counts.read_text())
    print(json.dumps(found, indent=1))  # noqa: T201 - for whoever runs this with -s
    layers = LAYERS[shape]
    assert found["calls"] == 2 * layers  # one to store, one to attend
    for kind in ("fills", "copies", "syncs", "torch_fills", "torch_copies"):
        assert found[kind] == 0, kind
    assert found["launches"] <= 3 * layers  # store, attention, at most one merge
    assert found["launches"] >= 2 * layers  # or the profiler saw nothing
    assert found["allocations"] == 0
