"""`store_kv` and `store_mla_kv` on the device: one program a token, quantising on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from taut.common_kernels.float8 import encode
from taut.common_kernels.workspace import device_facts

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def _copy(
    source: tl.tensor,
    target: tl.tensor,
    source_stride_h: tl.tensor,
    source_stride_d: tl.tensor,
    target_stride_h: tl.tensor,
    target_stride_d: tl.tensor,
    scale: tl.tensor,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    HEAD_LANES: tl.constexpr,
    SIZE_LANES: tl.constexpr,
    QUANTISE: tl.constexpr,
    SCALES: tl.constexpr,  # 0: none; 1: one for all heads; 2: one each
) -> None:
    """One token's vectors, [HEADS, SIZE], from one place to another."""
    heads = tl.arange(0, HEAD_LANES)[:, None]
    columns = tl.arange(0, SIZE_LANES)[None, :]
    here = (heads < HEADS) & (columns < SIZE)
    numbers = tl.load(source + heads * source_stride_h + columns * source_stride_d, mask=here, other=0.0)
    if QUANTISE:
        numbers = numbers.to(tl.float32)
        if SCALES == 1:
            numbers = numbers / tl.load(scale)
        elif SCALES == 2:
            numbers = numbers / tl.load(scale + heads, mask=heads < HEADS, other=1.0)
        stored = encode(numbers)
    else:
        stored = numbers.to(target.dtype.element_ty)
    tl.store(target + heads * target_stride_h + columns * target_stride_d, stored, mask=here)


@triton.jit
def taut_store_kv(
    first: tl.tensor,  # keys, or latents as one head
    second: tl.tensor,  # values, or ropes
    first_cache: tl.tensor,
    second_cache: tl.tensor,
    slots: tl.tensor,
    first_scale: tl.tensor,
    second_scale: tl.tensor,
    slot_stride: tl.tensor,
    first_stride_t: tl.tensor,
    first_stride_h: tl.tensor,
    first_stride_d: tl.tensor,
    second_stride_t: tl.tensor,
    second_stride_h: tl.tensor,
    second_stride_d: tl.tensor,
    first_stride_page: tl.tensor,
    first_stride_place: tl.tensor,
    first_stride_head: tl.tensor,
    first_stride_column: tl.tensor,
    second_stride_page: tl.tensor,
    second_stride_place: tl.tensor,
    second_stride_head: tl.tensor,
    second_stride_column: tl.tensor,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    HEAD_LANES: tl.constexpr,  # powers of two, at least HEADS, FIRST and SECOND
    FIRST_LANES: tl.constexpr,
    SECOND_LANES: tl.constexpr,
    QUANTISE: tl.constexpr,
    FIRST_SCALES: tl.constexpr,
    SECOND_SCALES: tl.constexpr,
    OVERLAPPED: tl.constexpr,  # whether attention may be launched before this kernel has ended: it waits by itself
) -> None:
    """One program stores both vectors of one token, unless its slot is negative."""
    if OVERLAPPED:
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token * slot_stride).to(tl.int64)
    if slot >= 0:
        page, place = slot // PAGE, slot % PAGE
        _copy(
            first + token * first_stride_t,
            first_cache + page * first_stride_page + place * first_stride_place,
            first_stride_h,
            first_stride_d,
            first_stride_head,
            first_stride_column,
            first_scale,
            HEADS,
            FIRST,
            HEAD_LANES,
            FIRST_LANES,
            QUANTISE,
            FIRST_SCALES,
        )
        _copy(
            second + token * second_stride_t,
            second_cache + page * second_stride_page + place * second_stride_place,
            second_stride_h,
            second_stride_d,
            second_stride_head,
            second_stride_column,
            second_scale,
            HEADS,
            SECOND,
            HEAD_LANES,
            SECOND_LANES,
            QUANTISE,
            SECOND_SCALES,
        )


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
    quantise = key_cache.dtype.itemsize == 1
    if quantise:
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
        PAGE=key_cache.shape[1],
        HEADS=heads,
        FIRST=key_size,
        SECOND=value_size,
        HEAD_LANES=triton.next_power_of_2(heads),
        FIRST_LANES=triton.next_power_of_2(key_size),
        SECOND_LANES=triton.next_power_of_2(value_size),
        QUANTISE=quantise,
        FIRST_SCALES=_scales(key_scale),
        SECOND_SCALES=_scales(value_scale),
        OVERLAPPED=device_facts(str(key.device)).dependent_launch,
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
