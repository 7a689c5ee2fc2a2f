"""A tiny DeepSeek-V3 generates in vLLM, through our latent attention, what it generates in Hugging Face's float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import tiny_mla

from integration.engine import ENVIRONMENT, assert_ours_served, assert_stock_served
from taut.cli.demo import Run, run_engine

if TYPE_CHECKING:
    from pathlib import Path

TOKENS = 16
PROMPTS = [[(7 * i + 13 * j) % 500 + 3 for j in range(length)] for i, length in enumerate((5, 37, 64, 130, 16, 90))]
PREFIX = [(5 * j) % 500 + 3 for j in range(70)]


@dataclass(frozen=True)
class Model:
    """A model, and the tokens that Hugging Face generates with it after `PROMPTS` and after these behind `PREFIX`."""

    folder: Path
    plain: list[list[int]]
    shared: list[list[int]]


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tiny_mla.make(tmp_path_factory.mktemp("mla"), experts=False)
    shared = [PREFIX + prompt for prompt in PROMPTS]
    return Model(folder, tiny_mla.greedy(folder, PROMPTS, TOKENS), tiny_mla.greedy(folder, shared, TOKENS))


@pytest.fixture(scope="session")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tiny_mla.make(tmp_path_factory.mktemp("experts"), experts=True)
    return Model(folder, tiny_mla.greedy(folder, PROMPTS, TOKENS), [])


def generate(
    model: Model, attention: str | None, *, shared: bool = False, in_process: bool = True, amx: Path | None = None,
    **engine: Any,
) -> Run:  # fmt: skip
    """One run of vLLM, greedy, float32.

    Args:
        model: what is run.
        attention: TAUT_ATTENTION; None leaves it unset.
        shared: whether the prompts begin alike.
        in_process: whether vLLM's core runs in the process of the caller.
        amx: see `pretended_amx`.
        engine: further arguments of vLLM's `LLM`.
    """
    usual = {"max_model_len": 512, "enforce_eager": True, "dtype": "float32", "skip_tokenizer_init": True}
    prompts = [(PREFIX if shared else []) + prompt for prompt in PROMPTS]
    request = {"model": str(model.folder), "prompt_ids": prompts, "tokens": TOKENS, "engine": usual | engine}
    environment = dict(ENVIRONMENT)
    if in_process:
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if amx is not None:
        environment["PYTHONPATH"] = str(amx)
    return run_engine(request, attention, environment)


@pytest.fixture(scope="session")
def pretended_amx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that makes vLLM believe in a CPU with matrix tiles, which alone gets chunks and prefixes with MLA.

    In float32 nothing of vLLM's uses them.
    """
    folder = tmp_path_factory.mktemp("amx")
    code = "import torch\ntorch.cpu._is_amx_tile_supported = lambda: True\n"
    (folder / "sitecustomize.py").write_text(code)
    return folder


def test_plain(dense: Model) -> None:
    ours = generate(dense, "on")
    assert_ours_served(ours)
    assert ours.result["token_ids"] == dense.plain


def test_mixture_of_experts_asked_for_with_the_engines_own_argument(experts: Model) -> None:
    """CUSTOM, in processes that vLLM spawns."""
    ours = generate(experts, None, in_process=False, attention_backend="CUSTOM")
    assert_ours_served(ours)
    assert ours.result["token_ids"] == experts.plain


def test_chunked_prefill_and_prefix_caching(dense: Model, pretended_amx: Path) -> None:
    """Prompts arrive in pieces of 32 tokens beside decoding rows, and find their common beginning in the cache."""
    few = {"max_num_batched_tokens": 32, "max_num_seqs": 2, "block_size": 32, "enable_prefix_caching": True}
    ours = generate(dense, "auto", shared=True, amx=pretended_amx, enable_chunked_prefill=True, **few)
    assert_ours_served(ours)
    assert ours.result["token_ids"] == dense.shared
    assert max(ours.result["cached_tokens"]) >= 64


def test_drafts_of_several_tokens_beside_prefills(dense: Model, pretended_amx: Path) -> None:
    """Rows verify one to four tokens in a step, as many as their texts repeat, beside rows that prefill in pieces."""
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    few = {"max_num_batched_tokens": 48, "max_num_seqs": 3, "block_size": 32, "enable_prefix_caching": True}
    ours = generate(dense, "on", shared=True, amx=pretended_amx, speculative_config=drafts, **few)
    assert_ours_served(ours)
    assert ours.result["token_ids"] == dense.shared


def test_the_engines_own_runs_untouched(dense: Model) -> None:
    """In float32, which CPU_MLA takes: AMX_MLA, vLLM's choice on CPUs with matrix tiles, takes bfloat16 alone."""
    stock = generate(dense, None, attention_backend="CPU_MLA")
    assert_stock_served(stock)
    assert stock.result["token_ids"] == dense.plain
