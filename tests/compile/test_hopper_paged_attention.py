"""The Gluon kernels of `paged_attention` for sm_90, as the built-in table cuts them: what they take of the device."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from compile.early_access import early_accesses
from compile.launches import compile_for, resources_of, said_by_assembler, threads_of
from compile.test_paged_attention import FEATURES, launches
from taut.common_kernels import hopper
from taut.common_kernels.gluon_features import registers_can_move
from taut.common_kernels.paged_attention import hopper_launch
from taut.common_kernels.step import Mask

HOPPER = {"decode": (hopper_launch, "taut_decode"), "prefill": (hopper_launch, "taut_prefill")}


SHARED_MEMORY, RESERVED = 233_472, 1024  # bytes of a multiprocessor, and of them for each program
REGISTERS = 64 * 1024  # of a multiprocessor


class Taken(NamedTuple):
    """What an instance takes.

    Args:
        registers: of a thread when the program starts; warps that load then give some to those that attend.
        stack: bytes of a thread: a frame of 8 bytes of which nothing is used, and what is spilled.
        programs: that fit a multiprocessor.
    """

    registers: int
    stack: int
    programs: int


# Of heads of 64 three warpgroups attend, of 512 threads in all, where the assembler can do with so few registers.
OF_64 = {"head_size": 64, "value_size": 64}
SLIDING = {"mask": Mask(left=127), "sinks": True}
THREE = registers_can_move()
CASES: dict[str, tuple[str, dict[str, Any], Taken]] = {
    "decode, 128": ("decode", {}, Taken(128, 0, 2)),
    "decode, 256, all features": ("decode", {"head_size": 256, "value_size": 256, **FEATURES}, Taken(248, 0, 1)),
    "decode, many heads, gathered": ("decode", {"group": 64, "page_size": 1}, Taken(248, 0, 1)),
    "prefill, 64": ("prefill", OF_64, Taken(128 if THREE else 168, 0, 1)),
    "prefill, 64, sliding": ("prefill", OF_64 | SLIDING, Taken(128 if THREE else 168, 0, 1)),
    "prefill, 64, gathered": ("prefill", OF_64 | {"page_size": 1}, Taken(168, 0, 1)),
    "prefill, 128, all features": ("prefill", FEATURES, Taken(168, 16, 1)),
    "prefill, 192 and 128": ("prefill", {"head_size": 192}, Taken(168, 16, 1)),
    "prefill, 128, gathered": ("prefill", {"page_size": 1}, Taken(168, 8, 1)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_an_instance_takes(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    which, asked, expected = CASES[case]
    made = launches(monkeypatch, "sm_90", provider=hopper, kernels=HOPPER, **({"page_size": 64} | asked))
    compiled = compile_for(*made[which], "sm_90")
    registers, stack = resources_of(compiled)
    by_memory = SHARED_MEMORY // (compiled.metadata.shared + RESERVED)
    by_registers = REGISTERS // (threads_of(compiled.asm["ptx"]) * registers)
    assert Taken(registers, stack, min(by_memory, by_registers)) == expected
    ptx = compiled.asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert ("griddepcontrol.wait" in ptx) == (which == "decode")
    assert which == "prefill" or early_accesses(ptx) == []
    assert ("cp.async.bulk.tensor" in ptx) == ("gathered" not in case)
    assert "serialized" not in said_by_assembler(ptx)  # products that wait for one another, which costs half the speed
    # One thread arrives at a barrier for its warpgroup: all must have waited for the products before. The compiler sees
    # to that; the emulator, which knows no threads, takes it for granted. The warp that loads waits for itself alone.
    for before in ptx.split("mbarrier.arrive.shared")[:-1]:
        waited, loaded = before.rfind("wgmma.wait_group"), before.rfind("cp.async.bulk.tensor")
        alone = loaded > waited and before.rfind("bar.warp.sync") > loaded
        assert alone or before.rfind("bar.sync") >= waited
