"""`paged_attention` and `ragged_attention` of the provider `triton` against the contract: ragged and poisoned."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from cases import LAYOUTS, MASKS, PAGED_BATCH, PagedCase, assert_close, build_paged, build_ragged
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import paged_cases

from taut.common_kernels import portable
from taut.common_kernels.builtin import HOPPER, TRITON
from taut.common_kernels.paged_attention import triton_launch
from taut.common_kernels.warm_up import mixed_steps

if TYPE_CHECKING:
    from pathlib import Path

    from taut.common_kernels.step import Mask

SIZES = st.sampled_from((16, 32, 48))
# Which rows go to which kernel: all to decode, none, or those of up to two queries.
SERVED_BY = {"decode": 16, "prefill": 0, "both": 2}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The provider with small tiles, so that rows are split and tiles are of every kind."""
    decode = {"rows": 16, "keys": 32, "cut": 16, "warps": 4, "stages": 1, "programs": 4, "share": 1, "spare": 2}
    prefill = {"rows": 16, "keys": 16, "pack": 2, "warps": 4, "stages": 1}
    table = {"about": "", "vendor": "nvidia", "targets": [], "shared_memory": 0}
    operations = {"paged_decode": [{"when": {}, "tile": decode}], "paged_prefill": [{"when": {}, "tile": prefill}]}
    path: Path = tmp_path_factory.mktemp("tables") / "small.json"
    path.write_text(json.dumps(table | {"operations": operations}))
    return SimpleNamespace(
        workspace=partial(portable.workspace, table_path=str(path)),
        paged_attention=portable.paged_attention,
        ragged_attention=portable.ragged_attention,
    )


def check(kernels: Any, case: PagedCase, served_by: str = "both") -> None:
    inputs = build_paged(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_launch, "DECODE_QUERIES", SERVED_BY[served_by])
        assert_close(inputs.run(kernels), inputs.expected(), case.dtype)


@given(paged_cases(), SIZES, SIZES, st.sampled_from(("decode", "both")), st.sampled_from(("float32", "float16")))
@settings(max_examples=40)
def test_contract(small: Any, case: PagedCase, head_size: int, value_size: int, served_by: str, dtype: str) -> None:
    check(small, replace(case, head_size=head_size, value_size=value_size, dtype=dtype), served_by)


@given(paged_cases(head_size=32, value_size=32), st.data())
@settings(max_examples=15)
def test_ragged_contract(small: Any, case: PagedCase, data: st.DataObject) -> None:
    inputs = build_ragged(case)
    assert_close(inputs.run(small), inputs.expected(), case.dtype)


@given(
    paged_cases(cache_dtype="float8_e4m3fn", head_size=32, value_size=16), st.sampled_from(("none", "tensor", "head"))
)
@settings(max_examples=10)
def test_float8_caches(small: Any, case: PagedCase, scales: str) -> None:
    check(small, replace(case, scales=scales))  # type: ignore[arg-type]


@pytest.mark.parametrize("served_by", SERVED_BY)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("plain", [True, False])
def test_masks(small: Any, served_by: str, mask: Mask, plain: bool) -> None:
    if plain:
        check(small, PagedCase(**PAGED_BATCH, mask=mask), served_by)
    else:
        check(
            small,
            PagedCase(**PAGED_BATCH, mask=mask, sinks=True, alibi=True, forget_unseen=True, page_size=3),
            served_by,
        )


@pytest.mark.parametrize(
    ("head_size", "value_size"), [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)]
)
def test_the_published_head_sizes(head_size: int, value_size: int) -> None:
    """With the tables' own tiles."""
    check(portable, PagedCase(**PAGED_BATCH, q_heads=2, kv_heads=1, head_size=head_size, value_size=value_size))


@pytest.mark.parametrize("page_size", [1, 7, 16, 64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_page_sizes(small: Any, page_size: int, layout: Any) -> None:
    """A page that holds several tiles, one that is a part of one, and one that divides nothing."""
    check(small, PagedCase(**PAGED_BATCH, page_size=page_size, layout=layout, indirect=True, strided_query=True))


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(1, 1), (7, 1), (12, 2), (40, 1), (6, 3)])
@pytest.mark.parametrize("served_by", SERVED_BY)
def test_groups(small: Any, q_heads: int, kv_heads: int, served_by: str) -> None:
    """Groups that fill no tile, that leave rows of one idle, and that need several."""
    check(small, PagedCase(**PAGED_BATCH, q_heads=q_heads, kv_heads=kv_heads), served_by)


