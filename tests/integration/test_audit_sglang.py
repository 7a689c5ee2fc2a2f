"""`taut audit` on SGLang's CPU engine: what was planted, the engine's own backend, and ours. `make sglang` runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

pytest.importorskip("sglang", reason="needs SGLang's CPU engine: make sglang")

from integration.audited import LAYERS, assert_exactly_what_is_planted, assert_no_layer_wastes, audit

if TYPE_CHECKING:
    from pathlib import Path


def test_a_planted_backend_beside_a_clean_one(model: Path) -> None:
    report, status = audit("--backend", "planted_sglang:Backend", "--against", "planted_sglang:Clean")
    planted, clean = report["runs"]
    assert (planted["backend"], clean["backend"]) == ("planted_sglang.Backend", "planted_sglang.Clean")
    assert_exactly_what_is_planted(planted["summary"], "planted_sglang")
    assert_no_layer_wastes(clean["summary"])
    assert [step["kind"] for step in planted["steps"]] == ["prefill"] + 3 * ["decode"]
    assert status == 0


def test_torch_native_beside_ours(model: Path) -> None:
    """SGLang's own loops over the requests in Python and reads each length: a wait and a copy a request and layer."""
    report, _ = audit("--backend", "torch_native", "--against", "taut")
    stock, ours = report["runs"]
    totals = stock["summary"]["totals"]
    assert totals["syncs"] == 8 * LAYERS
    assert totals["copies"] == 4 * LAYERS
    assert stock["backend"].endswith("torch_native_backend.TorchNativeAttnBackend")
    assert ours["backend"] == "taut.adapters.sglang.backend.TautBackend"
    assert ours["kernels"] == "reference"
    assert ours["summary"]["totals"]["launches"] > 0
