"""How scores become weights, and where queries and results lie, in Gluon; `triton_softmax` explains the conventions."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from taut.common_kernels import base2
from taut.common_kernels.aggregates import aggregates_of

LOG2E = gl.constexpr(base2.LOG2E)
LN2 = gl.constexpr(base2.LN2)
LOWEST = gl.constexpr(base2.LOWEST)


@aggregates_of(gl, gluon)
class Scoring:
    """How products of queries and keys become scores.

    Attributes:
        sinks: pointer [Hq]: one more score of each head that has no value; or None.
        slopes: pointer [Hq]: what a head adds to a score for each position that its key lies ahead; or None.
        scale: what a product is multiplied by: to base 2, or with a soft cap to the argument of `cap_scores`.
        soft_cap: in base 2.
        HAS_SOFT_CAP: whether there is one.
    """

    sinks: gl.tensor | None
    slopes: gl.tensor | None
    scale: gl.tensor
    soft_cap: gl.tensor
    HAS_SOFT_CAP: gl.constexpr


@aggregates_of(gl, gluon)
class Queries:
    """Queries [T, Hq, D].

    Attributes:
        start: pointer to the first element.
        token_stride: in elements.
        head_stride: likewise.
    """

    start: gl.tensor
    token_stride: gl.tensor
    head_stride: gl.tensor


@aggregates_of(gl, gluon)
class Output:
    """Where results go.

    Attributes:
        out: pointer [T, Hq, V].
        lse: pointer [T, Hq], or None.
        out_token_stride: in elements, as all of them.
        out_head_stride: of the output.
        lse_token_stride: 0 without LSEs.
        lse_head_stride: likewise.
    """

    out: gl.tensor
    lse: gl.tensor | None
    out_token_stride: gl.tensor
    out_head_stride: gl.tensor
    lse_token_stride: gl.tensor
    lse_head_stride: gl.tensor


@gluon.jit
def out_of(output: Output, tokens: gl.tensor, heads: gl.tensor) -> gl.tensor:
    """Where the output of some tokens and heads begins; shapes that broadcast."""
    return output.out + tokens.to(gl.int64) * output.out_token_stride + heads * output.out_head_stride


@gluon.jit
def lse_at(output: Output, tokens: gl.tensor, heads: gl.tensor) -> gl.tensor:
    """Where the LSE of some tokens and heads lies; shapes that broadcast."""
    return output.lse + tokens.to(gl.int64) * output.lse_token_stride + heads * output.lse_head_stride


@gluon.jit
def scoring_of(
    scale: gl.tensor, soft_cap: gl.tensor, sinks: gl.tensor, slopes: gl.tensor, HAS_SOFT_CAP: gl.constexpr
) -> Scoring:
    """Scoring, from what a kernel is launched with."""
    score_scale = scale * (2.0 * LOG2E) / soft_cap if HAS_SOFT_CAP else scale * LOG2E
    return Scoring(sinks, slopes, score_scale, soft_cap * LOG2E, HAS_SOFT_CAP)


@gluon.jit
def cap_scores(products: gl.tensor, scoring: Scoring) -> gl.tensor:
    """The soft cap, in base 2; tanh(x) = 1 - 2 / (exp(2 x) + 1), right at both ends, where exp gives 0 and infinity."""
    return scoring.soft_cap * (1.0 - 2.0 / (gl.exp2(products * scoring.scale) + 1.0))


@gluon.jit
def add_sinks(row_sum: gl.tensor, row_max: gl.tensor, sinks: gl.tensor, wanted: gl.tensor) -> gl.tensor:
    """One more score that has no value, where wanted: returns row_sum, row_max and what the output is multiplied by."""
    scores = gl.where(wanted, sinks * LOG2E, LOWEST)
    new_max = gl.maximum(row_max, scores)
    alpha = gl.exp2(row_max - new_max)
    return row_sum * alpha + gl.where(wanted, gl.exp2(scores - new_max), 0.0), new_max, alpha


@gluon.jit
def lse_of(row_sum: gl.tensor, row_max: gl.tensor) -> gl.tensor:
    """The natural logarithm of the sum of exponentiated scores; -inf where nothing was seen."""
    seen = row_sum > 0.0
    return gl.where(seen, (row_max + gl.log2(gl.where(seen, row_sum, 1.0))) * LN2, float("-inf"))
