"""What kernels in Gluon say to the assembler, beyond what the language has words for."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def worked_out(row_sum: gl.tensor) -> gl.tensor:
    """`row_sum`, sums of weights, as they are; what is waited for after this is not waited for before it is known.

    The assembler moves a wait for products ahead of arithmetic that has nothing to do with it, here that of the
    softmax, which is to be done under them. It does not move it past a store to shared memory. This one is never done,
    since no sum of weights is negative, which the assembler does not know.
    """
    return gl.inline_asm_elementwise(
        """{
            .reg .pred never;
            .reg .b32 zero;
            setp.lt.f32 never, $1, 0f00000000;
            mov.b32 zero, 0;
            @never st.shared.f32 [zero], $1;
            mov.b32 $0, $1;
        }""",
        "=f,f",
        [row_sum],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


LOOKED_AT = 32  # elements of a thread that are multiplied, or left, together
_FACTOR = 2 * LOOKED_AT  # the operand that is the first of them; results and elements come before
MULTIPLY_OR_SKIP = gl.constexpr(
    "\n".join(
        (
            "{ .reg .pred one;",
            f"setp.eq.f32 one, ${_FACTOR}, 0f3F800000;",
            f"setp.eq.and.f32 one, ${_FACTOR + 2}, 0f3F800000, one;",
            "vote.sync.all.pred one, one, 0xffffffff;",
            "@one bra DONE;",
            *(f"mul.f32 ${i}, ${i}, ${_FACTOR + i};" for i in range(LOOKED_AT)),
            "DONE: }",
        )
    )
)
IN_PLACE = gl.constexpr(",".join(["=f"] * LOOKED_AT + [str(i) for i in range(LOOKED_AT)] + ["f"] * LOOKED_AT))
PACK = gl.constexpr(LOOKED_AT)


@gluon.jit
def rescaled(acc: gl.tensor, alpha: gl.tensor) -> gl.tensor:
    """`acc * alpha`, an output [64, V] as matrix instructions lay it out and a factor of each row [64, 1].

    Once a row has met its maximum its factor is one, and so are, after a while, those of all rows of a warp: then the
    warp goes past the multiplications. (FlashAttention-4 leaves out factors that are near one; here what comes out is
    the same to the last bit.) Of four neighbouring elements of a thread two are of one row and two of another.
    """
    return gl.inline_asm_elementwise(
        MULTIPLY_OR_SKIP, IN_PLACE, [acc, alpha], dtype=gl.float32, is_pure=False, pack=PACK
    )
