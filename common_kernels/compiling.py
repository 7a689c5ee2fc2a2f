"""Compiling kernels of Triton side by side, before they are launched for the first time.

A kernel takes up to seconds to compile, nearly all of them outside Python's lock: in LLVM and in the assembler.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from inspect import signature
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:
    from collections.abc import Callable

AT_ONCE = 8


def powers(most: int) -> list[int]:
    """1, 2, 4, ... and `most`: numbers of rows or of queries that have every variant of the kernels up to `most`."""
    return sorted({min(1 << power, most) for power in range(most.bit_length() + 1)})


def compile_ahead(steps: Callable[[], None]) -> None:
    """Run `steps`, whose kernels are compiled side by side but not launched. Nothing runs where Triton cannot do that.

    A kernel that cannot be compiled is passed over here: it will fail, and say why, where it is launched.
    """
    try:
        from triton.runtime._async_compile import AsyncCompileMode
        from triton.runtime.jit import JITFunction
    except ImportError:
        return
    launch, ours = JITFunction.run, threading.get_ident()
    if "warmup" not in signature(launch).parameters:
        return

    def compiled(self: Any, *arguments: Any, warmup: bool, **named: Any) -> Any:
        """What other threads launch meanwhile is launched."""
        return launch(self, *arguments, warmup=warmup or threading.get_ident() == ours, **named)

    with (
        ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() or 1)) as pool,
        AsyncCompileMode(pool, ignore_errors=True),
        patch.object(JITFunction, "run", compiled),
    ):
        steps()
