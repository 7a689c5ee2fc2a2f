"""Models whose attention is more than causal: vLLM through ours gives what Hugging Face gives in float32.

Tiny ones with random weights, such that attention decides what comes out and a last token does not repeat itself for
ever: without the window, the cap or the slopes each text of more than one prompt is another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from integration.engine import ENVIRONMENT, MODEL, assert_ours_served
from taut.cli.demo import Run, run_engine

if TYPE_CHECKING:
    from pathlib import Path

transformers = pytest.importorskip("transformers")

TOKENS = 16
PROMPTS = [[(7 * i + 13 * j) % 500 + 3 for j in range(length)] for i, length in enumerate((5, 37, 64, 130))]
SPECIAL = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


def through_ours(folder: Path, **request: Any) -> Run:
    engine = {"max_model_len": 256, "enforce_eager": True, "dtype": "float32", **request.pop("engine", {})}
    environment = ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    run = run_engine({"model": str(folder), "prompt_ids": PROMPTS, "engine": engine, **request}, "on", environment)
    assert_ours_served(run)
    return run


def greedy(network: Any) -> list[list[int]]:
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        every = network.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None
        )
        answers.append(every[0, len(prompt) :].tolist())
    return answers


def assert_same_text(network: Any, folder: Path) -> None:
    network.save_pretrained(folder)
    run = through_ours(folder, tokens=TOKENS, engine={"skip_tokenizer_init": True})
    expected = greedy(network)
    assert len(set(expected[-1])) > 4
    assert run.result["token_ids"] == expected


def test_sliding_windows_and_a_soft_cap(tmp_path: Path) -> None:
    """Every second layer sees 24 tokens, and all cap their scores."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, sliding_window=24, query_pre_attn_scalar=32, attn_logit_softcapping=5.0,
        final_logit_softcapping=30.0, max_position_embeddings=512, initializer_range=0.2,
        attn_implementation="eager", **SPECIAL,
    )  # fmt: skip
    network = transformers.Gemma2ForCausalLM(config)
    network.get_input_embeddings().weight.data.mul_(0.05)
    assert_same_text(network, tmp_path)


def test_slopes_in_place_of_positions(tmp_path: Path) -> None:
    """ALiBi."""
    torch.manual_seed(0)
    config = transformers.BloomConfig(hidden_size=128, n_layer=2, n_head=4, initializer_range=0.1, **SPECIAL)
    network = transformers.BloomForCausalLM(config)
    for block in network.transformer.h:
        block.self_attention.dense.weight.data.mul_(20)
        block.mlp.dense_4h_to_h.weight.data.mul_(20)
    assert_same_text(network, tmp_path)


@pytest.mark.usefixtures("model")
def test_an_encoder(tmp_path: Path) -> None:
    """Every token sees all others, and nothing is cached."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, initializer_range=0.2,
        **SPECIAL,
    )  # fmt: skip
    network = transformers.BertModel(config).eval()
    network.save_pretrained(tmp_path)
    # vLLM wants a tokenizer for embeddings; the prompts are tokens already.
    run = through_ours(tmp_path, embed=True, engine={"runner": "pooling", "tokenizer": str(MODEL)})
    for prompt, embedding in zip(PROMPTS, run.result["embeddings"], strict=True):
        with torch.no_grad():
            first = network(torch.tensor([prompt])).last_hidden_state[0, 0]
        torch.testing.assert_close(torch.tensor(embedding), torch.nn.functional.normalize(first, dim=0))
