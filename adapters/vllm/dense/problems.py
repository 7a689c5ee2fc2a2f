"""What a dense layer of vLLM's asks of our kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.attention.backend import AttentionType

from taut.adapters.vllm.selection import CACHE_DTYPES
from taut.adapters.vllm.serving import device
from taut.common_kernels.model import problems_of_model
from taut.common_kernels.problem import Problem
from taut.common_kernels.targets import target_of

if TYPE_CHECKING:
    import torch

# Their keys lie side by side, not in a cache.
ENCODERS = (AttentionType.ENCODER, AttentionType.ENCODER_ONLY)


def problem_of_layer(
    *,
    dtype: torch.dtype,
    kv_cache_dtype: str | None,
    q_heads: int,
    kv_heads: int,
    head_size: int,
    page_size: int,
    attn_type: str = AttentionType.DECODER,
    windowed: bool = False,
    soft_cap: bool = False,
    alibi: bool = False,
    sinks: bool = False,
    head_scales: bool = False,
    left: int = -1,
) -> Problem:
    """What a layer of vLLM asks of our kernels."""
    name = str(dtype).removeprefix("torch.")
    encoder = attn_type in ENCODERS
    wanted = {
        "causal" if attn_type == AttentionType.DECODER else "non_causal": True,
        "window": windowed or left >= 0,
        "soft_cap": soft_cap,
        "alibi": alibi,
        "sinks": sinks,
        "head_scales": head_scales,
    }
    return Problem(
        operation="ragged_attention" if encoder else "paged_attention",
        target=target_of(device()),
        dtype=name,
        cache_dtype=name if encoder else CACHE_DTYPES.get(kv_cache_dtype or "auto", name),
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_size=head_size,
        value_size=head_size,
        page_size=0 if encoder else page_size,
        features=frozenset(feature for feature, needed in wanted.items() if needed),
        left=-1 if encoder else left,
    )


def problem_of_model(config: Any | None, head_size: int) -> Problem | None:
    """What the model that is being built asks of a layer with heads of this size; None where it cannot be told."""
    model = getattr(config, "model_config", None)
    if config is None or model is None:
        return None
    try:
        problems = problems_of_model(
            model.hf_config.to_dict(), target="any", tensor_parallel=config.parallel_config.tensor_parallel_size
        )
    except ValueError:  # a configuration that says it otherwise; a layer says it all when it is made
        return None
    attention = [problem for problem in problems if problem.operation in ("paged_attention", "ragged_attention")]
    return next((problem for problem in attention if problem.head_size == head_size), None)


def has_head_scales(config: Any | None) -> bool:
    """Whether a model's quantised cache has a scale for each key-value head."""
    scheme = getattr(getattr(config, "quant_config", None), "kv_cache_scheme", None) or {}
    return bool(scheme.get("strategy") == "attn_head")
