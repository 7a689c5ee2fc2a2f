"""Drafts in SGLang's CPU engine, made and verified through our attention: as many are accepted as must be."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("sglang", reason="needs SGLang's CPU engine: make sglang")

import torch
import transformers

from integration.sglang_engine import generate

if TYPE_CHECKING:
    from pathlib import Path

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [7] * 3, [500, 400, 300, 200, 100] * 4]
DRAFTS, TOKENS = 3, 24


def test_a_model_that_drafts_for_itself(model: Path) -> None:
    """The right tokens, after as few verifications as the same model needs without an engine.

    Not all drafts can be accepted: SGLang lets a draft model read a text without its first token.
    """
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    @cache
    def following(text: tuple[int, ...]) -> int:
        with torch.inference_mode():
            return int(network(torch.tensor([text])).logits[0, -1].argmax())

    def greedy(text: list[int], tokens: int) -> list[int]:
        found = tuple(text)
        for _ in range(tokens):
            found += (following(found),)
        return list(found[len(text) :])

    right = [greedy(prompt, TOKENS) for prompt in PROMPTS]
    needed = []
    for prompt, text in zip(PROMPTS, right, strict=True):
        there, verifications = 1, 0  # the prompt's own step gives a token
        while there < TOKENS:
            drafts = greedy((prompt + text[:there])[1:], DRAFTS)
            agree = [draft == token for draft, token in zip(drafts, text[there:], strict=False)]
            there += [*agree, False].index(False) + 1
            verifications += 1
        needed.append(verifications)

    asked: dict[str, Any] = {
        "speculative_algorithm": "STANDALONE", "speculative_draft_model_path": str(model),
        "speculative_num_steps": DRAFTS, "speculative_eagle_topk": 1, "speculative_num_draft_tokens": DRAFTS + 1,
        "speculative_draft_attention_backend": "taut", "disable_radix_cache": True,
    }  # fmt: skip
    ours = generate("on", [[prompt] for prompt in PROMPTS] + [PROMPTS], model=model, tokens=TOKENS, **asked)
    ours.assert_ours_served("dense")
    assert ours.ids == [[text] for text in right] + [right]
    assert ours.verified == [[count] for count in needed] + [needed]
    assert sum(needed) < len(PROMPTS) * TOKENS / 2
