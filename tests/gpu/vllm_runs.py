"""Runs of vLLM on a GPU over two hundred requests at once, and how they are judged.

Every run of a model gets the same requests: random lengths, every third with a beginning that others share, chunked
prefill, prefix caching, CUDA graphs, and a cache that is too small for them all, so that some are preempted. The runs
are processes that share the GPU, each with a cache of a size given in advance.

Two right kernels differ in the last bits of bfloat16, and a greedy text from there on, so texts are not held against
each other. A last run, the judge, is vLLM with its own attention: it gives each prompt's tokens their log-probability,
which each run's own are held against (prefill), and says of each generated token how far it lies behind the one that it
would have taken itself (decode).
"""

from __future__ import annotations

import json
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from integration.engine import MODEL

from taut.benchmarks.models import MODELS
from taut.cli.demo import EngineFailedError, Run, run_engine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

AT_ONCE = 5  # processes that share the GPU, and the cores of its host


@dataclass(frozen=True)
class Scale:
    """How much is asked of each run.

    Args:
        requests: how many.
        longest: tokens of the longest prompt.
        shared: tokens that every third prompt begins with.
        tokens: to generate after each.
        judged: requests that the judge reads.
        vocabulary: token numbers lie below.
        engine: further arguments of vLLM's `LLM`.
    """

    requests: int
    longest: int
    shared: int
    tokens: int
    judged: int
    vocabulary: int
    engine: dict[str, Any] = field(default_factory=dict)

    def prompts(self) -> list[list[int]]:
        """The same ones each time."""
        numbers = random.Random(0)
        beginning = [numbers.randrange(5, self.vocabulary) for _ in range(self.shared)]
        lengths = [numbers.randrange(1, self.longest - self.shared) for _ in range(self.requests)]
        prompts = [[numbers.randrange(5, self.vocabulary) for _ in range(length)] for length in lengths]
        return [beginning + prompt if i % 3 == 0 else prompt for i, prompt in enumerate(prompts)]


def model_of(name: str, folder: Path) -> Path:
    """The small real model, or one of a shape that everything is measured with, made up in a folder."""
    if name != "smollm2":
        return made_up(folder, MODELS[name])
    if not (MODEL / "config.json").exists():
        pytest.skip("needs the small real model: make model")
    return MODEL


def made_up(folder: Path, shape: dict[str, Any]) -> Path:
    """A model of this shape with random weights large enough that attention decides what comes out."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**shape, initializer_range=0.03)
    with torch.device("cuda"):
        network = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    network.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(shape))
    return folder


@dataclass(frozen=True)
class Asked:
    """One run.

    Args:
        attention: TAUT_ATTENTION, or None to leave it unset.
        engine: what differs from the usual arguments of vLLM's `LLM`.
        environment: further variables.
        score: whether its own log-probabilities of the prompts are wanted.
    """

    attention: str | None
    engine: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    score: bool = True


def run(model: Path, asked: Asked, scale: Scale, prompts: list[list[int]], tokens: int, score: int) -> Run:
    usual: dict[str, Any] = {
        "dtype": "bfloat16", "skip_tokenizer_init": True, "max_model_len": 2 * scale.longest,
        "max_num_batched_tokens": scale.longest // 2, "enable_prefix_caching": True, "disable_log_stats": False,
    }  # fmt: skip
    request = {
        "model": str(model),
        "prompt_ids": prompts,
        "tokens": tokens,
        "score": score,
        "engine": usual | scale.engine | asked.engine,
    }
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TAUT_LOG": "debug"} | asked.environment
    return run_engine(request, asked.attention, environment)


@dataclass(frozen=True)
class Verdict:
    """What became of one run.

    Args:
        run: itself.
        prefill: mean distance of its log-probabilities of the prompts from the judge's, NaN if it was not asked for.
        decode: mean distance of its generated tokens behind those that the judge would have taken.
        wall: seconds that its process took, its start included.
    """

    run: Run
    prefill: float
    decode: float
    wall: float


def judge(
    model: Path, asked: dict[str, Asked], scale: Scale, folder: Path, run: Callable[..., Run] = run
) -> dict[str, Verdict]:
    """Make all runs of a model, then let the engine's own attention judge them, all in one run.

    One line says how each run ended, and its log lies in the folder. A failure is raised when all have ended.

    Args:
        model: its folder.
        asked: the runs by name.
        scale: how much is asked of each.
        folder: where logs and results are kept.
        run: makes one of them; vLLM's, unless another engine is to be judged.
    """
    prompts = scale.prompts()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        waiting = {
            name: pool.submit(
                _watched, name, folder, run, model, one, scale, prompts, scale.tokens, scale.judged if one.score else 0
            )
            for name, one in asked.items()
        }
    timed = {name: future.result() for name, future in waiting.items()}
    runs = {name: one for name, (one, _) in timed.items()}
    texts = [
        prompt + text
        for one in runs.values()
        for prompt, text in zip(prompts[: scale.judged], one.result["token_ids"][: scale.judged], strict=True)
    ]
    read = _watched("judge", folder, run, model, Asked("off"), scale, texts, 1, len(texts))[0].result
    verdicts = {}
    for number, (name, one) in enumerate(runs.items()):
        place = slice(number * scale.judged, (number + 1) * scale.judged)
        own, best = read["logprobs"][place], read["best_logprobs"][place]
        distances, shortfalls = [], []
        for i, prompt in enumerate(prompts[: scale.judged]):
            split = len(prompt) - 1
            if asked[name].score:
                mine = one.result["logprobs"][i]
                distances += [abs(a - b) for a, b in zip(mine, own[i][:split], strict=True)]
            shortfalls += [b - a for a, b in zip(own[i][split:], best[i][split:], strict=True)]
        verdicts[name] = Verdict(one, _mean(distances), _mean(shortfalls), timed[name][1])
    return verdicts


def _watched(name: str, folder: Path, run: Callable[..., Run], *arguments: Any) -> tuple[Run, float]:
    """A run and the seconds it took; what it said and made is kept."""
    began = time.monotonic()
    file = folder / re.sub(r"\W+", "-", name)
    try:
        made = run(*arguments)
    except EngineFailedError as failure:
        file.with_suffix(".log").write_text(str(failure))
        print(f"{name}: failed after {time.monotonic() - began:.0f} s", flush=True)  # noqa: T201
        raise
    took = time.monotonic() - began
    file.with_suffix(".log").write_text(made.log)
    file.with_suffix(".json").write_text(json.dumps(made.result))
    print(f"{name}: {took:.0f} s", flush=True)  # noqa: T201
    return made, took


def _mean(numbers: Iterable[float]) -> float:
    numbers = list(numbers)
    return sum(numbers) / len(numbers) if numbers else float("nan")


def figures(verdicts: dict[str, Verdict]) -> str:
    """The verdicts as text, for whoever runs the tests with -s."""
    return json.dumps(
        {
            name: {
                "prefill": round(verdict.prefill, 5),
                "decode": round(verdict.decode, 5),
                "preemptions": verdict.run.result["preemptions"],
                "cached": sum(verdict.run.result["cached_tokens"]),
                "seconds": round(verdict.run.result["seconds"], 2),
                "wall": round(verdict.wall),
            }
            for name, verdict in verdicts.items()
        },
        indent=1,
    )