@pytest.mark.parametrize(
    ("cached", "sharers", "programs", "expected"),
    [(0, 16, 100, 1), (0, 16, 3, 3), (0, 16, 1, 5), (2, 16, 100, 2), (9, 16, 100, 5), (0, 1, 100, 3)],
)
def test_few_heads_at_a_time(
    monkeypatch: pytest.MonkeyPatch, cached: int, sharers: int, programs: int, expected: int
) -> None:
    """Of five heads as many as the cache holds, but enough for two rounds of the GPU's four multiprocessors."""
    monkeypatch.setattr(triton_launch, "SHARERS", sharers)
    key, value = torch.empty(1, 5, 96, dtype=torch.float16), torch.empty(1, 5, 32, dtype=torch.float16)
    monkeypatch.setattr(triton_launch, "CACHED_KEYS", cached * 1000 * (96 + 32) * 2)
    assert triton_launch.heads_together(key, value, 1000, programs, "cpu") == expected


@pytest.mark.parametrize("together", [1, 2, 4])
def test_heads_that_are_served_one_after_the_other(small: Any, monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    monkeypatch.setattr(triton_launch, "heads_together", lambda *_: together)
    check(small, PagedCase(**PAGED_BATCH, q_heads=15, kv_heads=5), "prefill")


def test_one_row_with_one_query(small: Any) -> None:
    """Of which the host knows that it is one work item."""
    inputs = build_paged(PagedCase(lengths=(200,), queries=(1,)))
    step = replace(inputs.step, max_query=1)
    inputs.step, inputs.arguments = step, (*inputs.arguments[:3], step, *inputs.arguments[4:])
    assert_close(inputs.run(small), inputs.expected(), inputs.case.dtype)


def test_head_sizes_are_cut_into_powers_of_two() -> None:
    assert [triton_launch.halves(size) for size in (16, 80, 96, 128, 192)] == [
        (16, 0),
        (64, 16),
        (64, 32),
        (128, 0),
        (128, 64),
    ]
    for size in (8, 72, 112):
        with pytest.raises(ValueError, match="not a sum of two powers"):
            triton_launch.halves(size)


def test_idle_steps_leave_a_workspace_that_serves(small: Any) -> None:
    inputs = build_paged(PagedCase(lengths=(37, 5, 40, 60, 3), queries=(1, 2, 1, 1, 1)))
    query, keys, values, step, mask = inputs.arguments
    problem = inputs.case.problem()
    workspace = small.workspace(problem, step.rows, len(query), "cpu")
    for idle in mixed_steps(2, [1, problem.max_query, 50]):
        nobodys = idle.step(problem.page_size, query.device)
        workspace.prepare(nobodys)
        queries = query.new_zeros(idle.tokens, *query.shape[1:])
        out = torch.full((*queries.shape[:2], problem.value_size), torch.nan)
        lse = torch.full(queries.shape[:2], torch.nan)
        small.paged_attention(queries, keys, values, nobodys, mask, out, scale=1.0, lse=lse, workspace=workspace)
        assert (out == 0).all()
        assert (lse == -torch.inf).all()
    workspace.prepare(step)
    assert_close(inputs.call(small.paged_attention, workspace=workspace), inputs.expected(), inputs.case.dtype)


def test_providers_say_up_to_how_many_queries_decode_serves() -> None:
    workspace = portable.workspace(PagedCase(**PAGED_BATCH).problem(), 4, 64, "cpu")
    assert TRITON.query_limits == HOPPER.query_limits == (workspace.schedule.shape.longest,)


def test_a_step_needs_its_workspace(small: Any) -> None:
    inputs = build_paged(PagedCase(**PAGED_BATCH))
    with pytest.raises(TypeError, match="needs the workspace"):
        inputs.call(small.paged_attention)
