"""What a layer of latent attention asks of our kernels: one thing for decode, another for prefill."""

from __future__ import annotations

from typing import TYPE_CHECKING

from taut.adapters.vllm.selection import CACHE_DTYPES
from taut.adapters.vllm.serving import device
from taut.common_kernels.problem import Problem
from taut.common_kernels.targets import target_of

if TYPE_CHECKING:
    import torch


def decode_problem(
    *, dtype: torch.dtype, kv_cache_dtype: str | None, q_heads: int, head_size: int, rank: int, page_size: int
) -> Problem:
    """What the decode of a layer asks of our kernels; `head_size` is that of a cached token, `rank` of its latent."""
    name = str(dtype).removeprefix("torch.")
    return Problem(
        operation="mla_decode",
        target=target_of(device()),
        dtype=name,
        cache_dtype=CACHE_DTYPES.get(kv_cache_dtype or "auto", name),
        q_heads=q_heads,
        kv_heads=1,
        head_size=head_size,
        value_size=rank,
        page_size=page_size,
        features=frozenset({"causal"}),
    )


def prefill_problem(*, dtype: torch.dtype, heads: int, key_size: int, value_size: int) -> Problem:
    """What the prefill of a layer asks of our kernels: keys and values multiplied out, one of each per query head."""
    name = str(dtype).removeprefix("torch.")
    return Problem(
        operation="ragged_attention",
        target=target_of(device()),
        dtype=name,
        cache_dtype=name,
        q_heads=heads,
        kv_heads=heads,
        head_size=key_size,
        value_size=value_size,
        page_size=0,
        features=frozenset({"causal", "non_causal", "lse"}),
    )
