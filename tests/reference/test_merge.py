"""`merge` of the reference: attention over parts gives attention over the whole."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import torch
from cases import GUARD, PagedCase, assert_close, build_ragged
from hypothesis import given, settings
from hypothesis import strategies as st

from taut.common_kernels import reference
from taut.common_kernels.step import Mask


@given(
    cuts=st.lists(st.integers(0, 30), min_size=0, max_size=4).map(sorted),
    queries=st.integers(1, 4),
    with_lse=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60)
def test_parts_make_the_whole(cuts: list[int], queries: int, with_lse: bool, seed: int) -> None:
    """One row of 30 keys cut anywhere, empty parts included; the empty parts' outputs are poison."""
    length = 30
    case = PagedCase((length,), (queries,), dtype="float64", mask=Mask(causal=False), seed=seed)
    whole = build_ragged(case)
    bounds = [0, *cuts, length]
    parts, lses = [], []
    for start, end in pairwise(bounds):
        query, key, value, query_starts, _, mask = whole.arguments
        key_starts = torch.tensor([0, end - start], dtype=torch.int32)
        part = replace(whole, arguments=(query, key[start:end], value[start:end], query_starts, key_starts, mask))
        out, lse = part.run(reference)
        parts.append(out if end > start else torch.full_like(out, math.nan))
        lses.append(lse)
    out, lse = torch.full_like(parts[0], math.nan), torch.full_like(lses[0], math.nan)
    reference.merge(torch.stack(parts), torch.stack(lses), out, lse if with_lse else None)
    # The LSEs of the parts are float32, and so are the weights made of them.
    assert_close((out, lse if with_lse else None), whole.expected(), case.dtype, tolerance=1e-5)
    if not with_lse:
        assert lse.isnan().all()


def test_empty_everywhere() -> None:
    """Zeros and -inf where no part saw anything, beside a token that every part saw; nothing is written behind."""
    parts = torch.full((3, 2, 4, 8), math.nan)
    lses = torch.full((3, 2, 4), -math.inf)
    parts[:, 1], lses[:, 1] = 2.0, 0.5
    out, lse = torch.full((2 + GUARD, 4, 8), math.nan), torch.full((2 + GUARD, 4), math.nan)
    reference.merge(parts, lses, out[:2], lse[:2])
    assert not out[0].any()
    assert (lse[0] == -math.inf).all()
    torch.testing.assert_close(out[1], torch.full((4, 8), 2.0))
    torch.testing.assert_close(lse[1], torch.full((4,), 0.5 + math.log(3)))
    assert out[2:].isnan().all()
    assert lse[2:].isnan().all()


def test_far_apart_parts_do_not_overflow() -> None:
    parts = torch.stack([torch.full((1, 1, 2), 1.0), torch.full((1, 1, 2), 5.0)])
    lses = torch.tensor([[[800.0]], [[-800.0]]])
    out, lse = torch.full((1, 1, 2), math.nan), torch.full((1, 1), math.nan)
    reference.merge(parts, lses, out, lse)
    assert out.tolist() == [[[1.0, 1.0]]]
    assert lse.tolist() == [[800.0]]


def test_half_precision_output() -> None:
    parts = torch.randn(2, 3, 4, 8).bfloat16()
    lses = torch.randn(2, 3, 4)
    out = torch.full((3, 4, 8), math.nan, dtype=torch.bfloat16)
    reference.merge(parts, lses, out)
    weights = lses.double().softmax(0)[..., None]
    assert_close((out, None), ((weights * parts.double()).sum(0), torch.zeros(3, 4)), "bfloat16")
