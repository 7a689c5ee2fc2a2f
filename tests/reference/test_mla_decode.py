"""`mla_decode` of the reference, against the contract's words and against attention that was never absorbed."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from cases import MlaCase, assert_close, build_mla, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import mla_cases

from taut.common_kernels import reference


@given(mla_cases(dtype="float64"))
@settings(max_examples=80)
def test_contract_in_float64(case: MlaCase) -> None:
    inputs = build_mla(case)
    assert_close(inputs.run(reference), inputs.expected(), case.dtype)


@given(mla_cases())
def test_the_output_may_be_the_query(case: MlaCase) -> None:
    inputs = build_mla(case)
    assert_close((inputs.decode_in_place(reference), None), inputs.expected(), case.dtype)


@given(mla_cases(), st.sampled_from(("float32", "float16", "bfloat16")))
@settings(max_examples=40)
def test_model_dtypes(case: MlaCase, dtype: str) -> None:
    case = replace(case, dtype=dtype)
    inputs = build_mla(case)
    assert_close(inputs.run(reference), inputs.expected(), dtype)


@given(mla_cases(cache_dtype="float8_e4m3fn"), st.sampled_from(("none", "tensor")))
@settings(max_examples=40)
def test_float8_caches(case: MlaCase, scales: str) -> None:
    case = replace(case, scales=scales)  # type: ignore[arg-type]
    inputs = build_mla(case)
    assert_close(inputs.run(reference), inputs.expected(), case.dtype)


@given(mla_cases(dtype="float64"), st.sampled_from((8, 20)), st.sampled_from((8, 12)))
@settings(max_examples=80)
def test_equals_the_unabsorbed_form(case: MlaCase, nope_size: int, value_size: int) -> None:
    """Every head's own keys and values, made from the latent by W_UK and W_UV, through torch's attention.

    Keys: [W_UK latent, rope]; values: W_UV latent. Absorbed: W_UK goes into the query, W_UV is applied to the output.
    """
    generator = torch.Generator().manual_seed(case.seed + 1)
    H, C = case.q_heads, case.latent
    W_UK = torch.randn(H, nope_size, C, generator=generator, dtype=torch.float64) / C**0.5
    W_UV = torch.randn(H, C, value_size, generator=generator, dtype=torch.float64) / C**0.5
    scale = (nope_size + case.rope) ** -0.5
    inputs = build_mla(case)
    q_pe = inputs.arguments[1]
    head_queries = torch.randn(inputs.tokens, H, nope_size, generator=generator, dtype=torch.float64)
    absorbed = torch.einsum("thd,hdc->thc", head_queries, W_UK)
    inputs = replace(inputs, arguments=(absorbed, *inputs.arguments[1:]), options=inputs.options | {"scale": scale})
    latent_out, _ = inputs.run(reference)
    out = torch.einsum("thc,hcv->thv", latent_out, W_UV)

    expected = torch.zeros_like(out)
    first = 0
    for row, m in enumerate(len(query) for query in inputs.queries):
        cached = inputs.keys[row][:, 0]  # [n, C + E]
        n = len(cached)
        rows = slice(first, first + m)
        first += m
        if not m or not n:
            continue
        latent, rope = cached[:, :C], cached[:, C:]
        key_nope = torch.einsum("nc,hdc->hnd", latent, W_UK)
        keys = torch.cat([key_nope, rope.expand(H, -1, -1)], dim=-1)  # [H, n, d + E]
        values = torch.einsum("nc,hcv->hnv", latent, W_UV)
        queries = torch.cat([head_queries[rows], q_pe[rows]], dim=-1).transpose(0, 1)
        seen = torch.ones(m, n, dtype=torch.bool)
        if case.causal:
            seen = torch.arange(n)[None, :] <= torch.arange(n - m, n)[:, None]
        mixed = torch.nn.functional.scaled_dot_product_attention(
            queries[None], keys[None], values[None], attn_mask=seen[None, None], scale=scale
        )[0].transpose(0, 1)
        expected[rows] = mixed.masked_fill(~seen.any(-1)[:, None, None], 0.0)
    assert relative_error(out, expected) < 1e-9


def test_nothing_to_do() -> None:
    case = MlaCase(lengths=(0, 3), queries=(2, 5), padded_queries=2, padded_rows=1)
    out, lse = build_mla(case).run(reference)
    assert lse is not None
    idle = [0, 1, 2, 3, 7, 8]  # a row of length 0, two queries before position 0, the padding
    assert not out[idle].any()
    assert (lse[idle] == -math.inf).all()
    assert lse[4:7].isfinite().all()
