"""SGLang on a GPU through our attention, everything at once, judged by its own `triton` (see `vllm_runs`).

What runs say of prompts is held against a model in float32 (see `float32`): `triton` gives a row nearly the same
numbers whatever batch it is in, so that how far it lies from itself is no measure of another right kernel.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch

pytest.importorskip("sglang", reason="needs SGLang beside a GPU")
pytest.importorskip("transformers")

from gpu.float32 import Prompts, distance, log_probabilities, scored
from gpu.vllm_runs import Asked, Scale, Verdict, figures, judge, model_of
from taut.benchmarks.models import MODELS
from taut.cli.demo import EngineFailedError, Run, run_engine

if TYPE_CHECKING:
    from pathlib import Path

# A cache that is too small for them all, so that some are retracted; prompts are cut into chunks.
SCALE = Scale(
    requests=200, longest=1500, shared=300, tokens=64, judged=24, vocabulary=31999,
    engine={
        "max_total_tokens": 24_000, "max_running_requests": 200, "chunked_prefill_size": 2048,
        # Given, not measured, for several processes share the GPU: what is left to nobody is little.
        "schedule_conservativeness": 0.1, "mem_fraction_static": 0.95,
        # Few graphs, for each takes its time to capture: most batches are padded, some prompts fit none.
        "cuda_graph_bs_decode": [1, 16, 64, 128, 200], "cuda_graph_bs_prefill": [64, 256, 2048],
        "decode_log_interval": 5,
    },
)  # fmt: skip
RETRACTED = "KV cache pool is full. Retract"


def run(model: Path, asked: Asked, scale: Scale, prompts: list[list[int]], tokens: int, score: int) -> Run:
    """One run of SGLang; stock is `triton`."""
    usual: dict[str, Any] = {
        "dtype": "bfloat16", "skip_tokenizer_init": True, "context_length": 2 * scale.longest,
        "sampling_backend": "pytorch", "log_level": "info", "skip_server_warmup": True,
    }  # fmt: skip
    stock = {"attention_backend": "triton"} if asked.attention == "off" else {}
    request = {
        "model": str(model),
        "prompt_ids": prompts,
        "tokens": tokens,
        "score": score,
        "engine": usual | scale.engine | stock | asked.engine,
    }
    environment = {"TAUT_LOG": "debug"} | asked.environment
    return run_engine(request, asked.attention, environment, "taut.cli.generate_sglang")


def drafts_by(model: Path, attention: str) -> dict[str, Any]:
    """Arguments with which a model drafts for itself, three tokens of a step's four, with this attention."""
    return {
        "speculative_algorithm": "STANDALONE", "speculative_draft_model_path": str(model),
        "speculative_num_steps": 3, "speculative_eagle_topk": 1, "speculative_num_draft_tokens": 4,
        "speculative_draft_attention_backend": attention,
    }  # fmt: skip


FP8 = {"kv_cache_dtype": "fp8_e4m3"}
EAGER = {"disable_cuda_graph": True, "disable_overlap_schedule": True}
DRAFTS = {"taut, drafts by triton": "triton", "taut, drafts": "taut"}  # by whose attention the draft model drafts


def runs_of(name: str, model: Path) -> dict[str, Asked]:
    """The runs of one model, each a start of SGLang; CUDA graphs on but for one."""
    asked = {
        "stock": Asked("off"),
        "taut": Asked("on"),
        "stock, fp8": Asked("off", FP8),
        "taut, fp8, own flag": Asked(None, FP8 | {"attention_backend": "taut"}),
    }
    if name != "llama":
        asked["taut, eager"] = Asked("auto", EAGER, score=False)
    if name == "smollm2":  # the same model drafts for itself: nearly every draft is accepted
        asked |= {run: Asked("on", drafts_by(model, attention), score=False) for run, attention in DRAFTS.items()}
    if torch.cuda.device_count() > 1 and name != "smollm2":  # which has nine heads
        # The others fill the first GPU alone, which SGLang takes for a mistake.
        unequal = {"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"}
        asked["taut, two GPUs"] = Asked("on", {"tp_size": 2}, unequal)
    return asked


