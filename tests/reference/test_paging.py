"""Where tokens lie: page tables and the engines' caches as views."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from taut.common_kernels.paging import packed_cache_views, slot_cache_view
from taut.common_kernels.step import PageTable, Step


@given(
    page_size=st.integers(1, 64),
    length=st.integers(0, 200),
    start=st.integers(0, 200),
    indirect=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_row_slots(page_size: int, length: int, start: int, indirect: bool, seed: int) -> None:
    """Position by position, by the formula; entries past the length are dead and must not show."""
    generator = torch.Generator().manual_seed(seed)
    start = min(start, length)
    used = -(-length // page_size)
    table = torch.full((6, used + 2), 2**30, dtype=torch.int32)
    table[4, :used] = torch.randperm(used + 5, generator=generator)[:used].int()
    pages = PageTable(table, page_size, torch.tensor([1, 4, 0], dtype=torch.int32) if indirect else None)
    page, place = pages.row_slots(1 if indirect else 4, start, length)
    assert page.dtype == place.dtype == torch.int64
    expected = [(int(table[4, j // page_size]), j % page_size) for j in range(start, length)]
    assert list(zip(page.tolist(), place.tolist(), strict=True)) == expected


def test_both_engines_address_the_same_tokens() -> None:
    """vLLM: pages of 4 in a block table. SGLang: request 7 of `req_to_token`, a slot for every token."""
    blocks = torch.tensor([[5, 2, 9]], dtype=torch.int32)
    vllm_page, vllm_place = PageTable(blocks, 4).row_slots(0, 0, 10)
    slots = (vllm_page * 4 + vllm_place).int()
    req_to_token = torch.full((8, 16), 2**30, dtype=torch.int32)
    req_to_token[7, :10] = slots
    page, place = PageTable(req_to_token, 1, torch.tensor([7])).row_slots(0, 0, 10)
    assert page.tolist() == slots.tolist()
    assert not place.any()


def test_packed_cache_views() -> None:
    cache = torch.arange(3 * 2 * 4 * 7).view(3, 2, 4, 7)  # [N, Hk, P, D + V], D = 3
    keys, values = packed_cache_views(cache, 4)
    assert keys.shape == (3, 4, 2, 3)
    assert values.shape == (3, 4, 2, 4)
    assert torch.equal(keys[2, 3, 1], cache[2, 1, 3, :3])
    assert torch.equal(values[2, 3, 1], cache[2, 1, 3, 3:])
    assert keys.untyped_storage().data_ptr() == values.untyped_storage().data_ptr() == cache.data_ptr()


def test_slot_cache_view() -> None:
    cache = torch.arange(10 * 2 * 3).view(10, 2, 3)
    view = slot_cache_view(cache)
    assert view.shape == (10, 1, 2, 3)
    assert view.data_ptr() == cache.data_ptr()
    assert torch.equal(view[6, 0], cache[6])


def test_rows_counts_padded_ones() -> None:
    step = Step(torch.tensor([0, 1, 1]), torch.tensor([3, 0]), PageTable(torch.zeros(2, 1), 4), 1, 3)
    assert step.rows == 2
