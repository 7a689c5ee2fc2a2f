"""vLLM generates the same tokens through our attention as through its own, in every way it schedules."""

from __future__ import annotations

import re

import pytest

from integration.engine import PROMPTS, assert_equal_tokens, assert_ours_served, assert_stock_served, generate

pytestmark = pytest.mark.usefixtures("model")


def test_plain() -> None:
    assert_equal_tokens(generate("on"), generate(None))


def test_chunked_prefill() -> None:
    """A budget of 16 tokens a step: every prompt of more than a few tokens arrives in pieces, beside decoding rows."""
    long_prompts = {"prompts": [f"{prompt} " + " ".join(PROMPTS) for prompt in PROMPTS]}
    few = {"max_num_batched_tokens": 16, "max_num_seqs": 8, "enable_chunked_prefill": True, "request": long_prompts}
    assert_equal_tokens(generate("on", **few), generate("off", **few))


def test_prefix_caching() -> None:
    """Prompts that share their beginning, two rows at a time: later ones find it in the cache."""
    prefix = "You are a helpful assistant who answers in one short sentence. " * 12
    shared = {"prompts": [prefix + prompt for prompt in PROMPTS]}
    cached = {"enable_prefix_caching": True, "max_num_seqs": 2, "block_size": 32, "request": shared}
    ours = generate("on", **cached)
    assert_equal_tokens(ours, generate("off", **cached))
    assert max(ours.result["cached_tokens"]) >= 96


def test_preemption() -> None:
    """A cache of a few pages: rows are thrown out and computed again."""
    tiny = {
        "num_gpu_blocks_override": 9,
        "block_size": 32,
        "max_model_len": 256,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "request": {"prompts": [prompt + " " + prompt for prompt in PROMPTS]},
    }
    ours = generate("auto", **tiny)
    assert_equal_tokens(ours, generate("off", **tiny))
    assert ours.result["preemptions"] > 0


@pytest.mark.exhaustive  # test_vllm_serve spawns them, too, and asserts that the line is theirs
def test_processes_of_their_own() -> None:
    """vLLM's core and worker are spawned: the line that says who serves comes from there."""
    ours = generate("on", in_process=False)
    assert_equal_tokens(ours, generate(None))
    for line in ours.proof:
        pid = re.search(r"pid=(\d+)", line)
        assert pid
        assert int(pid[1]) != ours.result["pid"]


@pytest.mark.exhaustive  # test_vllm_serve and test_vllm_mla ask for CUSTOM in this way
def test_custom_asked_for_with_the_engines_own_argument() -> None:
    assert_equal_tokens(generate(None, attention_backend="CUSTOM"), generate(None))


def test_auto_leaves_what_it_cannot_serve() -> None:
    """A cache that we cannot read: `auto` leaves the model to vLLM and says so in one line."""
    other_cache = {"kv_cache_dtype": "fp8_e5m2", "request": {"prompts": ["Hello"], "tokens": 2}}
    run = generate("auto", **other_cache)
    assert_stock_served(run)
    lines = [line for line in run.log.splitlines() if "vLLM keeps its own CPU_ATTN" in line]
    assert len(lines) == 1
    assert "fp8_e5m2" in lines[0]


def test_fp8_cache() -> None:
    """A quantised cache, read and written by us: the engine runs and says so."""
    run = generate("on", kv_cache_dtype="fp8", request={"prompts": ["The capital of France is"], "tokens": 8})
    assert_ours_served(run)
    assert "Paris" in run.result["texts"][0]
