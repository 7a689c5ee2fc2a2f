"""`paged_attention` of the reference, against the contract's words in float64 and against torch's own attention."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from cases import LAYOUTS, Inputs, PagedCase, assert_close, build_paged, relative_error, sees
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import paged_cases

from taut.common_kernels import attend, reference
from taut.common_kernels.step import Mask

if TYPE_CHECKING:
    from torch import Tensor


def torch_attention(inputs: Inputs) -> Tensor:
    """Output [T, Hq, V] by scaled_dot_product_attention, row by row; a sink is one more key whose value is zero."""
    case = inputs.case
    assert not inputs.mask.soft_cap, "torch has none"
    sinks, slopes = inputs.options.get("sinks"), inputs.options.get("alibi_slopes")
    out = torch.zeros(inputs.tokens, case.q_heads, inputs.value_size, dtype=torch.float64)
    first = 0
    for query, key, value in zip(inputs.queries, inputs.keys, inputs.values, strict=True):
        m, n, group = len(query), len(key), case.q_heads // key.shape[1]
        if not m or not n:
            first += m
            continue
        q = query.transpose(0, 1)  # [Hq, m, D]
        k, v = (x.transpose(0, 1).repeat_interleave(group, dim=0) for x in (key, value))  # [Hq, n, *]
        p, j = torch.arange(n - m, n)[:, None], torch.arange(n)[None, :]
        seen = torch.stack([sees(inputs.mask, n - m + i, j[0]) for i in range(m)])  # [m, n]
        bias = torch.zeros(case.q_heads, m, n, dtype=torch.float64)
        if slopes is not None:
            bias = bias + slopes.double()[:, None, None] * (j - p)
        bias = bias.masked_fill(~seen, -math.inf)
        if sinks is not None:
            k, v = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
            bias = torch.cat([bias, sinks.double()[:, None, None].expand(-1, m, 1)], dim=-1)
        mixed = torch.nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=bias[None], scale=inputs.options["scale"]
        )[0]  # [Hq, m, V]
        out[first : first + m] = mixed.transpose(0, 1) * seen.any(-1)[:, None, None]
        blind = ~seen.any(-1)
        out[first : first + m][blind] = 0
        first += m
    return out


@given(paged_cases(dtype="float64"))
@settings(max_examples=300)
def test_all_features_in_float64(case: PagedCase) -> None:
    inputs = build_paged(case)
    assert_close(inputs.run(reference), inputs.expected(), case.dtype)


@given(paged_cases(soft_caps=(0.0,), dtype="float64"))
@settings(max_examples=200)
def test_equals_torch(case: PagedCase) -> None:
    inputs = build_paged(case)
    out, _ = inputs.run(reference)
    assert relative_error(out, torch_attention(inputs)) < 1e-9


@given(paged_cases(), st.sampled_from(("float32", "float16", "bfloat16")))
@settings(max_examples=60)
def test_model_dtypes(case: PagedCase, dtype: str) -> None:
    case = PagedCase(**(vars(case) | {"dtype": dtype}))
    inputs = build_paged(case)
    assert_close(inputs.run(reference), inputs.expected(), dtype)


@given(
    paged_cases(cache_dtype="float8_e4m3fn"),
    st.sampled_from(("none", "tensor", "head")),
    st.sampled_from(("float32", "bfloat16")),
)
@settings(max_examples=60)
def test_float8_caches(case: PagedCase, scales: str, dtype: str) -> None:
    case = PagedCase(**(vars(case) | {"scales": scales, "dtype": dtype}))
    inputs = build_paged(case)
    assert_close(inputs.run(reference), inputs.expected(), dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("indirect", [False, True])
def test_every_layout_and_addressing(layout: str, page_size: int, indirect: bool) -> None:
    case = PagedCase(
        lengths=(33, 0, 1, 64, 17),
        queries=(1, 1, 1, 1, 1),
        page_size=page_size,
        layout=layout,  # type: ignore[arg-type]
        indirect=indirect,
        value_size=8,
        dtype="float64",
    )
    inputs = build_paged(case)
    assert_close(inputs.run(reference), inputs.expected(), case.dtype)


def test_scores_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prefill is computed a few queries at a time; the slices must not show."""
    monkeypatch.setattr(attend, "SCORES_AT_ONCE", 4 * 50 * 3)  # three queries at once in the longer row
    case = PagedCase(lengths=(50, 20), queries=(31, 20), mask=Mask(left=9), sinks=True, alibi=True, dtype="float64")
    inputs = build_paged(case)
    assert_close(inputs.run(reference), inputs.expected(), case.dtype)


@pytest.mark.parametrize("sinks", [False, True])
def test_nothing_to_do(sinks: bool) -> None:
    """Rows without work, queries before position 0, padding, no rows at all: zeros and -inf, with sinks too."""
    idle = PagedCase(lengths=(0, 0), queries=(1, 3), padded_queries=2, padded_rows=1, sinks=sinks)
    out, lse = build_paged(idle).run(reference)
    assert not out.any()
    assert lse is not None
    assert (lse == -math.inf).all()

    early = PagedCase(lengths=(2,), queries=(5,), sinks=sinks)  # three queries stand before the first key
    out, lse = build_paged(early).run(reference)
    assert lse is not None
    assert not out[:3].any()
    assert (lse[:3] == -math.inf).all()
    assert out[3:].any(-1).all()
    assert lse[3:].isfinite().all()

    nobody = PagedCase(lengths=(), queries=(), padded_queries=4, sinks=sinks)
    out, lse = build_paged(nobody).run(reference)
    assert not out.any()
    assert lse is not None
    assert (lse == -math.inf).all()


def test_large_scores_do_not_overflow() -> None:
    case = PagedCase(lengths=(40,), queries=(2,), dtype="float32")
    inputs = build_paged(case)
    inputs.options["scale"] = 1e4
    assert_close(inputs.run(reference), inputs.expected(), case.dtype)


def test_scales_mean_nothing_to_a_cache_that_is_not_quantised() -> None:
    """Storing ignores them there, so reading must: the engines hand them over whatever the cache's dtype is."""
    inputs = build_paged(PagedCase(lengths=(20,), queries=(2,)))
    plain, _ = inputs.run(reference)
    inputs.options |= {"key_scale": torch.tensor(0.5), "value_scale": torch.tensor(0.25)}
    scaled, _ = inputs.run(reference)
    assert torch.equal(plain, scaled)
