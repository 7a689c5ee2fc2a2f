"""`merge`, `store_kv` and `store_mla_kv` of the provider `triton` against the reference; what is stored, to the bit."""

# bfloat16 is left to the tests on a GPU: the interpreter rounds to it towards zero.

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taut.common_kernels import portable, reference


@given(
    st.integers(1, 9),
    st.integers(0, 3),
    st.sampled_from((1, 3)),
    st.sampled_from((4, 40, 128)),
    st.sampled_from((torch.float32, torch.bfloat16)),
    st.booleans(),
    st.integers(0, 2**16),
)
@settings(max_examples=25)
def test_merge(parts: int, tokens: int, heads: int, value: int, dtype: torch.dtype, wants_lse: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(parts, tokens, heads, value, generator=generator).to(dtype)
    lses = 5 * torch.randn(parts, tokens, heads, generator=generator)
    empty = torch.rand(parts, tokens, heads, generator=generator) < 0.4
    lses[empty] = -math.inf
    numbers[empty] = math.nan  # a part that saw nothing may hold anything
    out, right = (torch.full((tokens, heads, value), math.nan, dtype=dtype) for _ in range(2))
    lse, right_lse = (torch.full((tokens, heads), math.nan) for _ in range(2))
    portable.merge(numbers, lses, out, lse if wants_lse else None)
    reference.merge(numbers, lses, right, right_lse)
    kept = numbers.clone(), lses.clone()
    portable.merge(*kept, kept[0][0], kept[1][0] if wants_lse else None)  # a part may take the place of the whole
    torch.testing.assert_close(kept[0][0], out, rtol=0, atol=0)
    torch.testing.assert_close(out, right, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    if wants_lse:
        torch.testing.assert_close(lse, right_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cache", [torch.float32, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("scales", [0, 1, 3])
@pytest.mark.parametrize("slot_type", [torch.int32, torch.int64])
def test_store_kv(cache: torch.dtype, scales: int, slot_type: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(scales)
    key, value = 300 * torch.randn(6, 3, 24, generator=generator), torch.randn(6, 3, 16, generator=generator)
    value[0, 0, :6] = torch.tensor([0.0, -0.0, 2**-9, 2**-10, 1.5 * 2**-9, -1e9])  # subnormal, tied, too large
    slots = torch.tensor([7, -1, 0, 12, -5], dtype=slot_type)
    scale = 0.5 + torch.rand(scales, generator=generator) if scales else None
    made = []
    for kernels in (portable, reference):
        pools = [torch.zeros(4, 5, 4, size + 3).to(cache) for size in (24, 16)]
        keys, values = (pool[:, :4, :3, :-3] for pool in pools)
        kernels.store_kv(key, value, keys, values, slots, key_scale=scale, value_scale=scale)
        made.append([pool.view(torch.uint8) for pool in pools])
    for ours, right in zip(*made, strict=True):
        assert torch.equal(ours, right)


@pytest.mark.parametrize("cache", [torch.bfloat16, torch.float8_e4m3fn])
def test_store_mla_kv(cache: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    latent, rope = (torch.randn(5, size, generator=generator).bfloat16() for size in (32, 16))
    slots = torch.tensor([3, -1, 8, 0])
    made = []
    for kernels in (portable, reference):
        pool = torch.zeros(3, 4, 48).to(cache)
        kernels.store_mla_kv(latent, rope, pool, slots, cache_scale=torch.tensor([0.25]))
        made.append(pool.view(torch.uint8))
    assert torch.equal(*made)
