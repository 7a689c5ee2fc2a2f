"""The modules that stand in for `triton.experimental.gluon` and those below it."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import triton
import triton.experimental
import triton.experimental.gluon.language as real
import triton.experimental.gluon.nvidia.hopper as real_host
from triton.experimental.gluon.language.nvidia.hopper import mbarrier as real_mbarrier

from gluon_emulator import language, shared
from gluon_emulator.aggregates import aggregate
from gluon_emulator.jit import jit
from gluon_emulator.values import Constexpr, Tensor

GLUON = "triton.experimental.gluon"
# Names of the language that are the real thing: layouts and dtypes.
KEPT = [name for name, value in vars(real).items() if name.endswith("Layout") or isinstance(value, real.dtype)]
KEPT += ["pointer_type", "block_type", "dtype", "tuple"]
LANGUAGE: dict[str, Any] = {
    "constexpr": Constexpr,
    "tensor": Tensor,
    "shared_memory_descriptor": shared.SharedMemory,
    "max": language.maximum_of,
    "min": language.minimum_of,
    "sum": language.sum_of,
    "abs": language.absolute,
    "cast": language.cast_to,
    "to_tensor": language.to_tensor,
    "barrier": language.thread_barrier,
    "allocate_shared_memory": shared.allocate,
    "max_contiguous": language.max_contiguous,
    "max_constancy": language.as_is,
    "num_ctas": lambda: 1,
}
SAME_NAMES = """
    add arange assume atomic_add atomic_max atomic_min atomic_xchg broadcast cdiv ceil clamp convert_layout cos
    cumsum device_assert div_rn erf exp exp2 expand_dims fdiv floor fma full full_like gather
    inline_asm_elementwise join load log log2 map_elementwise maximum minimum mul multiple_of num_programs
    num_warps permute program_id reduce reduce_or reshape rsqrt set_auto_layout sin split sqrt sqrt_rn
    static_assert static_print static_range store sub thread_barrier umulhi warp_specialize where xor_sum
    zeros zeros_like
"""
LANGUAGE |= {name: getattr(language, name) for name in SAME_NAMES.split()}
BARRIERS = {
    "MBarrierLayout": real_mbarrier.MBarrierLayout,
    "init": shared.barrier_init,
    "expect": shared.barrier_expect,
    "arrive": shared.barrier_arrive,
    "wait": shared.barrier_wait,
    "invalidate": shared.barrier_invalidate,
}
# Of both ages of the language, since a kernel takes whichever name there is.
COPIES = {
    "async_load": shared.async_copy,
    "async_copy_global_to_shared": shared.async_copy,
    "mbarrier_arrive": shared.copies_arrive,
    "commit_group": shared.commit_group,
    "wait_group": shared.wait_group,
}
TMA = {
    "async_load": shared.tma_load,
    "async_copy_global_to_shared": shared.tma_load,
    "async_store": shared.tma_store,
    "async_copy_shared_to_global": shared.tma_store,
    "store_wait": shared.tma_store_wait,
    "make_tensor_descriptor": shared.make_tensor_descriptor,
    "tensor_descriptor": shared.Descriptor,
}


class _Module(ModuleType):
    """A module that says what the emulator lacks."""

    def __init__(self, name: str, attributes: dict[str, Any]) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"gluon_emulator has no `{name}` of {self.__name__}")


def install() -> None:
    """Put the emulator in place of Gluon, for every module that is imported from now on."""
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("gluon_emulator needs TRITON_INTERPRET=1, set before triton is imported")
    async_copy = _Module(f"{GLUON}.language.nvidia.ampere.async_copy", COPIES)
    mbarrier = _Module(f"{GLUON}.language.nvidia.hopper.mbarrier", BARRIERS)
    tma = _Module(f"{GLUON}.language.nvidia.hopper.tma", TMA)
    products = {
        "fence_async_shared": shared.fence_async_shared,
        "warpgroup_mma": shared.warpgroup_mma,
        "warpgroup_mma_init": language.as_is,
        "warpgroup_mma_wait": shared.warpgroup_mma_wait,
    }
    ampere = _Module(f"{GLUON}.language.nvidia.ampere", {"async_copy": async_copy, "mbarrier": mbarrier})
    inside = {"async_copy": async_copy, "mbarrier": mbarrier, "tma": tma}
    hopper = _Module(f"{GLUON}.language.nvidia.hopper", products | inside)
    nvidia = _Module(f"{GLUON}.language.nvidia", {"ampere": ampere, "hopper": hopper})
    kept = {name: getattr(real, name) for name in KEPT}
    gl = _Module(f"{GLUON}.language", kept | LANGUAGE | {"nvidia": nvidia})
    host = _Module(f"{GLUON}.nvidia", {"hopper": real_host})
    attributes = {"aggregate": aggregate, "jit": jit, "constexpr_function": triton.constexpr_function}
    attributes |= {"language": gl, "nvidia": host}
    gluon = _Module(GLUON, attributes)
    for module in (gluon, gl, nvidia, ampere, hopper, async_copy, mbarrier, tma, host):
        sys.modules[module.__name__] = module
    sys.modules[f"{GLUON}.nvidia.hopper"] = real_host
    triton.experimental.gluon = gluon
