"""What kernels in Gluon need of the installed Triton, found by looking: Gluon moves from release to release.

Gluon is Triton's lower language (`triton.experimental.gluon`): layouts, shared memory, barriers and warps are the
kernel's own. Some names have changed; `first_of` gives the one that is there. Where something is missing altogether,
`missing` says what, and the provider that needs it is passed over.

Importing this module imports nothing of triton.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

GLUON = "triton.experimental.gluon"
LANGUAGE = f"{GLUON}.language"
HOPPER = f"{LANGUAGE}.nvidia.hopper"

# Names that changed; the newest first, since a release may keep the old one only to say that it is gone. Those of loads
# by TMA are also those of asynchronous copies by threads.
TMA_LOADS = ("async_load", "async_copy_global_to_shared")
THREAD_BARRIERS = ("barrier", "thread_barrier")

# For each module what kernels use of it, which a test reads from their sources; of a tuple, one name.
NEEDED: dict[str, tuple[str | tuple[str, ...], ...]] = {
    "triton.language.core": ("_aggregate",),
    GLUON: ("constexpr_function", "jit"),
    LANGUAGE: (
        "BlockedLayout",
        "DotOperandLayout",
        "NVMMADistributedLayout",
        "NVMMASharedLayout",
        "SliceLayout",
        "SwizzledSharedLayout",
        "allocate_shared_memory",
        "arange",
        "atomic_add",
        "bfloat16",
        "cast",
        "cdiv",
        "constexpr",
        "convert_layout",
        "exp2",
        "expand_dims",
        "float32",
        "full",
        "inline_asm_elementwise",
        "int32",
        "int64",
        "load",
        "log2",
        "max",
        "max_contiguous",
        "maximum",
        "minimum",
        "multiple_of",
        "num_programs",
        "permute",
        "program_id",
        "reshape",
        "shared_memory_descriptor",
        "static_assert",
        "static_range",
        "store",
        "sum",
        "tensor",
        "warp_specialize",
        "where",
        "zeros",
        "zeros_like",
        THREAD_BARRIERS,
    ),
    HOPPER: ("fence_async_shared", "warpgroup_mma", "warpgroup_mma_wait"),
    f"{HOPPER}.mbarrier": ("MBarrierLayout", "arrive", "expect", "init", "wait"),
    f"{HOPPER}.tma": (TMA_LOADS,),
    f"{LANGUAGE}.nvidia.ampere.async_copy": (TMA_LOADS, "mbarrier_arrive"),
    f"{GLUON}.nvidia.hopper": ("TensorDescriptor",),
}


def first_of(module: Any, names: tuple[str, ...]) -> Any:
    """The attribute of a module that the first of these names has which is there.

    Raises:
        AttributeError: none is.
    """
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"{module.__name__} has none of {', '.join(names)}")


def missing() -> list[str]:
    """What this environment's Triton lacks of Gluon, as sentences; empty where nothing is missing."""
    reasons = []
    for path, needed in NEEDED.items():
        try:
            module = importlib.import_module(path)
        except Exception as error:  # an experimental module may fail in ways of its own
            reasons.append(f"this environment's triton has no {path} ({type(error).__name__}: {error})")
            continue
        for one in needed:
            names = (one,) if isinstance(one, str) else one
            if not any(hasattr(module, name) for name in names):
                reasons.append(f"this environment's triton has no {path}.{' or '.join(names)}")
    return reasons


@functools.lru_cache
def registers_can_move() -> bool:
    """Whether a partition of a kernel may be compiled for more registers than its program begins with.

    The assembler of CUDA 13, which Triton takes for Hopper from 3.9 on, keeps to what the program begins with: 128 with
    512 threads, of which products that overlap have too few, and then wait for one another. There is no asking it but
    by its release; where that cannot be told, it is taken for an older one.
    """
    try:
        release = importlib.import_module("triton.backends.nvidia.compiler").get_ptxas(90).version
        return int(release.split(".")[0]) < 13
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError):
        return True
