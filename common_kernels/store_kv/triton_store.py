"""New keys and values into a cache: one program a token, to float8 on the way where the cache is."""

from __future__ import annotations

import triton
import triton.language as tl

from taut.common_kernels.float8 import encode


@triton.jit
def copy_vectors(
    source: tl.tensor,
    target: tl.tensor,
    source_head_stride: tl.tensor,
    source_stride: tl.tensor,
    target_head_stride: tl.tensor,
    target_stride: tl.tensor,
    scale: tl.tensor,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    HEAD_LANES: tl.constexpr,
    SIZE_LANES: tl.constexpr,
    FLOAT8: tl.constexpr,
    SCALES: tl.constexpr,  # 0: none; 1: one for all heads; 2: one each
) -> None:
    """One token's vectors, [HEADS, SIZE], from one place to another."""
    heads = tl.arange(0, HEAD_LANES)[:, None]
    columns = tl.arange(0, SIZE_LANES)[None, :]
    here = (heads < HEADS) & (columns < SIZE)
    numbers = tl.load(source + heads * source_head_stride + columns * source_stride, mask=here, other=0.0)
    if FLOAT8:
        numbers = numbers.to(tl.float32)
        if SCALES == 1:
            numbers = numbers / tl.load(scale)
        elif SCALES == 2:
            numbers = numbers / tl.load(scale + heads, mask=heads < HEADS, other=1.0)
        stored = encode(numbers)
    else:
        stored = numbers.to(target.dtype.element_ty)
    tl.store(target + heads * target_head_stride + columns * target_stride, stored, mask=here)


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
    first_token_stride: tl.tensor,
    first_head_stride: tl.tensor,
    first_stride: tl.tensor,
    second_token_stride: tl.tensor,
    second_head_stride: tl.tensor,
    second_stride: tl.tensor,
    first_cache_page_stride: tl.tensor,
    first_cache_token_stride: tl.tensor,
    first_cache_head_stride: tl.tensor,
    first_cache_stride: tl.tensor,
    second_cache_page_stride: tl.tensor,
    second_cache_token_stride: tl.tensor,
    second_cache_head_stride: tl.tensor,
    second_cache_stride: tl.tensor,
    PAGE_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    FIRST_SIZE: tl.constexpr,
    SECOND_SIZE: tl.constexpr,
    HEAD_LANES: tl.constexpr,  # powers of two, at least HEADS, FIRST_SIZE and SECOND_SIZE
    FIRST_LANES: tl.constexpr,
    SECOND_LANES: tl.constexpr,
    FLOAT8: tl.constexpr,  # whether the caches hold e4m3, given as bytes
    FIRST_SCALES: tl.constexpr,
    SECOND_SCALES: tl.constexpr,
    RELEASES: tl.constexpr,  # whether this kernel lets attention start before it has ended: that one waits by itself
) -> None:
    """One program stores both vectors of one token, unless its slot is negative."""
    if RELEASES:
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token * slot_stride).to(tl.int64)
    if slot >= 0:
        page, place = slot // PAGE_SIZE, slot % PAGE_SIZE
        copy_vectors(
            first + token * first_token_stride,
            first_cache + page * first_cache_page_stride + place * first_cache_token_stride,
            first_head_stride,
            first_stride,
            first_cache_head_stride,
            first_cache_stride,
            first_scale,
            HEADS,
            FIRST_SIZE,
            HEAD_LANES,
            FIRST_LANES,
            FLOAT8,
            FIRST_SCALES,
        )
        copy_vectors(
            second + token * second_token_stride,
            second_cache + page * second_cache_page_stride + place * second_cache_token_stride,
            second_head_stride,
            second_stride,
            second_cache_head_stride,
            second_cache_stride,
            second_scale,
            HEADS,
            SECOND_SIZE,
            HEAD_LANES,
            SECOND_LANES,
            FLOAT8,
            SECOND_SCALES,
        )
