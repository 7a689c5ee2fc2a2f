"""The scratch is small, and its size is known beforehand."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from taut.common_kernels.schedule.shape import most_items, parts_that_fit
from taut.common_kernels.scratch import Scratch


def mla_scratch(heads: int, rows: int, multiprocessors: int = 132) -> int:
    """Of `mla_decode` with tiles of 64 rows, or 16 for few heads."""
    tile = 64 if heads > 16 else 16
    head_blocks = -(-heads // tile)
    parts = parts_that_fit(multiprocessors, 1, head_blocks)
    return Scratch(parts, most_items(rows, rows, 1, 1), head_blocks * tile, 512, "meta").size_in_bytes


def test_does_not_grow_with_the_context_or_much_with_the_rows() -> None:
    """No argument is a length; the stock kernel reserves 8.3 GiB for 16 heads, 1024 rows and 160 thousand tokens."""
    assert mla_scratch(128, 1024) < 256 * 2**20
    assert mla_scratch(128, 1024) == mla_scratch(128, 66)


def test_pinned() -> None:
    assert mla_scratch(128, 1024) == 34_145_280
    assert mla_scratch(16, 1024) == 8_601_984


@given(
    st.integers(1, 512), st.integers(1, 2), st.integers(1, 256), st.integers(1, 128), st.sampled_from((8, 16, 32, 64)),
    st.integers(1, 10**6),
)  # fmt: skip
def test_32_bits_are_enough_for_its_offsets(
    multiprocessors: int, programs: int, kv_heads: int, group: int, tile_rows: int, items: int
) -> None:
    """Of paged attention with values of 256, whatever the heads: the kernels of Hopper count on it."""
    pack = min(group, tile_rows)
    parts = parts_that_fit(multiprocessors, programs, kv_heads * -(-group // pack))
    rows = tile_rows // pack * kv_heads * group  # queries of an item times heads
    assert Scratch(parts, items, rows, 256, "meta").size_in_bytes < 2**31


def test_tells_what_is_allocated() -> None:
    scratch = Scratch(parts=5, items=3, rows=16, value_size=8, device="cpu")
    assert scratch.size_in_bytes == 7 * 16 * (8 + 1) * 4  # seven partials, each row with its LSE, in float32
