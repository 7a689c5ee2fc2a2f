"""The engines' caches as strided views: keys [N, P, Hk, D], values [N, P, Hk, V], latent [N, P, C + E].

No layout is assumed anywhere: a kernel reads the strides. The views only name the dimensions of what an engine hands
over; none of them copies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def packed_cache_views(cache: Tensor, value_size: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a cache that packs both in its last dimension, heads before tokens.

    Args:
        cache: [N, Hk, P, D + V], any strides (vLLM 0.26 and later).
        value_size: V.

    Returns:
        keys [N, P, Hk, D] and values [N, P, Hk, V], views.
    """
    key_size = cache.shape[-1] - value_size
    tokens_first = cache.transpose(1, 2)
    return tokens_first[..., :key_size], tokens_first[..., key_size:]


def slot_cache_view(cache: Tensor) -> Tensor:
    """A cache that is addressed by token slots, seen as pages of one token: [slots, Hk, D] -> [slots, 1, Hk, D]."""
    return cache.unsqueeze(1)


def dequantised(tensor: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Cached elements as numbers: [n, Hk, D] (or [n, D]) times one scale, or times one scale per head.

    A cache that is not quantised has no scale: it was stored without, whatever an engine hands over.
    """
    numbers = tensor.to(dtype)
    if scale is None or tensor.dtype.itemsize > 1:
        return numbers
    return numbers * (scale.to(dtype) if scale.numel() == 1 else scale.to(dtype)[:, None])
