"""A decode step inside SGLang, counted on the GPU by both sources of `taut audit`: ours wastes nothing, stock does."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("sglang", reason="needs SGLang beside a GPU")

from gpu.audited import LAYERS, assert_both_sources_saw_whole_steps, assert_wastes_nothing, audited

# Little memory is taken in the end: the audit asks for a small cache.
OPTIONS = {"mem_fraction_static": 0.95, "dtype": "bfloat16", "context_length": 4096, "sampling_backend": "pytorch"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    asked = [("llama", "taut"), ("deepseek", "taut"), ("deepseek", "triton")]
    return audited("sglang", asked, tmp_path_factory.mktemp("audits"), OPTIONS)


@pytest.mark.parametrize("shape", ["llama", "deepseek"])
def test_a_decode_step_wastes_nothing(shape: str, runs: dict[tuple[str, str], dict[str, Any]]) -> None:
    """SGLang offers no tensor for a decode step's output: each layer has one made, which a graph keeps as its own."""
    run = runs[shape, "taut"]
    assert_both_sources_saw_whole_steps(run)
    assert_wastes_nothing(run, LAYERS[shape], allocations=LAYERS[shape])


def test_stock_metadata_is_seen_to_copy(runs: dict[tuple[str, str], dict[str, Any]]) -> None:
    """SGLang's triton sums up the lengths in a tensor of its own, and copies the sums to where its kernels read them.

    What it concatenates for latent attention lies outside the layers that are watched.
    """
    run = runs["deepseek", "triton"]
    assert_both_sources_saw_whole_steps(run)
    assert run["summary"]["totals"]["copies"] >= 1
    layers = [row for row in run["summary"]["rows"] if row["floor"] is not None]
    assert {row["counts"].get(kind, 0) for row in layers for kind in ("copies", "fills", "allocations")} == {0}
