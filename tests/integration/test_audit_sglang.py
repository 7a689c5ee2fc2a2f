"""`taut audit` on SGLang's CPU engine: what was planted, the engine's own backend, and ours. `make sglang` runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

pytest.importorskip("sglang", reason="needs SGLang's CPU engine: make sglang")

from integration.audited import LAYERS, LENGTHS, assert_exactly_what_is_planted, assert_ours_wastes_nothing, audit

if TYPE_CHECKING:
    from pathlib import Path


def test_a_planted_backend(model: Path) -> None:
    report, status = audit("--backend", "planted_sglang:Backend", "--fail-on", "syncs")
    (planted,) = report["runs"]
    assert planted["backend"] == "planted_sglang.Backend"
    assert_exactly_what_is_planted(planted["summary"], "planted_sglang")
    assert (status, report["failed"]) == (1, ["syncs: 2 a decode step"])


def test_torch_native_beside_ours(model: Path) -> None:
    """SGLang's own loops over the requests: for each it reads two numbers and copies its result to where it belongs."""
    report, status = audit("--backend", "torch_native", "--against", "taut")
    stock, ours = report["runs"]
    totals = stock["summary"]["totals"]
    assert stock["backend"].endswith("torch_native_backend.TorchNativeAttnBackend")
    assert (totals["syncs"], totals["copies"]) == (2 * 3 * LAYERS, 3 * LAYERS)
    assert_ours_wastes_nothing(ours, outputs=1)
    for run in (stock, ours):
        assert [step["kind"] for step in run["steps"]] == ["prefill", "decode", "decode"]
        assert [step["lengths"] for step in run["steps"]] == LENGTHS
    assert status == 0
