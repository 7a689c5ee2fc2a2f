"""Models to measure engines with: two built-in shapes whose weights are made up, or a folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taut.benchmarks import BenchmarkError
from taut.common_kernels.model import text_config

# A Llama of 1.2 billion parameters, and the attention of DeepSeek-V2 in twelve layers without experts.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "vocab_size": 32000, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu",
    },
    "deepseek": {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "hidden_size": 2048,
        "intermediate_size": 8192, "num_hidden_layers": 12, "num_attention_heads": 128, "num_key_value_heads": 128,
        "vocab_size": 32000, "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 999, "moe_layer_freq": 1,
        "moe_intermediate_size": 1408, "num_experts_per_tok": 2, "hidden_act": "silu",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A model that an engine is to serve.

    Args:
        name: a built-in shape, or the folder's name.
        config: the content of its `config.json`.
        folder: where it lies; None for a built-in shape.
        weights: whether the folder holds any; without, they are made up.
    """

    name: str
    config: dict[str, Any]
    folder: Path | None
    weights: bool

    @property
    def vocabulary(self) -> int:
        """How many tokens it knows."""
        return int(text_config(self.config).get("vocab_size", 32000))

    @property
    def longest(self) -> int | None:
        """The longest context that it was made for, if it says."""
        found = text_config(self.config).get("max_position_embeddings")
        return int(found) if found else None


def model_named(name: str) -> Model:
    """A built-in shape, or the model of a folder.

    Raises:
        BenchmarkError: it is neither.
    """
    if name in MODELS:
        return Model(name, MODELS[name], None, weights=False)
    folder = Path(name)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        shapes = ", ".join(MODELS)
        raise BenchmarkError(
            f"{name} is no built-in shape ({shapes}) and no folder with a config.json that can be read"
        ) from None
    weights = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    return Model(folder.resolve().name, config, folder.resolve(), weights)
