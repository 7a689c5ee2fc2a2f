"""Hypothesis strategies over the cases of `cases.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cases import LAYOUTS, MlaCase, PagedCase
from hypothesis import strategies as st

from taut.common_kernels.step import Mask

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn

PAGE_SIZES = (1, 2, 3, 7, 16, 64)


@st.composite
def batches(draw: DrawFn, longest: int = 80, most_rows: int = 5) -> dict[str, Any]:
    """Rows of any length, 0 included, with 0 to 6 queries each: decode, extend and idle rows side by side."""
    rows = draw(st.lists(st.tuples(st.integers(0, longest), st.integers(0, 6)), max_size=most_rows))
    return {
        "lengths": tuple(length for length, _ in rows),
        "queries": tuple(count for _, count in rows),
        "padded_rows": draw(st.integers(0, 2)),
        "padded_queries": draw(st.integers(0, 3)),
        "page_size": draw(st.sampled_from(PAGE_SIZES)),
        "indirect": draw(st.booleans()),
        "strided_query": draw(st.booleans()),
        "lse": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
    }


@st.composite
def masks(draw: DrawFn, soft_caps: tuple[float, ...] = (0.0, 0.0, 1.5)) -> Mask:
    """Causal or not, with windows of any side."""
    return Mask(
        causal=draw(st.booleans()),
        left=draw(st.sampled_from((-1, -1, 0, 1, 5, 30))),
        right=draw(st.sampled_from((-1, -1, 0, 2, 9))),
        soft_cap=draw(st.sampled_from(soft_caps)),
    )


@st.composite
def heads(draw: DrawFn) -> dict[str, int]:
    """MHA, GQA and MQA; keys and values of the same or of different size."""
    kv_heads = draw(st.sampled_from((1, 2, 3)))
    return {
        "kv_heads": kv_heads,
        "q_heads": kv_heads * draw(st.sampled_from((1, 2, 5))),
        "head_size": draw(st.sampled_from((4, 16, 24))),
        "value_size": draw(st.sampled_from((4, 16, 40))),
    }


@st.composite
def paged_cases(draw: DrawFn, soft_caps: tuple[float, ...] = (0.0, 0.0, 1.5), **fixed: Any) -> PagedCase:
    """Everything that `paged_attention` can be asked, but for what is `fixed`."""
    mask = draw(masks(soft_caps))
    drawn = {
        **draw(batches()),
        **draw(heads()),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "mask": mask,
        "sinks": draw(st.booleans()),
        "alibi": draw(st.booleans()),
        "forget_unseen": draw(st.booleans()),
    }
    return PagedCase(**(drawn | fixed))


@st.composite
def mla_cases(draw: DrawFn, **fixed: Any) -> MlaCase:
    """Everything that `mla_decode` can be asked, but for what is `fixed`."""
    drawn = {
        **draw(batches()),
        "q_heads": draw(st.sampled_from((1, 3, 16))),
        "latent": draw(st.sampled_from((8, 32))),
        "rope": draw(st.sampled_from((4, 16))),
        "layout": draw(st.sampled_from(("separate", "padded"))),
        "causal": draw(st.booleans()),
    }
    return MlaCase(**(drawn | fixed))
