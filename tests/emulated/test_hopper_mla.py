"""`mla_decode` of the provider `hopper`, emulated: ragged, poisoned batches under seeds that try to break its barriers.

SEEDS=20 tries every case under so many.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import cases
import gluon_emulator
import pytest
import torch
import triton.language as tl
from cases import MlaCase, assert_close, build_mla
from gluon_emulator.values import Tensor

from taut.common_kernels import hopper
from taut.common_kernels import workspace as workspaces
from taut.common_kernels.mla_decode import hopper_launch, triton_launch
from taut.common_kernels.workspace import DeviceFacts

FACTS = DeviceFacts("sm_90", 232_448, 3)  # a Hopper GPU with few multiprocessors, for splits


@pytest.fixture(autouse=True)
def _hopper_of_few_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (hopper_launch, triton_launch, workspaces):
        monkeypatch.setattr(module, "device_facts", lambda _: FACTS)


@pytest.fixture(scope="module", autouse=True)
def _assembly() -> None:
    """What the kernel has in assembly, in Python."""

    def to_bfloat16(bits: Tensor) -> Tensor:
        numbers = bits.data.to(torch.uint8).view(torch.float8_e4m3fn).to(torch.bfloat16)
        return Tensor(numbers, tl.bfloat16, bits.layout)

    gluon_emulator.replace("to_bfloat16", to_bfloat16)
    for name in ("anew", "worked_out"):
        gluon_emulator.replace(name, lambda number: number)


RAGGED: dict[str, Any] = {"lengths": (200, 3, 0, 64, 129), "queries": (1, 1, 1, 1, 1), "padded_rows": 1}
SEVERAL: dict[str, Any] = {"lengths": (200, 5, 65, 0), "queries": (3, 4, 1, 2), "padded_queries": 2, "indirect": True}
CASES: dict[str, MlaCase] = {
    "64 rows, boxes": MlaCase(q_heads=128, page_size=64, **RAGGED),
    "64 rows, boxes, several queries": MlaCase(q_heads=16, page_size=128, **SEVERAL),
    "64 rows, gathered": MlaCase(q_heads=64, page_size=16, strided_query=True, **RAGGED),
    "64 rows, gathered, seeing both ways": MlaCase(q_heads=40, page_size=1, causal=False, **SEVERAL),
    "64 rows, float8": MlaCase(q_heads=64, page_size=64, cache_dtype="float8_e4m3fn", scales="tensor", **RAGGED),
    "8 rows, boxes": MlaCase(q_heads=8, page_size=64, layout="padded", **RAGGED),
    "16 rows, boxes": MlaCase(q_heads=16, page_size=128, **RAGGED),
    "16 rows, gathered, several queries": MlaCase(q_heads=4, page_size=1, strided_query=True, **SEVERAL),
    "16 rows, float8": MlaCase(q_heads=12, page_size=16, cache_dtype="float8_e4m3fn", scales="tensor", **RAGGED),
    "32 rows, boxes, several queries": MlaCase(q_heads=8, page_size=64, **SEVERAL),
    "8 rows, boxes, stages filled often": MlaCase(q_heads=8, page_size=64, lengths=(1000, 3), queries=(1, 1)),
    "nobody has keys": MlaCase(q_heads=64, lengths=(0, 0), queries=(1, 2), page_size=64),
}


def run(case: str, seed: int) -> None:
    """One case under one seed, of its numbers and of what the emulator does in which order."""
    inputs = build_mla(replace(CASES[case], latent=512, rope=64, dtype="bfloat16", seed=seed))
    with gluon_emulator.seeded(seed):
        assert_close(inputs.run(hopper), inputs.expected(), "bfloat16")


@pytest.mark.parametrize("case", CASES)
def test_contract(case: str) -> None:
    for seed in range(int(os.environ.get("SEEDS", "1"))):
        run(case, seed)


@pytest.mark.parametrize("case", ["64 rows, boxes", "16 rows, boxes"])
def test_values_past_the_end_must_be_cleared(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """The poison would be seen: the cases reach what they are made for."""
    gluon_emulator.replace("clear_past", lambda *_: None)
    try:
        with pytest.raises(AssertionError):
            run(case, 0)
    finally:
        gluon_emulator.jit.Settings.replaced.pop("clear_past")


def at_odd_addresses(rows: torch.Tensor) -> torch.Tensor:
    """The same rows, none of which begins at a multiple of 16 bytes."""
    wider = torch.full((*rows.shape[:2], rows.shape[2] + 1), torch.nan).to(rows.dtype)
    wider[..., 1:] = rows
    return wider[..., 1:]


@pytest.mark.parametrize("case", ["64 rows, boxes", "32 rows, boxes, several queries"])
@pytest.mark.parametrize("odd", ["q_nope", "q_pe", "out"])
def test_rows_at_odd_addresses(monkeypatch: pytest.MonkeyPatch, case: str, odd: str) -> None:
    """They are read and written number by number; were it said that they lie in sixteens, that would be noticed."""
    inputs = build_mla(replace(CASES[case], latent=512, rope=64, dtype="bfloat16"))
    if odd == "out":
        out, lse = inputs.outputs()
        monkeypatch.setattr(cases.Inputs, "outputs", lambda _: (at_odd_addresses(out), lse))
    else:
        place = ("q_nope", "q_pe").index(odd)
        arguments = list(inputs.arguments)
        arguments[place] = at_odd_addresses(arguments[place])
        inputs = replace(inputs, arguments=tuple(arguments))
    assert_close(inputs.run(hopper), inputs.expected(), "bfloat16")
    monkeypatch.setattr(hopper_launch, "lies_in_sixteens", lambda _: True)
    with pytest.raises(AssertionError, match="no multiples of 16 bytes"):
        inputs.run(hopper)
