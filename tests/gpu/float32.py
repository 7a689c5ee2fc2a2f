"""What Hugging Face's model says of prompts in float32, to hold an engine's log-probabilities against.

A cache of fewer bits is modelled by rounding what it would hold; everything else stays as exact as it was.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
import transformers

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from taut.cli.demo import Run

Prompts = list[list[float]]  # of each prompt, the log-probability of each token after its first


def log_probabilities(
    model: Path,
    prompts: Sequence[list[int]],
    cache: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cuda",
) -> Prompts:
    """The log-probability of each token of each prompt, given those before it.

    Args:
        model: its folder, with weights.
        prompts: token numbers.
        cache: what keys and values, or latent vectors, are rounded to; None where they are not.
        dtype: of all else; fewer bits than float32 tell how far from it a right implementation lies.
        device: where it runs; its memory is given back.
    """
    transformers.AttentionInterface.register("of a cache", _attention_of(cache))
    network = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=dtype, attn_implementation="of a cache"
    ).to(device)
    for layer in network.model.layers:
        if hasattr(layer.self_attn, "kv_a_layernorm"):  # latent attention: what comes out of it is cached
            layer.self_attn.kv_a_layernorm.register_forward_hook(lambda _layer, _given, out: rounded(out, cache))
    found = []
    with torch.inference_mode():
        for prompt in prompts:
            tokens = torch.tensor([prompt], device=device)
            logits = network(tokens, use_cache=False).logits[0, :-1].float()
            found.append(logits.log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0].tolist())
    del network
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return found


def rounded(numbers: Tensor, dtype: torch.dtype | None) -> Tensor:
    return numbers if dtype is None else numbers.to(dtype).to(numbers.dtype)


def _attention_of(cache: torch.dtype | None) -> Any:
    """An attention function of `transformers`: causal, over keys and values as a cache would hold them."""

    def attend(
        module: Any,
        query: Tensor,  # [1, Hq, T, D]
        key: Tensor,  # [1, Hk, T, D]
        value: Tensor,  # [1, Hk, T, V]
        attention_mask: object,
        scaling: float | None = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        if hasattr(module, "kv_a_layernorm"):  # the rest of them was projected up from what was rounded
            nope = module.qk_nope_head_dim
            key = torch.cat([key[..., :nope], rounded(key[..., nope:], cache)], -1)
        else:
            key, value = rounded(key, cache), rounded(value, cache)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    return attend


def distance(ours: Prompts, theirs: Prompts) -> float:
    """The mean distance of log-probabilities of the same prompts."""
    pairs = [pair for mine, its in zip(ours, theirs, strict=True) for pair in zip(mine, its, strict=True)]
    return sum(abs(mine - its) for mine, its in pairs) / len(pairs)


def scored(run: Run, prompts: int) -> Prompts:
    """What a run said itself of its first prompts."""
    found: Prompts = run.result["logprobs"][:prompts]
    return found
