"""`taut audit` on vLLM's CPU engine finds what was planted in a backend, at its lines, and nothing in ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

pytest.importorskip("vllm", reason="needs vLLM's CPU engine")

import tiny_mla

from integration.audited import LENGTHS, assert_exactly_what_is_planted, assert_ours_wastes_nothing, audit

if TYPE_CHECKING:
    from pathlib import Path


def test_a_planted_backend_beside_ours(model: Path) -> None:
    """The planted one is vLLM's own, which wastes nothing in a layer, with one waste of each kind."""
    report, status = audit("--backend", "planted_vllm:Backend", "--against", "taut", "--fail-on", "fills,copies")
    planted, ours = report["runs"]
    assert planted["backend"] == "planted_vllm.Implementation"
    assert_exactly_what_is_planted(planted["summary"], "planted_vllm")
    assert_ours_wastes_nothing(ours, outputs=0)
    for run in (planted, ours):
        assert [step["kind"] for step in run["steps"]] == ["prefill", "decode", "decode"]
        assert [step["lengths"] for step in run["steps"]] == LENGTHS
    assert (ours["padding"]["rows"], ours["padding"]["finite"]) == (3, True)
    assert status == 1
    assert report["failed"] == ["fills: 2 a decode step", "copies: 2 a decode step"]


def test_latent_attention_of_ours(tmp_path: Path) -> None:
    """A layer stores, attends and merges, says what it splits, and leaves numbers in rows without work."""
    folder = tiny_mla.make(tmp_path, experts=False)
    report, status = audit("--backend", "taut", "--fail-on", "fills,copies,not_finite", model=folder, dtype="bfloat16")
    (ours,) = report["runs"]
    assert_ours_wastes_nothing(ours, outputs=0, launches=3)
    assert (ours["summary"]["steps"], ours["summary"]["left_out"]) == (2, 0)
    assert (ours["padding"]["rows"], ours["padding"]["finite"]) == (3, True)
    assert (status, report["failed"]) == (0, [])
