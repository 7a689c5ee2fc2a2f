"""A decode step inside SGLang, counted on the GPU by both sources of `taut audit`: ours wastes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

pytest.importorskip("sglang", reason="needs SGLang beside a GPU")

from gpu.audited import LAYERS, WASTE, audited, observed

if TYPE_CHECKING:
    from pathlib import Path

OPTIONS = {"mem_fraction_static": 0.6, "dtype": "bfloat16", "context_length": 4096, "sampling_backend": "pytorch"}


@pytest.mark.parametrize("shape", ["llama", "deepseek"])
def test_a_decode_step_wastes_nothing(shape: str, tmp_path: Path) -> None:
    """SGLang offers no tensor for a decode step's output: each layer has one made, which a graph keeps as its own."""
    (run,) = audited("sglang", shape, tmp_path, OPTIONS, "--backend", "taut")["runs"]
    layers, found, totals = LAYERS[shape], observed(run), run["summary"]["totals"]
    for kind in WASTE:
        assert found[kind] == 0, kind
        assert totals[kind] == 0, kind
    assert found["allocations"] <= layers
    assert 2 * layers <= found["launches"] <= 3 * layers  # store, attention, at most one merge


def test_stock_metadata_is_seen_to_copy(tmp_path: Path) -> None:
    """SGLang's triton sums up the lengths in a tensor of its own, and copies the sums to where its kernels read them.

    What it concatenates for latent attention lies outside the layers that are watched.
    """
    (run,) = audited("sglang", "deepseek", tmp_path, OPTIONS, "--backend", "triton")["runs"]
    assert run["summary"]["totals"]["copies"] >= 1
