"""Runs of the real engine with the real model, each in a process of its own, as users start it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from taut.cli.demo import Run, run_engine

MODEL = Path(__file__).resolve().parents[2] / ".models" / "SmolLM2-135M-Instruct"

PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a little robot who",
    "def fibonacci(n):",
    "The three primary colours are red, blue and",
    "Water boils at a temperature of",
    "Dear Sir or Madam, I am writing to",
    "1, 1, 2, 3, 5, 8, 13,",
    "The difference between a list and a tuple in Python is that a list can be changed, while a tuple",
)
TOKENS = 32
# Idle threads sleep instead of spinning: on two cores a spinning one takes the time of whoever works.
ENVIRONMENT = {"TAUT_LOG": "debug", "OMP_WAIT_POLICY": "PASSIVE"}


@cache
def _run(request: str, attention: str | None, environment: tuple[tuple[str, str], ...]) -> Run:
    return run_engine(json.loads(request), attention, ENVIRONMENT | dict(environment))


def generate(
    attention: str | None, *, in_process: bool = True, request: dict[str, Any] | None = None, **engine: Any
) -> Run:
    """One run of vLLM over the prompts above, greedy, float32; equal requests run once a session.

    Args:
        attention: TAUT_ATTENTION; None leaves it unset.
        in_process: whether vLLM's core runs in the process of the caller.
        request: what differs from the usual request.
        engine: further arguments of vLLM's `LLM`.
    """
    asked = {
        "model": str(MODEL),
        "prompts": list(PROMPTS),
        "tokens": TOKENS,
        "engine": {"max_model_len": 512, "enforce_eager": True, "dtype": "float32", **engine},
        **(request or {}),
    }
    environment = (("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),) if in_process else ()
    return _run(json.dumps(asked), attention, environment)


def assert_ours_served(run: Run) -> None:
    """The engine's own process said that it serves through us, and that a step ran there."""
    assert run.proof, run.log[-2000:]
    assert "first step:" in run.log, run.log[-2000:]


def assert_stock_served(run: Run) -> None:
    assert not run.proof
    assert "first step:" not in run.log


def assert_equal_tokens(ours: Run, stock: Run) -> None:
    """Token by token, every prompt, and as many as were asked for."""
    assert_stock_served(stock)
    assert_ours_served(ours)
    assert len(ours.result["token_ids"]) == len(stock.result["token_ids"]) >= len(PROMPTS)
    for mine, theirs in zip(ours.result["token_ids"], stock.result["token_ids"], strict=True):
        assert len(mine) == TOKENS
        assert mine == theirs
