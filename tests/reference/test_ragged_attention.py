"""`ragged_attention` of the reference: keys side by side instead of in pages."""

from __future__ import annotations

import pytest
import torch
from cases import PagedCase, assert_close, build_ragged, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import paged_cases

from taut.common_kernels import reference
from taut.common_kernels.step import Mask

from .test_paged_attention import torch_attention


@given(paged_cases(dtype="float64"))
@settings(max_examples=100)
def test_all_features_in_float64(case: PagedCase) -> None:
    inputs = build_ragged(case)
    assert_close(inputs.run(reference), inputs.expected(), case.dtype)


@given(paged_cases(soft_caps=(0.0,), dtype="float64"))
@settings(max_examples=60)
def test_equals_torch(case: PagedCase) -> None:
    inputs = build_ragged(case)
    out, _ = inputs.run(reference)
    assert relative_error(out, torch_attention(inputs)) < 1e-9


@given(paged_cases(), st.sampled_from(("float32", "float16", "bfloat16")))
@settings(max_examples=30)
def test_model_dtypes(case: PagedCase, dtype: str) -> None:
    case = PagedCase(**(vars(case) | {"dtype": dtype}))
    inputs = build_ragged(case)
    assert_close(inputs.run(reference), inputs.expected(), dtype)


@pytest.mark.parametrize("causal", [False, True])
def test_plain_self_attention(causal: bool) -> None:
    """An encoder, and a prefill from nothing: torch's attention without any mask of ours."""
    case = PagedCase((9,), (9,), q_heads=4, kv_heads=4, value_size=24, dtype="float64", mask=Mask(causal=causal))
    inputs = build_ragged(case)
    out, _ = inputs.run(reference)
    q, k, v = (x[0].transpose(0, 1)[None] for x in (inputs.queries, inputs.keys, inputs.values))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=case.scale)
    assert relative_error(out, expected[0].transpose(0, 1)) < 1e-12
