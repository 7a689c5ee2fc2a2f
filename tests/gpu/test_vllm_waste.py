"""A decode step inside vLLM, counted on the GPU by both sources of `taut audit`: ours wastes nothing, stock does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM beside a GPU")

from taut.benchmarks.models import MODELS

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = {name: shape["num_hidden_layers"] for name, shape in MODELS.items()}


def audited(shape: str, folder: Path, *arguments: str) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(MODELS[shape]))
    options = ["--option", "gpu_memory_utilization=0.3", "--option", "dtype=bfloat16", "--option", "max_model_len=4096"]
    code = "from taut.cli.main import run; run()"
    command = [sys.executable, "-c", code, "audit", str(folder), "--engine", "vllm", "--context", "1200", "--json"]
    process = subprocess.run([*command, *options, *arguments], capture_output=True, text=True, check=False)
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


@pytest.mark.parametrize("shape", ["llama", "deepseek"])
def test_a_decode_step_wastes_nothing(shape: str, tmp_path: Path) -> None:
    (run,) = audited(shape, tmp_path, "--backend", "taut")["runs"]
    layers = LAYERS[shape]
    found = observed(run)
    assert found["calls"] == 2 * layers  # one to store, one to attend
    for kind in ("fills", "copies", "syncs", "h2d", "d2h", "allocations"):
        assert found[kind] == 0, kind
    assert found["launches"] <= 3 * layers  # store, attention, at most one merge
    assert found["launches"] >= 2 * layers  # or the profiler saw nothing
    totals = run["summary"]["totals"]
    assert {kind: totals[kind] for kind in ("fills", "copies", "syncs", "h2d", "d2h", "allocations")} == {
        "fills": 0, "copies": 0, "syncs": 0, "h2d": 0, "d2h": 0, "allocations": 0,
    }  # fmt: skip
    assert run["observed"]["kernels"]


def test_stock_latent_attention_is_seen_to_fill_and_copy(tmp_path: Path) -> None:
    """vLLM's TRITON_MLA concatenates the query and fills its output and its LSE, each in every layer."""
    (run,) = audited("deepseek", tmp_path, "--backend", "TRITON_MLA")["runs"]
    layers = LAYERS["deepseek"]
    for counted in (observed(run), run["summary"]["totals"]):
        assert counted["fills"] >= 2 * layers
        assert counted["copies"] >= layers
    lines = {finding["through"]["file"] for finding in run["summary"]["findings"] if finding["through"]}
    assert any(file.endswith("triton_mla.py") for file in lines)
