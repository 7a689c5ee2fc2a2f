"""Who sees what, in kernels in Triton: the twin of `step.Mask`, and of `hopper_mask` in Gluon.

A query at position i sees the key at position j of its row if j is before the row's end and the mask allows it. Both
files are the same text, but for the name of the language: a wrong mask is mended here and there alike.
"""

from __future__ import annotations

import triton
import triton.language as tl

from taut.common_kernels.aggregates import aggregates_of


@aggregates_of(tl, triton)
class Mask:
    """Who sees what.

    Attributes:
        left: keys before its own position that a query sees, if HAS_LEFT.
        right: keys after its own position that a query sees, if HAS_RIGHT.
        CAUSAL: no query sees a key after its own position.
        HAS_LEFT: whether there is a window to the left.
        HAS_RIGHT: the same to the right.
    """

    left: tl.tensor
    right: tl.tensor
    CAUSAL: tl.constexpr
    HAS_LEFT: tl.constexpr
    HAS_RIGHT: tl.constexpr


@triton.jit
def sees(mask: Mask, keys: tl.tensor, positions: tl.tensor, there: tl.tensor) -> tl.tensor:
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


@triton.jit
def key_range(mask: Mask, first_position: tl.tensor, queries: tl.tensor, length: tl.tensor) -> tl.tensor:
    """Of some queries side by side: the keys (first, end) that one of them sees, and those that all of them see."""
    last_position = first_position + queries - 1
    first_seen = length * 0
    end_seen = length
    first_common = length * 0
    end_common = length
    if mask.HAS_LEFT:
        first_seen = tl.maximum(first_position - mask.left, 0)
        first_common = tl.maximum(last_position - mask.left, 0)
    if mask.CAUSAL:
        end_seen = tl.minimum(end_seen, last_position + 1)
        end_common = tl.minimum(end_common, first_position + 1)
    if mask.HAS_RIGHT:
        end_seen = tl.minimum(end_seen, last_position + mask.right + 1)
        end_common = tl.minimum(end_common, first_position + mask.right + 1)
    return first_seen, end_seen, first_common, end_common


@triton.jit
def sees_any(mask: Mask, positions: tl.tensor, length: tl.tensor) -> tl.tensor:
    """Whether a query sees some key of its row, told from its position: the keys may be shared out among programs."""
    first = tl.zeros_like(positions)
    end = tl.zeros_like(positions) + length
    if mask.HAS_LEFT:
        first = tl.maximum(positions - mask.left, 0)
    if mask.CAUSAL:
        end = tl.minimum(end, positions + 1)
    if mask.HAS_RIGHT:
        end = tl.minimum(end, positions + mask.right + 1)
    return first < end
