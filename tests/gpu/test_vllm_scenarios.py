"""vLLM on a GPU through our attention, everything at once, judged by vLLM with its own (see `vllm_runs`)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM beside a GPU")
pytest.importorskip("transformers")

from gpu.vllm_runs import Asked, Scale, Verdict, figures, judge, model_of

DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
COMPILED = re.compile(r"during inference: (\S+?)[.( ]")
KERNELS = Path(__file__).resolve().parents[2] / "common_kernels"
# Another stock backend, to tell how far two right ones lie apart. Latent attention has none: the default attends
# in the form of a decode to rows of up to 512 tokens, and the others, in releases that order rows by their tokens, lose
# the context of rows that stand behind one without.
OTHER = {"smollm2": "TRITON_ATTN", "llama": "TRITON_ATTN"}
SCALE = Scale(
    requests=200, longest=1500, shared=300, tokens=64, judged=24, vocabulary=31999,
    engine={
        # Given, not measured: several processes share the GPU.
        "gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 4 << 30,
        "num_gpu_blocks_override": 700, "block_size": 64, "max_num_seqs": 256,
        "compilation_config": {
            "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 192, 256],
        },
    },
)  # fmt: skip
# Waits and compilations that are found end the run; its log-probabilities of prompts would wait by themselves.
STRICT = Asked("on", environment={"VLLM_GPU_SYNC_CHECK": "error"}, score=False)


@pytest.fixture(scope="module", params=["smollm2", "llama", "deepseek"])
def verdicts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Verdict]:
    """All runs of one model, judged."""
    name = request.param
    model = model_of(name, tmp_path_factory.mktemp(name))
    fp8 = {"kv_cache_dtype": "fp8"}
    # A real model repeats itself: its drafts are taken, its requests end soon, and so few never fill the usual cache.
    drafts = {"speculative_config": DRAFTS} | ({"num_gpu_blocks_override": 60} if name == "smollm2" else {})
    asked = {  # the first ones side by side: one of ours compiles what the others then find compiled
        "taut": Asked("on"),
        "stock": Asked("off"),
        "stock, fp8": Asked("off", fp8),
        "taut, fp8": Asked("on", fp8),
        "taut, own flag": Asked(None, {"attention_backend": "CUSTOM"}),
        "taut, strict": STRICT,
        "taut, drafts": Asked("auto", drafts, score=False),
        "stock, drafts": Asked("off", drafts, score=False),
    }
    if name in OTHER:
        asked["other stock"] = Asked("off", {"attention_backend": OTHER[name]})
    if torch.cuda.device_count() > 1 and name != "smollm2":  # which has nine heads
        two, several = {"tensor_parallel_size": 2}, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        asked["taut, two GPUs"] = Asked("on", two, several)
        if name == "deepseek":  # each GPU has every other token of the cache, and they merge by their LSE
            half = two | {"decode_context_parallel_size": 2, "num_gpu_blocks_override": 350}
            asked["taut, cache on two GPUs"] = Asked("on", half, several)
    found = judge(model, asked, SCALE, tmp_path_factory.mktemp("runs"))
    print(name, figures(found))  # noqa: T201 - for whoever runs this with -s
    return found


def test_who_served(verdicts: dict[str, Verdict]) -> None:
    for name, verdict in verdicts.items():
        assert bool(verdict.run.proof) == name.startswith("taut"), name


def test_everything_happened(verdicts: dict[str, Verdict]) -> None:
    """Rows were preempted, beginnings were found in the cache, and every request got all its tokens."""
    for name, verdict in verdicts.items():
        result = verdict.run.result
        assert result["preemptions"] > 0, name
        assert sum(result["cached_tokens"]) > 0, name
        assert [len(tokens) for tokens in result["token_ids"]] == [SCALE.tokens] * SCALE.requests, name


def yardstick(name: str, verdicts: dict[str, Verdict]) -> Verdict:
    """The stock run that one of ours is held against: of the same cache or with drafts too, or else another backend."""
    stock = next((f"stock, {kind}" for kind in ("fp8", "drafts") if kind in name), "other stock")
    return verdicts[stock if stock in verdicts else "stock"]


def test_prompts_as_near_as_stock(verdicts: dict[str, Verdict]) -> None:
    for name, verdict in verdicts.items():
        if name.startswith("taut") and verdict.prefill == verdict.prefill:
            assert verdict.prefill <= 1.5 * yardstick(name, verdicts).prefill + 1e-3, name


def test_generated_tokens_as_near_as_stock(verdicts: dict[str, Verdict]) -> None:
    for name, verdict in verdicts.items():
        if name.startswith("taut"):
            assert verdict.decode <= 2 * yardstick(name, verdicts).decode + 1e-2, name


def test_nothing_of_ours_compiles_while_serving(verdicts: dict[str, Verdict]) -> None:
    ours = {name for file in KERNELS.rglob("*.py") for name in re.findall(r"^def (taut_\w+)\(", file.read_text(), re.M)}
    assert ours
    for name, verdict in verdicts.items():
        compiled = set(COMPILED.findall(verdict.run.log))
        assert not compiled & ours, name
