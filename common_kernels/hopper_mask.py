"""Who sees what, in kernels in Gluon: the twin of `step.Mask`, and of `triton_mask` in Triton.

A query at position i sees the key at position j of its row if j is before the row's end and the mask allows it. Both
files are the same text, but for the name of the language: a wrong mask is mended here and there alike.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from taut.common_kernels.aggregates import aggregates_of


@aggregates_of(gl, gluon)
class Mask:
    """Who sees what.

    Attributes:
        left: keys before its own position that a query sees, if HAS_LEFT.
        right: keys after its own position that a query sees, if HAS_RIGHT.
        CAUSAL: no query sees a key after its own position.
        HAS_LEFT: whether there is a window to the left.
        HAS_RIGHT: the same to the right.
    """

    left: gl.tensor
    right: gl.tensor
    CAUSAL: gl.constexpr
    HAS_LEFT: gl.constexpr
    HAS_RIGHT: gl.constexpr


@gluon.jit
def sees(mask: Mask, keys: gl.tensor, positions: gl.tensor, there: gl.tensor) -> gl.tensor:
    """Which keys (their positions in the row), of those that are there, the queries at some positions see.

    Shapes broadcast. `there` says which keys lie before the row's end; True where all do.
    """
    seen = there
    if mask.CAUSAL:
        seen = seen & (keys <= positions)
    if mask.HAS_LEFT:
        seen = seen & (keys >= positions - mask.left)
    if mask.HAS_RIGHT:
        seen = seen & (keys <= positions + mask.right)
    return seen


@gluon.jit
def key_range(mask: Mask, first_position: gl.tensor, queries: gl.tensor, length: gl.tensor) -> gl.tensor:
    """Of some queries side by side: the keys (first, end) that one of them sees, and those that all of them see."""
    last_position = first_position + queries - 1
    first_seen = length * 0
    end_seen = length
    first_common = length * 0
    end_common = length
    if mask.HAS_LEFT:
        first_seen = gl.maximum(first_position - mask.left, 0)
        first_common = gl.maximum(last_position - mask.left, 0)
    if mask.CAUSAL:
        end_seen = gl.minimum(end_seen, last_position + 1)
        end_common = gl.minimum(end_common, first_position + 1)
    if mask.HAS_RIGHT:
        end_seen = gl.minimum(end_seen, last_position + mask.right + 1)
        end_common = gl.minimum(end_common, first_position + mask.right + 1)
    return first_seen, end_seen, first_common, end_common


@gluon.jit
def sees_any(mask: Mask, positions: gl.tensor, length: gl.tensor) -> gl.tensor:
    """Whether a query sees some key of its row, told from its position: the keys may be shared out among programs."""
    first = gl.zeros_like(positions)
    end = gl.zeros_like(positions) + length
    if mask.HAS_LEFT:
        first = gl.maximum(positions - mask.left, 0)
    if mask.CAUSAL:
        end = gl.minimum(end, positions + 1)
    if mask.HAS_RIGHT:
        end = gl.minimum(end, positions + mask.right + 1)
    return first < end
