"""Which engine the demo runs, and how: the engines themselves are for the integration tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import typer

from taut.cli import UserError, demo

if TYPE_CHECKING:
    from pathlib import Path

PROOF = "taut INFO [pid=7] taut 0 serves dense attention in an engine"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def installed(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: name if name in modules else None)


def runs(
    monkeypatch: pytest.MonkeyPatch, texts: dict[str, str]
) -> list[tuple[str, dict[str, Any], dict[str, str], str]]:
    """Let the engine answer `texts` by TAUT_ATTENTION; gives what it was asked."""
    asked = []

    def run(request: dict[str, Any], attention: str, environment: dict[str, str], module: str) -> demo.Run:
        asked.append((attention, request["engine"], environment, module))
        answers = [texts[attention]] * len(demo.QUESTIONS)
        result = {"texts": answers, "token_ids": [list(answer.encode()) for answer in answers], "seconds": 1.0}
        return demo.Run(result, PROOF if attention == "on" else "")

    monkeypatch.setattr(demo, "run_engine", run)
    return asked


@pytest.mark.parametrize(
    ("modules", "runner"),
    [
        (("torch", "vllm"), "taut.cli.generate"),
        (("torch", "vllm", "sglang"), "taut.cli.generate"),
        (("torch", "sglang"), "taut.cli.generate_sglang"),
    ],
)
def test_the_engine_that_is_installed(
    modules: tuple[str, ...], runner: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, *modules)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked = runs(monkeypatch, {"off": "Paris", "on": "Paris"})
    demo.command(model)
    assert [attention for attention, *_ in asked] == ["off", "on"]
    assert {module for *_, module in asked} == {runner}
    if runner == "taut.cli.generate_sglang":
        (_, stock, variables, _), (_, ours, _, _) = asked
        assert stock == ours | {"attention_backend": "torch_native"}
        assert ours["device"] == "cpu"
        assert variables["SGLANG_USE_CPU_ENGINE"] == "1"


def test_a_gpu_needs_no_crutches(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "torch", "sglang")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = runs(monkeypatch, {"off": "Paris", "on": "Paris"})
    demo.command(model)
    assert all(not variables and engine["dtype"] == "bfloat16" for _, engine, variables, _ in asked)
    assert all("attention_backend" not in engine for _, engine, _, _ in asked)


def test_another_text_fails(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "torch", "sglang")
    runs(monkeypatch, {"off": "Paris", "on": "Rome"})
    with pytest.raises(typer.Exit):
        demo.command(model)


def test_without_an_engine(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "torch")
    with pytest.raises(UserError, match=r"an engine is missing here: `make demo`"):
        demo.command(model)