@pytest.fixture(scope="module", params=["smollm2", "llama", "deepseek"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder, of its name."""
    return model_of(request.param, tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="module")
def exact(model: Path) -> dict[str, Prompts]:
    """What a model in float32 says of the prompts, one whose cache is of fp8, and that one in bfloat16."""
    prompts, fp8 = SCALE.prompts()[: SCALE.judged], torch.float8_e4m3fn
    return {
        "exact": log_probabilities(model, prompts),
        "fp8": log_probabilities(model, prompts, fp8),
        "bfloat16, fp8": log_probabilities(model, prompts, fp8, torch.bfloat16),
    }


@pytest.fixture(scope="module")
def verdicts(model: Path, exact: dict[str, Prompts], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Verdict]:
    """All runs of one model, judged, when the GPU is free of the one in float32."""
    name = next(name for name in ("smollm2", *MODELS) if name in model.name.lower())
    found = judge(model, runs_of(name, model), SCALE, tmp_path_factory.mktemp("runs"), run)
    print(name, figures(found))  # noqa: T201 - for whoever runs this with -s
    return found


def test_who_served(verdicts: dict[str, Verdict]) -> None:
    for name, verdict in verdicts.items():
        assert bool(verdict.run.proof) == name.startswith("taut"), name


def test_everything_happened(verdicts: dict[str, Verdict]) -> None:
    """Rows were retracted, beginnings were found in the cache, and every request got all its tokens."""
    for name, verdict in verdicts.items():
        result = verdict.run.result
        assert RETRACTED in verdict.run.log, name
        assert sum(result["cached_tokens"]) > 0, name
        assert [len(tokens) for tokens in result["token_ids"]] == [SCALE.tokens] * SCALE.requests, name


def test_prompts_as_near_to_float32_as_triton(verdicts: dict[str, Verdict], exact: dict[str, Prompts]) -> None:
    """Where the cache is of fp8 we attend to what it holds, as vLLM does; `triton` to a prompt's own keys in bfloat16.

    There ours are held against a model whose cache is rounded. Its numbers jump where a key in bfloat16 is rounded to
    another one in fp8 than a key in float32; how far that leads is what the same model in bfloat16 shows.
    """
    jumps = distance(exact["bfloat16, fp8"], exact["fp8"])
    off = {
        name: {kind: distance(scored(verdict.run, SCALE.judged), numbers) for kind, numbers in exact.items()}
        for name, verdict in verdicts.items()
        if verdict.prefill == verdict.prefill
    }
    print(f"bfloat16, fp8: {jumps:.4f}", off)  # noqa: T201 - for whoever runs this with -s
    for name, by in off.items():
        if name.startswith("taut") and "fp8" in name:
            assert by["fp8"] <= 1.2 * jumps + 1e-3, name
        elif name.startswith("taut"):
            assert by["exact"] <= 1.2 * off["stock"]["exact"] + 1e-3, name


def test_generated_tokens_as_near_as_stock(verdicts: dict[str, Verdict]) -> None:
    for name, verdict in verdicts.items():
        if name.startswith("taut"):
            stock = verdicts["stock, fp8" if "fp8" in name else "stock"].decode
            assert verdict.decode <= 2 * stock + 1e-2, name


def test_our_drafts_are_accepted_as_those_of_triton(verdicts: dict[str, Verdict]) -> None:
    """A model that drafts for itself with attention that is wrong drafts what it does not accept."""
    if not DRAFTS.keys() <= verdicts.keys():
        pytest.skip("of the small real model alone")
    accepted = {}
    for name, attention in DRAFTS.items():
        lengths = [float(length) for length in re.findall(r"accept len: ([\d.]+)", verdicts[name].run.log)]
        accepted[attention] = sum(lengths) / len(lengths)
    print(accepted)  # noqa: T201 - for whoever runs this with -s
    assert accepted["triton"] > 2
    assert accepted["taut"] > 0.95 * accepted["triton"]


def test_trees_of_drafts_stop_the_server_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODELS["llama"]))
    asked = Asked("on", {"speculative_algorithm": "NGRAM", "speculative_num_draft_tokens": 4, "load_format": "dummy"})
    with pytest.raises(EngineFailedError, match="verifies trees"):
        run(tmp_path, asked, SCALE, [[5, 6, 7]], 2, 0)


def test_as_many_tokens_fit_the_pool_as_with_triton(tmp_path: Path) -> None:
    """One after the other, alone on the GPU: SGLang measures what is free."""
    (tmp_path / "config.json").write_text(json.dumps(MODELS["deepseek"]))
    alone = {"max_total_tokens": None, "mem_fraction_static": 0.8, "load_format": "dummy", "disable_cuda_graph": True}
    room = {name: run(tmp_path, Asked(name, alone), SCALE, [[5, 6, 7]], 2, 0).log for name in ("off", "on")}
    fits = {name: max(int(n) for n in re.findall(r"max_total_num_tokens=(\d+)", log)) for name, log in room.items()}
    print(fits)  # noqa: T201 - for whoever runs this with -s
    # SGLang sizes the pool by the memory that is free, which differs by some MiB from start to start.
    assert fits["on"] >= 0.999 * fits["off"]
