"""`mla_decode` of the provider `triton` against the contract's words: ragged, poisoned, both forms of the products."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from cases import MLA_BATCH, MlaCase, assert_close, build_mla
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import mla_cases

from taut.common_kernels import portable
from taut.common_kernels.warm_up import mixed_steps

if TYPE_CHECKING:
    from pathlib import Path

FORMS = {"plain": 0, "transposed": 1}


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The provider with a tile table of its own for either form; small tiles, so that rows are split."""
    folder: Path = tmp_path_factory.mktemp("tables")
    made = {}
    for name, transposed in FORMS.items():
        tile = {"keys": 16, "rows": 16, "transposed": transposed, "warps": 4, "stages": 1, "programs": 2}
        tile |= {"share": 1, "spare": 2, "apart": transposed}
        path = folder / f"{name}.json"
        table = {"about": "", "vendor": "nvidia", "targets": [], "shared_memory": 0}
        path.write_text(json.dumps(table | {"operations": {"mla_decode": [{"when": {}, "tile": tile}]}}))
        made[name] = SimpleNamespace(
            workspace=partial(portable.workspace, table_path=str(path)), mla_decode=portable.mla_decode
        )
    return made


@given(mla_cases(), st.sampled_from(tuple(FORMS)), st.sampled_from(("float32", "float16")))
@settings(max_examples=40)
def test_contract(forms: dict[str, Any], case: MlaCase, form: str, dtype: str) -> None:
    inputs = build_mla(replace(case, dtype=dtype))
    assert_close(inputs.run(forms[form]), inputs.expected(), dtype)


@given(mla_cases(cache_dtype="float8_e4m3fn"), st.sampled_from(tuple(FORMS)), st.sampled_from(("none", "tensor")))
@settings(max_examples=10)
def test_float8_caches(forms: dict[str, Any], case: MlaCase, form: str, scales: str) -> None:
    case = replace(case, scales=scales)  # type: ignore[arg-type]
    inputs = build_mla(case)
    assert_close(inputs.run(forms[form]), inputs.expected(), case.dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("heads", [1, 5, 20, 40])
def test_head_counts_and_several_queries(forms: dict[str, Any], form: str, heads: int) -> None:
    """More heads than a tile has rows, fewer, and queries of one row that share a tile."""
    case = MlaCase(**MLA_BATCH, q_heads=heads, page_size=7, indirect=True)
    inputs = build_mla(case)
    assert_close(inputs.run(forms[form]), inputs.expected(), case.dtype)


@pytest.mark.parametrize("form", FORMS)
def test_fewer_queries_than_promised_after_a_step_of_more(forms: dict[str, Any], form: str) -> None:
    """An item for each query, and the merge looks at as many as there could be: those of an earlier step are gone."""
    case = MlaCase(lengths=(90, 70), queries=(1, 3), q_heads=16)
    inputs = build_mla(case)
    assert_close(inputs.run(forms[form]), inputs.expected(), case.dtype)


@given(mla_cases(), st.sampled_from(tuple(FORMS)))
@settings(max_examples=20)
def test_the_output_may_be_the_query(forms: dict[str, Any], case: MlaCase, form: str) -> None:
    inputs = build_mla(case)
    assert_close((inputs.decode_in_place(forms[form]), None), inputs.expected(), case.dtype)


def test_idle_steps_leave_the_cache_alone(forms: dict[str, Any]) -> None:
    case = MlaCase(lengths=(70, 0, 5), queries=(1, 1, 1), q_heads=3, indirect=True, padded_rows=1)
    inputs = build_mla(case)
    workspace = forms["plain"].workspace(case.problem(), 5, 5, "cpu")
    q_nope, q_pe, cache = inputs.arguments[:3]
    before = cache.clone()
    for idle in mixed_steps(5, [1]):
        step = idle.step(case.page_size, cache.device)
        workspace.prepare(step)
        query, rope = (part.new_zeros(idle.tokens, *part.shape[1:]) for part in (q_nope, q_pe))
        out, lse = torch.full_like(query, torch.nan), torch.full(query.shape[:2], torch.nan)
        portable.mla_decode(query, rope, cache, step, out, scale=1.0, lse=lse, workspace=workspace)
        assert (out == 0).all()
        assert (lse == -torch.inf).all()
    assert torch.equal(before, cache) or torch.allclose(before, cache, equal_nan=True)
    workspace.prepare(inputs.step)
    assert_close(inputs.call(portable.mla_decode, workspace=workspace), inputs.expected(), case.dtype)


def test_the_published_shape(forms: dict[str, Any]) -> None:
    """Latent 512 and rope 64, with the table's own tiles."""
    case = MlaCase(lengths=(70, 0, 5), queries=(1, 1, 1), q_heads=16, latent=512, rope=64, page_size=64)
    inputs = build_mla(case)
    assert_close(inputs.run(portable), inputs.expected(), case.dtype)
