"""`paged_attention` and `ragged_attention` of each provider: real sizes, captured graphs, huge offsets."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from cases import PagedCase, assert_close, build_paged, build_ragged, relative_error

from taut.common_kernels import reference
from taut.common_kernels.problem import Problem
from taut.common_kernels.step import Mask, PageTable, Step
from taut.common_kernels.targets import target_of

if TYPE_CHECKING:
    from collections.abc import Callable

    Serving = Callable[[Problem], Any]

DEVICE = "cuda:0"
BATCHES: dict[str, dict[str, Any]] = {
    "decode": {"lengths": (4000, 3, 0, 129, 1), "queries": (1, 1, 1, 1, 1), "padded_rows": 1, "padded_queries": 2},
    "one row": {"lengths": (5000,), "queries": (1,)},
    "verify": {"lengths": (4000, 5, 0, 129, 8), "queries": (5, 5, 2, 3, 8), "indirect": True},
    "mixed": {"lengths": (37, 0, 5, 800, 3000), "queries": (1, 2, 5, 333, 1), "padded_rows": 1, "padded_queries": 3},
    "strided": {"lengths": (700, 9), "queries": (600, 1), "page_size": 1, "layout": "padded", "strided_query": True},
}
FEATURES: dict[str, dict[str, Any]] = {
    "causal": {},
    "non-causal": {"mask": Mask(causal=False)},
    "window": {"mask": Mask(left=99), "forget_unseen": True},
    "window of both sides": {"mask": Mask(causal=False, left=99, right=17)},
    "all": {"mask": Mask(left=200, soft_cap=2.0), "sinks": True, "alibi": True},
}


def check(serving: Serving, case: PagedCase, operation: Any = "paged_attention") -> None:
    target = target_of(torch.device(DEVICE))
    kernels = serving(replace(case.problem(target), operation=operation))
    inputs = (build_paged if operation == "paged_attention" else build_ragged)(case, DEVICE)
    assert_close(inputs.run(kernels, target), inputs.expected(), case.dtype)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("feature", FEATURES)
def test_contract(serving: Serving, batch: str, feature: str) -> None:
    sizes = {"q_heads": 8, "kv_heads": 2, "head_size": 128, "value_size": 128}
    check(serving, PagedCase(**sizes, dtype="bfloat16", **BATCHES[batch], **FEATURES[feature]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("head_size", "value_size"), [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)]
)
def test_head_sizes(serving: Serving, head_size: int, value_size: int, dtype: str) -> None:
    check(serving, PagedCase(**BATCHES["mixed"], head_size=head_size, value_size=value_size, dtype=dtype))


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(4, 4), (28, 4), (8, 1), (40, 1), (128, 1)])
@pytest.mark.parametrize("batch", ["decode", "mixed"])
def test_groups(serving: Serving, q_heads: int, kv_heads: int, batch: str) -> None:
    sizes = {"head_size": 64, "value_size": 64, "q_heads": q_heads, "kv_heads": kv_heads}
    check(serving, PagedCase(**BATCHES[batch], **sizes, dtype="bfloat16"))


@pytest.mark.parametrize("page_size", [1, 7, 16, 64, 128, 256])
@pytest.mark.parametrize("batch", ["decode", "mixed"])
def test_page_sizes(serving: Serving, page_size: int, batch: str) -> None:
    check(serving, PagedCase(**BATCHES[batch], page_size=page_size, head_size=128, value_size=128, dtype="bfloat16"))


@pytest.mark.parametrize("scales", ["none", "tensor", "head"])
@pytest.mark.parametrize(("head_size", "value_size"), [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_float8_caches(serving: Serving, head_size: int, value_size: int, scales: Any) -> None:
    sizes = {"head_size": head_size, "value_size": value_size}
    check(serving, PagedCase(**BATCHES["mixed"], **sizes, dtype="bfloat16", cache_dtype="float8_e4m3fn", scales=scales))


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(("head_size", "value_size"), [(128, 128), (192, 128)])
def test_ragged(serving: Serving, feature: str, head_size: int, value_size: int) -> None:
    batch = BATCHES["mixed"] | {"strided_query": True}
    case = PagedCase(**batch, head_size=head_size, value_size=value_size, dtype="bfloat16", **FEATURES[feature])
    check(serving, case, "ragged_attention")


@pytest.mark.parametrize("queries", [1, 3, 40])
def test_a_captured_graph_replayed_with_other_lengths(serving: Serving, queries: int) -> None:
    """Captured with one batch, replayed with others, with longer rows than any at the capture."""
    rows, page, longest, q_heads, kv_heads, size = 24, 16, 5000, 32, 8, 128
    pages = math.ceil(longest / page)
    tokens = rows * queries
    keys, values = (torch.randn(rows * pages, page, kv_heads, size, device=DEVICE).bfloat16() for _ in range(2))
    table = torch.randperm(rows * pages, device=DEVICE).view(rows, pages).int()
    query = torch.randn(tokens, q_heads, size, device=DEVICE).bfloat16()
    lengths = torch.full((rows,), 100, dtype=torch.int32, device=DEVICE)
    starts = torch.arange(rows + 1, dtype=torch.int32, device=DEVICE) * queries
    step = Step(starts, lengths, PageTable(table, page), queries, 100)
    out, right = (torch.empty(tokens, q_heads, size, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    lse, right_lse = (torch.empty(tokens, q_heads, device=DEVICE) for _ in range(2))
    target = target_of(torch.device(DEVICE))
    problem = Problem(
        "paged_attention", target, "bfloat16", "bfloat16", q_heads, kv_heads, size, size, page, queries,
        frozenset({"causal", "lse"}),
    )  # fmt: skip
    kernels = serving(problem)
    workspace = kernels.workspace(problem, rows, tokens, DEVICE)

    def run() -> None:
        workspace.prepare(step)
        kernels.paged_attention(query, keys, values, step, Mask(), out, scale=0.09, lse=lse, workspace=workspace)

    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    generator = torch.Generator().manual_seed(0)
    one_row = torch.zeros(rows + 1, dtype=torch.int32)
    one_row[1:] = tokens  # all queries are the first row's; the others have none
    batches = [
        (torch.randint(queries, longest, (rows,), generator=generator), starts.cpu()),
        (torch.full((rows,), longest), starts.cpu()),
        (torch.tensor([longest] + [0] * (rows - 1)), starts.cpu()),
        (torch.zeros(rows, dtype=torch.int64), starts.cpu()),
        (torch.randint(0, 3, (rows,), generator=generator), starts.cpu()),
        (torch.full((rows,), longest), torch.arange(rows + 1).clamp(max=5) * queries),  # 5 rows, then padding
    ]
    if queries > 16:
        batches.append((torch.full((rows,), longest), one_row))
    for batch, batch_starts in batches:
        lengths.copy_(batch)
        starts.copy_(batch_starts)
        for tensor in (out, lse):
            tensor.fill_(math.nan)
        graph.replay()
        reference.paged_attention(query, keys, values, step, Mask(), right, scale=0.09, lse=right_lse)
        assert not out.isnan().any()
        assert relative_error(out.cpu(), right.cpu()) < 1e-2
        torch.testing.assert_close(lse, right_lse, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("rows", [1, 8, 64])
def test_attention_waits_for_what_was_stored(serving: Serving, rows: int) -> None:
    """Schedule, store and attention one after another, many times: each is launched before the last has ended."""
    page, context, q_heads, kv_heads, size, repeats = 16, 600, 32, 8, 128, 50
    pages = math.ceil(context / page)
    caches = [torch.zeros(rows * pages, page, kv_heads, size, device=DEVICE).bfloat16() for _ in range(2)]
    table = torch.randperm(rows * pages, device=DEVICE).view(rows, pages).int()
    new = [torch.randn(repeats, rows, kv_heads, size, device=DEVICE).bfloat16() for _ in range(2)]
    query = torch.randn(rows, q_heads, size, device=DEVICE).bfloat16()
    places = torch.arange(repeats, device=DEVICE) + context - repeats
    slots = (table[:, places // page] * page + places % page).T.contiguous()  # [repeats, rows]
    lengths = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
    starts = torch.arange(rows + 1, dtype=torch.int32, device=DEVICE)
    step = Step(starts, lengths, PageTable(table, page), 1, context)
    outs = torch.full((repeats, rows, q_heads, size), math.nan, dtype=torch.bfloat16, device=DEVICE)
    target = target_of(torch.device(DEVICE))
    problem = Problem("paged_attention", target, "bfloat16", "bfloat16", q_heads, kv_heads, size, size, page, 1)
    kernels = serving(problem)
    workspace = kernels.workspace(problem, rows, rows, DEVICE)

    def run() -> None:
        for i in range(repeats):
            lengths.fill_(context - repeats + i + 1)
            workspace.prepare(step)
            kernels.store_kv(new[0][i], new[1][i], *caches, slots[i])
            kernels.paged_attention(query, *caches, step, Mask(), outs[i], scale=0.09, workspace=workspace)

    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for cache in caches:
        cache.normal_()
    kept = [cache.clone() for cache in caches]
    outs.fill_(math.nan)
    graph.replay()
    # The reference of all steps at once: with everything stored, step i is what a row's query i of `repeats` sees.
    reference.store_kv(new[0].flatten(0, 1), new[1].flatten(0, 1), *kept, slots.flatten())
    queries = query.repeat_interleave(repeats, dim=0)
    right = torch.empty_like(queries)
    every_step = Step(starts * repeats, torch.full_like(lengths, context), PageTable(table, page), repeats, context)
    reference.paged_attention(queries, *kept, every_step, Mask(), right, scale=0.09)
    for i in range(repeats):
        assert relative_error(outs[i].cpu(), right[i::repeats].cpu()) < 1e-2


@pytest.mark.parametrize("queries", [1, 100])
def test_offsets_beyond_two_to_the_31(serving: Serving, queries: int) -> None:
    """The pages that are used lie past 2^32 elements of the cache."""
    page, pages = 64, 70_000
    cache = torch.zeros(2, pages, page, 8, 128, dtype=torch.bfloat16, device=DEVICE)
    assert cache[0].numel() > 2**32
    cache[:, -40:].normal_()
    used = torch.arange(pages - 40, pages, dtype=torch.int32, device=DEVICE).view(2, 20)
    query = torch.randn(2 * queries, 32, 128, device=DEVICE).bfloat16()
    lengths = torch.tensor([1280, 700], dtype=torch.int32, device=DEVICE)
    starts = torch.tensor([0, queries, 2 * queries], dtype=torch.int32, device=DEVICE)
    step = Step(starts, lengths, PageTable(used, page), queries, 1280)
    out, right = (torch.full((2 * queries, 32, 128), math.nan, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    target = target_of(torch.device(DEVICE))
    problem = Problem("paged_attention", target, "bfloat16", "bfloat16", 32, 8, 128, 128, page, queries)
    kernels = serving(problem)
    workspace = kernels.workspace(problem, 2, 2 * queries, DEVICE)
    workspace.prepare(step)
    kernels.paged_attention(query, cache[0], cache[1], step, Mask(), out, scale=0.09, workspace=workspace)
    reference.paged_attention(query, cache[0], cache[1], step, Mask(), right, scale=0.09)
    assert relative_error(out.cpu(), right.cpu()) < 1e-2
