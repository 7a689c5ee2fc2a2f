"""A decode step inside vLLM, counted on the GPU by both sources of `taut audit`: ours wastes nothing, stock does."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM beside a GPU")

from gpu.audited import LAYERS, assert_both_sources_saw_whole_steps, assert_wastes_nothing, audited, observed

OPTIONS = {
    "gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 1 << 30, "dtype": "bfloat16", "max_model_len": 4096,
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    asked = [("llama", "taut"), ("deepseek", "taut"), ("deepseek", "TRITON_MLA")]
    return audited("vllm", asked, tmp_path_factory.mktemp("audits"), OPTIONS)


@pytest.mark.parametrize("shape", ["llama", "deepseek"])
def test_a_decode_step_wastes_nothing(shape: str, runs: dict[tuple[str, str], dict[str, Any]]) -> None:
    run, layers = runs[shape, "taut"], LAYERS[shape]
    assert observed(run)["calls"] == 2 * layers  # one to store, one to attend
    assert_both_sources_saw_whole_steps(run)
    assert_wastes_nothing(run, layers, allocations=0)
    assert run["padding"]["finite"] is True


def test_stock_latent_attention_is_seen_to_fill_and_copy(runs: dict[tuple[str, str], dict[str, Any]]) -> None:
    """vLLM's TRITON_MLA concatenates the query and fills its output and its LSE, each in every layer."""
    run, layers = runs["deepseek", "TRITON_MLA"], LAYERS["deepseek"]
    assert_both_sources_saw_whole_steps(run)
    for counted in (observed(run), run["summary"]["totals"]):
        assert counted["fills"] == 2 * layers
        assert counted["copies"] == layers
        assert counted["launches"] == 6 * layers  # a store, those three, and attention in two stages
    lines = {finding["through"]["file"] for finding in run["summary"]["findings"] if finding["through"]}
    assert any(file.endswith("triton_mla.py") for file in lines)
    (of_layers,) = [row for row in run["summary"]["rows"] if row["floor"] is not None]
    assert of_layers["scopes"] == layers
    assert of_layers["split_traffic"] is not None
