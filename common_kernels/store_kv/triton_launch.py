"""`store_kv` and `store_mla_kv` on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton

from taut.common_kernels.store_kv.triton_store import taut_store_kv
from taut.common_kernels.workspace import device_facts

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
    if slots.shape[0] == 0:
        return
    float8 = key_cache.dtype.itemsize == 1
    if float8:
        key_cache, value_cache = key_cache.view(torch.uint8), value_cache.view(torch.uint8)
    heads, key_size, value_size = *key.shape[1:], value.shape[-1]
    taut_store_kv[(slots.shape[0],)](
        key,
        value,
        key_cache,
        value_cache,
        slots,
        key_scale if key_scale is not None else slots,
        value_scale if value_scale is not None else slots,
        slots.stride(0),
        *key.stride(),
        *value.stride(),
        *key_cache.stride(),
        *value_cache.stride(),
        PAGE_SIZE=key_cache.shape[1],
        HEADS=heads,
        FIRST_SIZE=key_size,
        SECOND_SIZE=value_size,
        HEAD_LANES=triton.next_power_of_2(heads),
        FIRST_LANES=triton.next_power_of_2(key_size),
        SECOND_LANES=triton.next_power_of_2(value_size),
        FLOAT8=float8,
        FIRST_SCALES=_scales(key_scale),
        SECOND_SCALES=_scales(value_scale),
        RELEASES=device_facts(str(key.device)).dependent_launch,
        num_warps=4,
    )


def store_mla_kv(
    latent: Tensor, rope: Tensor, cache: Tensor, slots: Tensor, *, cache_scale: Tensor | None = None
) -> None:
    """See `Kernels.store_mla_kv`: `store_kv` of one head, whose two caches are two views of one."""
    rank = latent.shape[-1]
    store_kv(
        latent[:, None],
        rope[:, None],
        cache[:, :, None, :rank],
        cache[:, :, None, rank:],
        slots,
        key_scale=cache_scale,
        value_scale=cache_scale,
    )


def _scales(scale: Tensor | None) -> int:
    return 0 if scale is None else 1 if scale.numel() == 1 else 2
