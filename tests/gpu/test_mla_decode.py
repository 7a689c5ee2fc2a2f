"""`mla_decode` of each provider at real sizes, from captured graphs, and past 2^31 elements."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from cases import MlaCase, assert_close, build_mla, relative_error

from taut.common_kernels import reference
from taut.common_kernels.problem import Problem
from taut.common_kernels.step import PageTable, Step
from taut.common_kernels.targets import target_of

if TYPE_CHECKING:
    from collections.abc import Callable

    Serving = Callable[[Problem], Any]

DEVICE = "cuda:0"
BATCHES: dict[str, dict[str, Any]] = {
    "decode": {"lengths": (4000, 3, 0, 129, 1), "queries": (1, 1, 1, 1, 1)},
    "mixed": {
        "lengths": (400, 30, 0, 1290, 7),
        "queries": (2, 8, 1, 1, 3),
        "padded_rows": 1,
        "padded_queries": 2,
        "page_size": 16,
        "indirect": True,
    },
    "strided": {"lengths": (1000, 0, 333), "queries": (4, 1, 2), "page_size": 1, "strided_query": True},
    "fewer than promised": {"lengths": (900, 700, 40, 3000), "queries": (1, 3, 4, 1)},
    "level": {"lengths": (640,) * 64, "queries": (1,) * 64},
}


def check(serving: Serving, case: MlaCase) -> None:
    target = target_of(torch.device(DEVICE))
    kernels = serving(case.problem(target))
    inputs = build_mla(case, DEVICE)
    assert_close(inputs.run(kernels, target), inputs.expected(), case.dtype)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("heads", [1, 16, 20, 32, 64, 96, 128])
def test_contract(serving: Serving, heads: int, batch: str) -> None:
    case = MlaCase(q_heads=heads, latent=512, rope=64, dtype="bfloat16", **({"page_size": 64} | BATCHES[batch]))
    check(serving, case)


@pytest.mark.parametrize("latent", [128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("heads", [16, 128])
def test_other_ranks(serving: Serving, heads: int, latent: int, dtype: str) -> None:
    case = MlaCase(q_heads=heads, latent=latent, rope=64, dtype=dtype, page_size=32, **BATCHES["decode"])
    check(serving, case)


@pytest.mark.parametrize("batch", ["decode", "mixed"])
@pytest.mark.parametrize("heads", [16, 128])
def test_float8_caches(serving: Serving, heads: int, batch: str) -> None:
    case = MlaCase(q_heads=heads, latent=512, rope=64, dtype="bfloat16", **BATCHES[batch])
    case = replace(case, cache_dtype="float8_e4m3fn", scales="tensor")
    check(serving, case)


@pytest.mark.parametrize("heads", [16, 128])
def test_a_captured_graph_replayed_with_other_lengths(serving: Serving, heads: int) -> None:
    """Captured with one batch, replayed with others, with longer rows than any at the capture."""
    rows, page, longest = 40, 64, 5000
    pages = math.ceil(longest / page)
    cache = torch.randn(rows * pages, page, 576, device=DEVICE).bfloat16()
    table = torch.randperm(rows * pages, device=DEVICE).view(rows, pages).int()
    q_nope, q_pe = (torch.randn(rows, heads, size, device=DEVICE).bfloat16() for size in (512, 64))
    lengths = torch.full((rows,), 100, dtype=torch.int32, device=DEVICE)
    starts = torch.arange(rows + 1, dtype=torch.int32, device=DEVICE)
    step = Step(starts, lengths, PageTable(table, page), 1, 100)
    out, right = (torch.empty(rows, heads, 512, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    lse, right_lse = (torch.empty(rows, heads, device=DEVICE) for _ in range(2))
    problem = Problem(
        "mla_decode", target_of(torch.device(DEVICE)), "bfloat16", "bfloat16", heads, 1, 576, 512, page, 1
    )
    kernels = serving(problem)
    workspace = kernels.workspace(problem, rows, rows, DEVICE)

    def run() -> None:
        workspace.prepare(step)
        kernels.mla_decode(q_nope, q_pe, cache, step, out, scale=0.07, lse=lse, workspace=workspace)

    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    generator = torch.Generator().manual_seed(0)
    batches = [
        torch.randint(0, longest, (rows,), generator=generator),
        torch.full((rows,), longest),
        torch.tensor([longest] + [0] * (rows - 1)),
        torch.zeros(rows, dtype=torch.int64),
        torch.randint(0, 3, (rows,), generator=generator),
    ]
    for batch in batches:
        lengths.copy_(batch)
        for tensor in (out, lse):
            tensor.fill_(math.nan)
        graph.replay()
        reference.mla_decode(q_nope, q_pe, cache, step, right, scale=0.07, lse=right_lse)
        assert not out.isnan().any()
        assert relative_error(out.cpu(), right.cpu()) < 1e-2
        torch.testing.assert_close(lse, right_lse, rtol=1e-3, atol=1e-3)


def test_offsets_beyond_two_to_the_31(serving: Serving) -> None:
    """The pages that are used lie past 2^32 elements of the cache."""
    page, pages = 64, 120_000
    cache = torch.zeros(pages, page, 576, dtype=torch.bfloat16, device=DEVICE)
    assert cache.numel() > 2**32
    used = torch.arange(pages - 40, pages, dtype=torch.int32, device=DEVICE).view(2, 20)
    cache[-40:].normal_()
    q_nope, q_pe = (torch.randn(2, 16, size, device=DEVICE).bfloat16() for size in (512, 64))
    lengths = torch.tensor([1280, 700], dtype=torch.int32, device=DEVICE)
    step = Step(torch.tensor([0, 1, 2], dtype=torch.int32, device=DEVICE), lengths, PageTable(used, page), 1, 1280)
    out, right = (torch.full((2, 16, 512), math.nan, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    problem = Problem("mla_decode", target_of(torch.device(DEVICE)), "bfloat16", "bfloat16", 16, 1, 576, 512, page, 1)
    kernels = serving(problem)
    workspace = kernels.workspace(problem, 2, 2, DEVICE)
    workspace.prepare(step)
    kernels.mla_decode(q_nope, q_pe, cache, step, out, scale=0.07, workspace=workspace)
    reference.mla_decode(q_nope, q_pe, cache, step, right, scale=0.07)
    assert relative_error(out.cpu(), right.cpu()) < 1e-2
