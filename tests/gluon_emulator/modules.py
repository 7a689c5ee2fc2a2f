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
KEPT += ["tuple"]
LANGUAGE: dict[str, Any] = {
    "constexpr": Constexpr,
    "tensor": Tensor,
    "shared_memory_descriptor": shared.SharedMemory,
    "max": language.maximum_of,
    "sum": language.sum_of,
    "cast": language.cast_to,
    "barrier": language.thread_barrier,
    "allocate_shared_memory": shared.allocate,
}
SAME_NAMES = """
    arange atomic_add cdiv convert_layout exp2 expand_dims full inline_asm_elementwise load log2 max_contiguous maximum
    minimum multiple_of num_programs permute program_id reshape static_assert static_range store thread_barrier
    warp_specialize where zeros zeros_like
"""
LANGUAGE |= {name: getattr(language, name) for name in SAME_NAMES.split()}
BARRIERS = {
    "MBarrierLayout": real_mbarrier.MBarrierLayout,
    "init": shared.barrier_init,
    "expect": shared.barrier_expect,
    "arrive": shared.barrier_arrive,
    "wait": shared.barrier_wait,
}
# Of both ages of the language, since a kernel takes whichever name there is.
COPIES = {
    "async_load": shared.async_copy,
    "async_copy_global_to_shared": shared.async_copy,
    "mbarrier_arrive": shared.copies_arrive,
}
TMA = {
    "async_load": shared.tma_load,
    "async_copy_global_to_shared": shared.tma_load,
}
PRODUCTS = {
    "fence_async_shared": shared.fence_async_shared,
    "warpgroup_mma": shared.warpgroup_mma,
    "warpgroup_mma_wait": shared.warpgroup_mma_wait,
}
EMULATED: dict[str, dict[str, Any]] = {
    f"{GLUON}.language": LANGUAGE,
    f"{GLUON}.language.nvidia.ampere.async_copy": COPIES,
    f"{GLUON}.language.nvidia.hopper": PRODUCTS,
    f"{GLUON}.language.nvidia.hopper.mbarrier": BARRIERS,
    f"{GLUON}.language.nvidia.hopper.tma": TMA,
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
    ampere = _Module(f"{GLUON}.language.nvidia.ampere", {"async_copy": async_copy, "mbarrier": mbarrier})
    inside = {"async_copy": async_copy, "mbarrier": mbarrier, "tma": tma}
    hopper = _Module(f"{GLUON}.language.nvidia.hopper", PRODUCTS | inside)
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
