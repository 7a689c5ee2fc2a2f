"""Two workers on a CPU, and drafts from the prompt: the same tokens as vLLM's own attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from integration.engine import TOKENS, assert_equal_tokens, assert_ours_served, assert_stock_served, generate

if TYPE_CHECKING:
    from pathlib import Path

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def even_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose heads divide by two, with weights large enough that attention decides what comes out."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, initializer_range=0.1, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_tensor_parallel(even_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # by itself vLLM wants a NUMA node for each worker
    prompts = [[(7 * i + 13 * j) % 250 + 3 for j in range(length)] for i, length in enumerate((5, 17, 40, 64))]
    request = {"model": str(even_model), "prompts": None, "prompt_ids": prompts}
    two = {
        "tensor_parallel_size": 2,
        "skip_tokenizer_init": True,
        "distributed_executor_backend": "mp",
        "in_process": False,
    }
    ours = generate("on", request=request, **two)
    stock = generate("off", request=request, **two)
    assert_ours_served(ours)
    assert_stock_served(stock)
    assert ours.result["token_ids"] == stock.result["token_ids"]
    assert all(len(tokens) == TOKENS for tokens in ours.result["token_ids"])


@pytest.mark.usefixtures("model")
def test_drafts_from_the_prompt() -> None:
    """Several tokens of a row verified at once, of which some are refused."""
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    assert_equal_tokens(generate("on", speculative_config=drafts), generate("off", speculative_config=drafts))
