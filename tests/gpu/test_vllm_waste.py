"""A decode step inside vLLM, counted on the GPU by both sources of `taut audit`: ours wastes nothing, stock does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

pytest.importorskip("vllm", reason="needs vLLM beside a GPU")

from gpu.audited import LAYERS, WASTE, audited, observed

if TYPE_CHECKING:
    from pathlib import Path

OPTIONS = {"gpu_memory_utilization": 0.15, "dtype": "bfloat16", "max_model_len": 4096}


@pytest.mark.parametrize("shape", ["llama", "deepseek"])
def test_a_decode_step_wastes_nothing(shape: str, tmp_path: Path) -> None:
    (run,) = audited("vllm", shape, tmp_path, OPTIONS, "--backend", "taut")["runs"]
    layers = LAYERS[shape]
    found = observed(run)
    assert found["calls"] == 2 * layers  # one to store, one to attend
    for kind in (*WASTE, "allocations"):
        assert found[kind] == 0, kind
    assert found["launches"] <= 3 * layers  # store, attention, at most one merge
    assert found["launches"] >= 2 * layers  # or the profiler saw nothing
    totals = run["summary"]["totals"]
    assert not any(totals[kind] for kind in (*WASTE, "allocations")), totals
    assert run["observed"]["kernels"]


def test_stock_latent_attention_is_seen_to_fill_and_copy(tmp_path: Path) -> None:
    """vLLM's TRITON_MLA concatenates the query and fills its output and its LSE, each in every layer."""
    (run,) = audited("vllm", "deepseek", tmp_path, OPTIONS, "--backend", "TRITON_MLA")["runs"]
    layers = LAYERS["deepseek"]
    for counted in (observed(run), run["summary"]["totals"]):
        assert counted["fills"] >= 2 * layers
        assert counted["copies"] >= layers
    lines = {finding["through"]["file"] for finding in run["summary"]["findings"] if finding["through"]}
    assert any(file.endswith("triton_mla.py") for file in lines)
