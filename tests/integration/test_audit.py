"""`taut audit` on vLLM's CPU engine finds what was planted, at its lines, and nothing where nothing was."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

pytest.importorskip("vllm", reason="needs vLLM's CPU engine")

from integration.audited import assert_exactly_what_is_planted, assert_no_layer_wastes, audit

if TYPE_CHECKING:
    from pathlib import Path


def test_a_planted_backend_beside_the_engines_own(model: Path) -> None:
    report, status = audit("--backend", "planted_vllm:Backend", "--against", "stock", "--fail-on", "fills,copies")
    planted, stock = report["runs"]
    assert planted["backend"] == "planted_vllm.Implementation"
    assert stock["backend"] == "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackendImpl"
    assert_exactly_what_is_planted(planted["summary"], "planted_vllm")
    assert_no_layer_wastes(stock["summary"])
    assert [step["kind"] for step in planted["steps"]] == ["prefill"] + 3 * ["decode"]
    assert [step["lengths"] for step in planted["steps"]][:2] == [[16, 32, 48, 64], [17, 33, 49, 65]]
    assert status == 1
    assert report["failed"] == ["fills: 2 a decode step", "copies: 2 a decode step"]
