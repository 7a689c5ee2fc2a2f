"""What the Hopper kernels of this operation share, in Gluon; `triton_softmax` explains the conventions."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
# The maximum before any key was seen: finite, so that "minus infinity minus minus infinity" never arises, and so low
# that no score is below it.
LOWEST = gl.constexpr(-1.0e30)


@gluon.jit
def query_range(
    first_position: gl.tensor,
    queries: gl.tensor,
    length: gl.tensor,
    left: gl.tensor,
    right: gl.tensor,
    CAUSAL: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
) -> gl.tensor:
    """Of a block of queries: the keys (first, end) that some of them sees, and those that all of them see."""
    last_position = first_position + queries - 1
    first_seen = length * 0
    end_seen = length
    first_common = length * 0
    end_common = length
    if HAS_LEFT:
        first_seen = gl.maximum(first_position - left, 0)
        first_common = gl.maximum(last_position - left, 0)
    if CAUSAL:
        end_seen = gl.minimum(end_seen, last_position + 1)
        end_common = gl.minimum(end_common, first_position + 1)
    if HAS_RIGHT:
        end_seen = gl.minimum(end_seen, last_position + right + 1)
        end_common = gl.minimum(end_common, first_position + right + 1)
    return first_seen, end_seen, first_common, end_common


@gluon.jit
def sees(
    keys: gl.tensor,
    positions: gl.tensor,
    length: gl.tensor,
    left: gl.tensor,
    right: gl.tensor,
    CAUSAL: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
) -> gl.tensor:
    """Which keys (their positions in the row) the queries at some positions see; shapes that broadcast."""
    seen = keys < length
    if CAUSAL:
        seen = seen & (keys <= positions)
    if HAS_LEFT:
        seen = seen & (keys >= positions - left)
    if HAS_RIGHT:
        seen = seen & (keys <= positions + right)
    return seen


@gluon.jit
def sees_any(
    positions: gl.tensor,
    length: gl.tensor,
    left: gl.tensor,
    right: gl.tensor,
    CAUSAL: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
) -> gl.tensor:
    """Whether a query sees some key of its row, told from its position: the keys may be shared out among programs."""
    first = gl.zeros_like(positions)
    end = gl.zeros_like(positions) + length
    if HAS_LEFT:
        first = gl.maximum(positions - left, 0)
    if CAUSAL:
        end = gl.minimum(end, positions + 1)
    if HAS_RIGHT:
        end = gl.minimum(end, positions + right + 1)
    return first < end


@gluon.jit
def cap_scores(products: gl.tensor, score_scale: gl.tensor, cap: gl.tensor) -> gl.tensor:
    """The soft cap, in base 2; tanh(x) = 1 - 2 / (exp(2 x) + 1), right at both ends, where exp gives 0 and infinity."""
    return cap * (1.0 - 2.0 / (gl.exp2(products * score_scale) + 1.0))


@gluon.jit
def add_sinks(total: gl.tensor, top: gl.tensor, sinks: gl.tensor, wanted: gl.tensor) -> gl.tensor:
    """One more score that has no value, where wanted: returns total, top and what the output is to be multiplied by."""
    scores = gl.where(wanted, sinks * LOG2E, LOWEST)
    new_top = gl.maximum(top, scores)
    decay = gl.exp2(top - new_top)
    return total * decay + gl.where(wanted, gl.exp2(scores - new_top), 0.0), new_top, decay


@gluon.jit
def lse_of(total: gl.tensor, top: gl.tensor) -> gl.tensor:
    """The natural logarithm of the sum of exponentiated scores; -inf where nothing was seen."""
    seen = total > 0.0
    return gl.where(seen, (top + gl.log2(gl.where(seen, total, 1.0))) * LN2, float("-inf"))


@gluon.jit
def scale_of_scores(scale: gl.tensor, soft_cap: gl.tensor, HAS_SOFT_CAP: gl.constexpr) -> gl.tensor:
    """What a product is multiplied by: to base 2, or with a soft cap to the argument of `cap_scores`."""
    return scale * (2.0 * LOG2E) / soft_cap if HAS_SOFT_CAP else scale * LOG2E
