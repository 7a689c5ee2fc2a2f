"""e4m3 (8 bits: sign, 4 of exponent, 3 of mantissa; NaN but no infinity) in integer arithmetic, for kernels.

The formats are in arXiv 2209.05433. Written out because Triton converts them only on targets whose hardware does, and a
cache may be float8 on any.
"""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST = tl.constexpr(448.0)


@triton.jit
def decode(bits: tl.tensor, NATIVE: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:  # noqa: N803
    """The numbers that bytes stand for, exactly: uint8 -> DTYPE (bfloat16, float16 or float32).

    NATIVE: whether the hardware converts. Otherwise sign, exponent and mantissa are put where float16 has its own, and
    the difference of the exponents' biases, 15 - 7, is multiplied back in; subnormal numbers come out right too.
    """
    if NATIVE:
        numbers = bits.to(tl.float8e4nv, bitcast=True).to(DTYPE)
    else:
        wide = bits.to(tl.uint16)
        half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        numbers = (half.to(tl.float16, bitcast=True) * 256.0).to(DTYPE)
    return numbers


@triton.jit
def encode(numbers: tl.tensor) -> tl.tensor:
    """The nearest e4m3 numbers, ties to even, saturating: float32 -> uint8."""
    size = tl.minimum(tl.abs(numbers), LARGEST)
    bits = size.to(tl.uint32, bitcast=True)
    # Keep 3 of 23 bits of the mantissa, rounding to even; then 120 = 127 - 7 is the difference of the biases.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 the steps are of 2^-9 each, which is the last bit of a float32 at 2^14: the addition rounds.
    small = (size + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    sign = (numbers.to(tl.uint32, bitcast=True) >> 24) & 0x80
    return (tl.where(size < 0.015625, small, normal) | sign).to(tl.uint8)
