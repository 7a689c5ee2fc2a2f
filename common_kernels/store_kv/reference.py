"""`store_kv` and `store_mla_kv` in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def store_kv(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    *,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> None:
    """See `Kernels.store_kv`."""
    tokens, page, place = _destinations(slots, key_cache.shape[1])
    _bytes(key_cache)[page, place] = _bytes(quantised(key[tokens], key_scale, key_cache.dtype))
    _bytes(value_cache)[page, place] = _bytes(quantised(value[tokens], value_scale, value_cache.dtype))


def store_mla_kv(
    latent: Tensor, rope: Tensor, cache: Tensor, slots: Tensor, *, cache_scale: Tensor | None = None
) -> None:
    """See `Kernels.store_mla_kv`."""
    tokens, page, place = _destinations(slots, cache.shape[1])
    rank = latent.shape[-1]
    stored = _bytes(cache)
    stored[..., :rank][page, place] = _bytes(quantised(latent[tokens], cache_scale, cache.dtype))
    stored[..., rank:][page, place] = _bytes(quantised(rope[tokens], cache_scale, cache.dtype))


def quantised(tensor: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[n, Hk, D] (or [n, D]) divided by one scale, or one per head, and rounded to `dtype`; float8 saturates."""
    if dtype.itemsize > 1:
        return tensor.to(dtype)
    numbers = tensor.float()
    if scale is not None:
        numbers = numbers / (scale.float() if scale.numel() == 1 else scale.float()[:, None])
    limit = torch.finfo(dtype).max
    return numbers.clamp(-limit, limit).to(dtype)


def _destinations(slots: Tensor, page_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the tokens that are to be written: which they are, and the page and the place in it of each; int64."""
    tokens = (slots >= 0).nonzero()[:, 0]
    slots = slots[tokens].long()
    return tokens, slots // page_size, slots % page_size


def _bytes(tensor: Tensor) -> Tensor:
    """A float8 tensor as bytes, since torch does not scatter float8; any other as it is."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
