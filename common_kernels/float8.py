"""e4m3 (8 bits: sign, 4 of exponent, 3 of mantissa; NaN but no infinity) in integer arithmetic, for kernels.

The formats are in arXiv 2209.05433. Written out because Triton converts them only on targets whose hardware does, and a
cache may be float8 on any.
"""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST = tl.constexpr(448.0)


# Four bytes to bfloat16, two at a time: sign, exponent and mantissa are put where bfloat16 has its own, and 2^120, from
# difference of the exponents' biases, 127 - 7, is multiplied in. NVIDIA's own conversion goes by way of float16 and
# float32, one number at a time, at a quarter of the rate or less.
TO_BFLOAT16 = tl.constexpr("""{
    .reg .b32 low, high, low_size, high_size, factor, zero;
    prmt.b32 low, $2, 0, 0x1404;
    prmt.b32 high, $2, 0, 0x3424;
    shr.u32 low_size, low, 4;
    shr.u32 high_size, high, 4;
    and.b32 low_size, low_size, 0x07f007f0;
    and.b32 high_size, high_size, 0x07f007f0;
    lop3.b32 low, low, 0x80008000, low_size, 0xea;
    lop3.b32 high, high, 0x80008000, high_size, 0xea;
    mov.b32 factor, 0x7b807b80;
    mov.b32 zero, 0x80008000;
    fma.rn.bf16x2 $0, low, factor, zero;
    fma.rn.bf16x2 $1, high, factor, zero;
}""")


@triton.jit
def decode(bits: tl.tensor, NATIVE: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:  # noqa: N803
    """The numbers that bytes stand for, exactly: uint8 -> DTYPE (bfloat16, float16 or float32).

    NATIVE: what the hardware has, see `DeviceFacts.native_float8`. Where it does not convert, sign, exponent and
    mantissa are put where float16 has its own, and the difference of the exponents' biases, 15 - 7, is multiplied back
    in; subnormal numbers come out right too.
    """
    if NATIVE == "nvidia" and tl.bfloat16 == DTYPE:
        numbers = tl.inline_asm_elementwise(TO_BFLOAT16, "=r,=r,r", [bits], dtype=tl.bfloat16, is_pure=True, pack=4)
    elif NATIVE != "":
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
