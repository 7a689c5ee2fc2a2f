"""`store_kv` and `store_mla_kv` of the reference: what lands where, and that nothing else is touched."""

from __future__ import annotations

import math

import pytest
import torch
from cases import LAYOUTS, Layout, PagedCase, cache_storage
from hypothesis import given, settings
from hypothesis import strategies as st

from taut.common_kernels import reference
from taut.common_kernels.step import Mask, PageTable, Step

DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "float8_e5m2")


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """Float8 as bytes, so that it can be compared."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def rounded(numbers: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """One token's numbers [Hk, *] as the cache must hold them, saturated."""
    if dtype.itemsize > 1:
        return numbers.to(dtype)
    divided = numbers.float() / (1.0 if scale is None else scale.reshape(-1, 1))
    limit = torch.finfo(dtype).max
    return divided.clamp(-limit, limit).to(dtype)


@given(
    layout=st.sampled_from(LAYOUTS),
    page_size=st.sampled_from((1, 3, 16)),
    cache_dtype=st.sampled_from(DTYPES),
    scales=st.sampled_from(("none", "tensor", "head")),
    slot_dtype=st.sampled_from((torch.int32, torch.int64)),
    tokens=st.integers(0, 9),
    extra=st.integers(0, 2),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=100)
def test_store_kv(
    layout: Layout,
    page_size: int,
    cache_dtype: str,
    scales: str,
    slot_dtype: torch.dtype,
    tokens: int,
    extra: int,
    seed: int,
) -> None:
    """Scattered slots, some of them negative, fewer slots than tokens; everything else stays poison."""
    generator = torch.Generator().manual_seed(seed)
    pages, heads, key_size, value_size = 12, 2, 8, 12
    case = PagedCase((), (), 2, heads, key_size, value_size, page_size, layout=layout)
    dtype = getattr(torch, cache_dtype)
    storages, views = cache_storage(case, pages, dtype)
    untouched = [raw(storage).clone() for storage in storages]
    key_cache, value_cache = views(storages)

    slots = torch.randperm(pages * page_size, generator=generator)[:tokens]
    slots = torch.where(torch.rand(len(slots), generator=generator) < 0.3, -1 - slots, slots).to(slot_dtype)
    wide = torch.randn(tokens + extra, heads, key_size + value_size, generator=generator)
    key, value = wide.split([key_size, value_size], dim=-1)
    scale = {"none": None, "tensor": torch.tensor(0.3), "head": torch.tensor([0.3, 0.05])}[scales]
    value_scale = None if scale is None else 0.5 * scale
    reference.store_kv(key, value, key_cache, value_cache, slots, key_scale=scale, value_scale=value_scale)

    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        page, place = divmod(slot, page_size)
        assert torch.equal(raw(key_cache)[page, place], raw(rounded(key[token], scale, dtype)))
        assert torch.equal(raw(value_cache)[page, place], raw(rounded(value[token], value_scale, dtype)))
        for cache in (raw(key_cache), raw(value_cache)):  # poison it again, to compare the rest with what was there
            cache[page, place] = raw(torch.full((1,), math.nan).to(dtype))[0]
    for storage, before in zip(storages, untouched, strict=True):
        assert torch.equal(raw(storage).nan_to_num(7.0), before.nan_to_num(7.0))


@pytest.mark.parametrize("cache_dtype", DTYPES)
@pytest.mark.parametrize("scale", [None, torch.tensor(0.25)])
def test_store_mla_kv(cache_dtype: str, scale: torch.Tensor | None) -> None:
    """Latent first, rope after, into a cache whose pages and tokens are padded."""
    dtype = getattr(torch, cache_dtype)
    storage = torch.full((5, 4 + 1, 12 + 4), math.nan).to(dtype)
    cache = storage[:, :4, :12]
    latent, rope = torch.randn(4, 8), torch.randn(4, 4)
    reference.store_mla_kv(latent, rope, cache, torch.tensor([17, -1, 2]), cache_scale=scale)
    written = {(4, 1): 0, (0, 2): 2}
    for (page, place), token in written.items():
        both = torch.cat([latent[token], rope[token]])[None]
        assert torch.equal(raw(cache)[page, place], raw(rounded(both, scale, dtype))[0])
    numbers = storage.float()
    for page, place in written:
        numbers[page, place, :12] = math.nan
    assert numbers.isnan().all()


@pytest.mark.parametrize(("cache_dtype", "largest"), [("float8_e4m3fn", 448.0), ("float8_e5m2", 57344.0)])
def test_float8_saturates(cache_dtype: str, largest: float) -> None:
    """A number beyond float8 becomes the largest one; torch's own cast makes infinity or NaN of some of them."""
    cache, values = torch.zeros(2, 1, 1, 1, 2, dtype=getattr(torch, cache_dtype))
    key = torch.tensor([[[1e6, -1e6]]])
    reference.store_kv(key, key, cache, values, torch.tensor([0]))
    assert cache.float().flatten().tolist() == values.float().flatten().tolist() == [largest, -largest]


@pytest.mark.parametrize("cache_dtype", DTYPES)
def test_what_was_stored_is_read_back(cache_dtype: str) -> None:
    """One key only: attention returns its value, through the same scales, whatever the cache's dtype is."""
    dtype = getattr(torch, cache_dtype)
    key_cache, value_cache = (torch.full((2, 4, 2, 8), math.nan).to(dtype) for _ in range(2))
    key, value = torch.randn(1, 2, 8), torch.randn(1, 2, 8)
    scales = {"key_scale": torch.tensor([0.02, 0.3]), "value_scale": torch.tensor([0.01, 0.2])}
    reference.store_kv(key, value, key_cache, value_cache, torch.tensor([4]), **scales)
    step = Step(torch.tensor([0, 1]), torch.tensor([1]), PageTable(torch.tensor([[1]]), 4), 1, 1)
    out = torch.full((1, 2, 8), math.nan)
    reference.paged_attention(torch.randn(1, 2, 8), key_cache, value_cache, step, Mask(), out, scale=1.0, **scales)
    relative = (out - value).norm() / value.norm()
    assert relative < {"float32": 1e-6, "bfloat16": 1e-2, "float8_e4m3fn": 0.05, "float8_e5m2": 0.1}[cache_dtype]
