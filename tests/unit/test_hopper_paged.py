"""What the Hopper kernels of paged attention are given: boxes, strides, and a refusal of what they cannot reach."""

from __future__ import annotations

import pytest
import torch

from taut.common_kernels.paged_attention import hopper_launch, triton_launch
from taut.common_kernels.paged_attention.hopper_launch import box_of, boxes_of, in_pieces, unreachable
from taut.common_kernels.problem import Problem
from taut.common_kernels.schedule.reference import schedule
from taut.common_kernels.workspace import DeviceFacts


@pytest.mark.parametrize(
    ("page_size", "keys", "box"),
    [(0, 128, 128), (16, 128, 16), (64, 64, 64), (128, 64, 64), (384, 128, 128), (1, 64, 0), (8, 64, 0), (48, 64, 0)],
)
def test_a_box_is_a_page_or_a_tile_or_none(page_size: int, keys: int, box: int) -> None:
    assert box_of(page_size, keys) == box


def test_boxes_are_told_by_head_whatever_lies_side_by_side() -> None:
    cache = torch.zeros(2, 5, 16, 3, 128, dtype=torch.bfloat16)[1]  # [N, P, Hk, D]
    boxes = boxes_of(cache, 16)
    assert boxes.base.data_ptr() == cache.data_ptr()
    assert list(boxes.shape) == [5, 3, 16, 128]
    assert list(boxes.strides) == [16 * 3 * 128, 128, 3 * 128, 1]
    assert list(boxes.block_shape) == [1, 1, 16, 64]
    assert in_pieces(cache) == [16 * 3 * 16, 3 * 16, 16]


def test_the_stride_of_a_dimension_of_one_is_never_asked() -> None:
    cache = torch.zeros(5, 16, 1, 64, dtype=torch.bfloat16).as_strided((5, 16, 1, 64), (1024, 64, 3, 1))
    assert not unreachable(cache[0], cache, cache, cache[0])
    assert all(stride % 8 == 0 for stride in boxes_of(cache, 16).strides[:-1])


def test_what_cannot_be_reached_is_said() -> None:
    good = torch.zeros(5, 16, 2, 64, dtype=torch.bfloat16)
    odd = torch.zeros(5, 16, 2, 68, dtype=torch.bfloat16)[..., :64]
    askew = torch.zeros(5 * 16 * 2 * 64 + 1, dtype=torch.bfloat16)[1:].view(5, 16, 2, 64)
    turned = torch.zeros(5, 16, 64, 2, dtype=torch.bfloat16).transpose(2, 3)
    query = good[0]
    assert not unreachable(query, good, good, query)
    for cache in (odd, askew):
        assert "values that begin at multiples of 16 bytes" in unreachable(query, good, cache, query)
        assert "keys that begin at multiples of 16 bytes" in unreachable(query, cache, good, query)
    assert "queries whose elements lie side by side" in unreachable(turned[0], good, good, query)
    assert "an output whose elements lie side by side" in unreachable(query, good, good, turned[0])


@pytest.mark.parametrize("page_size", [1, 16, 32, 64, 128])
def test_a_short_row_is_cut_into_whole_tiles_of_the_kernel(monkeypatch: pytest.MonkeyPatch, page_size: int) -> None:
    """Whatever the pages: 1024 keys in 16 parts of 64. Of half a tile the other half would be brought as zeros."""
    monkeypatch.setattr(triton_launch, "device_facts", lambda _: DeviceFacts("sm_90", 232_448, 132))
    problem = Problem("paged_attention", "sm_90", "bfloat16", "bfloat16", 32, 8, 128, 128, page_size, max_query=1)
    workspace = hopper_launch.paged_workspace(problem, 4, 4, "cpu")
    shape = workspace.schedule.shape
    short = schedule(shape, [1024], [0, 1])
    assert [part.end_tile - part.first_tile for part in short.parts if part.last_item >= 0] == [64 // shape.cut] * 16
    long = schedule(shape, [32768], [0, 1])
    assert sum(part.last_item >= 0 for part in long.parts) == shape.parts == 33
