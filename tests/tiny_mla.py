"""A tiny DeepSeek-V3 with random weights, and what Hugging Face generates with it: the judge of MLA in an engine.

Latent rank 512 and rope part 64, as in the real ones, since engines know few others. Weights are large enough that
attention decides which token comes next.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pathlib import Path

VOCABULARY = 512


def make(folder: Path, *, experts: bool) -> Path:
    """Write the model: two layers, both dense, or the second one a mixture of four experts."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, moe_intermediate_size=64,
        num_hidden_layers=2, first_k_dense_replace=1 if experts else 2, num_attention_heads=4, num_key_value_heads=4,
        q_lora_rank=64, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1,
        norm_topk_prob=True, routed_scaling_factor=1.0, max_position_embeddings=4096, initializer_range=0.1,
        # The kind of the released models, and the only one that vLLM on a CPU computes as Hugging Face does.
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
            "mscale_all_dim": 1.0, "original_max_position_embeddings": 2048,
        },
        bos_token_id=0, eos_token_id=1, pad_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    DeepseekV3ForCausalLM(config).save_pretrained(folder)
    # The released models say so, engines read it, and transformers does not write it.
    written = folder / "config.json"
    released = {
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 0,
    }
    written.write_text(json.dumps(json.loads(written.read_text()) | released))
    return folder


def greedy(folder: Path, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """The tokens that Hugging Face generates after each prompt, in float32."""
    from transformers import DeepseekV3ForCausalLM

    network = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        every = network.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=None
        )
        answers.append(every[0, len(prompt) :].tolist())
    return answers
