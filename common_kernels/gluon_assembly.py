"""What kernels in Gluon say to the assembler, beyond what the language has words for."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def worked_out(total: gl.tensor) -> gl.tensor:
    """`total`, a sum of weights, as it is; what is waited for after this is not waited for before it is known.

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
        [total],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )
