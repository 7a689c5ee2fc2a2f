"""`merge`, `store_kv` and `store_mla_kv` of the provider `triton` on a GPU, and the schedule of many rows."""

from __future__ import annotations

import math

import pytest
import torch

from taut.common_kernels import portable, reference
from taut.common_kernels.schedule.reference import schedule
from taut.common_kernels.schedule.shape import Part, ScheduleShape
from taut.common_kernels.schedule.triton_launch import DeviceSchedule
from taut.common_kernels.step import PageTable, Step

DEVICE = "cuda:0"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merge(dtype: torch.dtype) -> None:
    numbers = torch.randn(3, 700, 32, 128, device=DEVICE).to(dtype)
    lses = 5 * torch.randn(3, 700, 32, device=DEVICE)
    empty = torch.rand_like(lses) < 0.3
    lses[empty] = -math.inf
    numbers[empty] = math.nan
    out, right = (torch.full((700, 32, 128), math.nan, device=DEVICE, dtype=dtype) for _ in range(2))
    lse, right_lse = (torch.full((700, 32), math.nan, device=DEVICE) for _ in range(2))
    portable.merge(numbers, lses, out, lse)
    reference.merge(numbers, lses, right, right_lse)
    torch.testing.assert_close(out, right, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(lse, right_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cache", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("scales", [0, 1, 8])
def test_store_kv(cache: torch.dtype, scales: int) -> None:
    key, value = (torch.randn(900, 8, size, device=DEVICE).bfloat16() for size in (128, 96))
    slots = torch.randperm(1024, device=DEVICE)[:800]
    slots[::7] = -1
    scale = 0.01 + torch.rand(scales, device=DEVICE) if scales else None
    made = []
    for kernels in (portable, reference):
        pools = [torch.zeros(64, 16, 8, size, device=DEVICE).to(cache) for size in (128, 96)]
        kernels.store_kv(key, value, *pools, slots, key_scale=scale, value_scale=scale)
        made.append([pool.view(torch.uint8) for pool in pools])
    for ours, right in zip(*made, strict=True):
        assert torch.equal(ours, right)


@pytest.mark.parametrize("cache", [torch.bfloat16, torch.float8_e4m3fn])
def test_store_mla_kv(cache: torch.dtype) -> None:
    latent, rope = (torch.randn(300, size, device=DEVICE).bfloat16() for size in (512, 64))
    slots = torch.randperm(1024, device=DEVICE)[:300]
    made = []
    for kernels in (portable, reference):
        pool = torch.zeros(16, 64, 576, device=DEVICE).to(cache)
        kernels.store_mla_kv(latent, rope, pool, slots, cache_scale=torch.tensor([0.25], device=DEVICE))
        made.append(pool.view(torch.uint8))
    assert torch.equal(*made)


@pytest.mark.parametrize("rows", [1, 256, 1000, 5000])
@pytest.mark.parametrize("max_query", [1, 8])
@pytest.mark.parametrize("parts", [66, 264])
def test_schedule_equals_its_twin(rows: int, max_query: int, parts: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    lengths = torch.randint(0, 100_000, (rows,), generator=generator)
    queries = torch.randint(0, max_query + 1, (rows,), generator=generator)
    starts = [0, *queries.cumsum(0).tolist()]
    shape = ScheduleShape(parts, rows * max_query, 64, 1, spare=4)
    step = Step(
        torch.tensor(starts, dtype=torch.int32, device=DEVICE),
        lengths.int().to(DEVICE),
        PageTable(torch.zeros(rows, 1, dtype=torch.int32, device=DEVICE), 64),
        max_query,
        100_000,
    )
    made = DeviceSchedule(shape, rows, DEVICE)
    made.launch(step)
    expected = schedule(shape, lengths.tolist(), starts)
    assert [Part(*record[:5]) for record in made.parts.tolist()] == expected.parts
    assert made.items[: len(expected.items), :7].tolist() == [list(item[:7]) for item in expected.items]
    first = [made.items[part.first_item].tolist() for part in expected.parts if part.last_item >= 0]
    assert made.parts[: len(first), 8:].tolist() == first
