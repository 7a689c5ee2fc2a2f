"""How much a program of a merge reads together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from taut.common_kernels.merge.triton_launch import merge_sizes


@given(st.integers(1, 300), st.integers(1, 5000), st.sampled_from((64, 128, 512)))
def test_the_powers_of_two_have_every_variant(parts: int, items: int, value_size: int) -> None:
    """Whoever merges 1, 2, 4, ... items before serving compiles nothing later."""
    power = 1 << (items.bit_length() - 1)
    assert merge_sizes(parts, items, value_size) == merge_sizes(parts, power, value_size)


@given(st.integers(1, 300), st.integers(1, 5000), st.sampled_from((64, 128, 512)))
def test_all_parts_of_an_item_in_one_round_where_items_are_alike(parts: int, items: int, value_size: int) -> None:
    chunk, rows, columns, _ = merge_sizes(parts, items, value_size)
    assert chunk >= min(128, -(-parts // items) if items <= parts else 2)
    assert chunk * rows * columns <= 4096
    assert columns >= 32
