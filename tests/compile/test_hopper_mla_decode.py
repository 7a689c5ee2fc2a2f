"""`mla_decode` of the provider `hopper` for sm_90, as the built-in table cuts it: what it takes of the device."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from compile.early_access import early_accesses
from compile.launches import Recorder, compile_for, facts_of, resources_of
from taut.common_kernels import hopper
from taut.common_kernels import workspace as workspaces
from taut.common_kernels.merge import triton_launch as merge
from taut.common_kernels.mla_decode import hopper_launch
from taut.common_kernels.problem import Problem
from taut.common_kernels.schedule import triton_launch as schedule
from taut.common_kernels.step import PageTable, Step


class Limits(NamedTuple):
    """What an instance may take.

    Args:
        shared_memory: bytes, at most.
        stack: bytes of a thread's stack, at most: registers that were spilled, outside the tiles' loops but for few.
        products: matrix instructions in the code, exactly.
    """

    shared_memory: int
    stack: int
    products: int


# Releases of Triton differ a little: 3.6 and 3.9 both keep to these.
CASES: dict[str, tuple[dict[str, Any], Limits]] = {
    "128 heads, boxes": ({"heads": 128}, Limits(223_216, 240, 132)),
    "128 heads, gathered": ({"heads": 128, "page_size": 1}, Limits(223_216, 296, 132)),
    "128 heads, float8": ({"heads": 128, "cache_dtype": "float8_e4m3fn"}, Limits(223_216, 400, 132)),
    "16 heads, boxes": ({"heads": 16}, Limits(187_680, 16, 136)),
    "16 heads, gathered": ({"heads": 16, "page_size": 1}, Limits(187_680, 104, 136)),
    "32 heads, boxes": ({"heads": 32}, Limits(227_456, 248, 136)),
}


def launch(
    monkeypatch: pytest.MonkeyPatch,
    heads: int,
    *,
    page_size: int = 64,
    max_query: int = 1,
    cache_dtype: str = "bfloat16",
) -> dict[str, Any]:
    """The launch of a layer."""
    recorder = Recorder(hopper_launch.taut_mla_decode)
    monkeypatch.setattr(hopper_launch, "taut_mla_decode", recorder)
    monkeypatch.setattr(merge, "taut_merge", Recorder(merge.taut_merge))
    monkeypatch.setattr(schedule, "taut_schedule", Recorder(schedule.taut_schedule))
    for module in (hopper_launch, workspaces):
        monkeypatch.setattr(module, "device_facts", lambda _: facts_of("sm_90"))
    rows, tokens = 3, 3 * max_query
    problem = Problem("mla_decode", "sm_90", "bfloat16", cache_dtype, heads, 1, 576, 512, page_size, max_query)
    step = Step(
        torch.zeros(rows + 1, dtype=torch.int32),
        torch.zeros(rows, dtype=torch.int32),
        PageTable(torch.zeros(rows, 64, dtype=torch.int32), page_size),
        max_query=max_query,
        max_length=1000,
    )
    cache = torch.zeros(8, page_size, 576).to(getattr(torch, cache_dtype))
    q_nope, q_pe = (torch.zeros(tokens, heads, size, dtype=torch.bfloat16) for size in (512, 64))
    out, lse, one = torch.zeros_like(q_nope), torch.zeros(tokens, heads), torch.ones(1)
    workspace = hopper.workspace(problem, rows, tokens, "cpu")
    workspace.prepare(step)
    hopper.mla_decode(q_nope, q_pe, cache, step, out, scale=0.1, lse=lse, cache_scale=one, workspace=workspace)
    (made,) = recorder.launches
    return made


@pytest.mark.parametrize("case", CASES)
def test_what_an_instance_takes(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    kernel, (asked, limits) = hopper_launch.taut_mla_decode, CASES[case]
    made = launch(monkeypatch, **asked)
    compiled = compile_for(kernel, made, "sm_90")
    ptx, taken = compiled.asm["ptx"], resources_of(compiled)
    found = Limits(compiled.metadata.shared, taken.stack, ptx.count("wgmma.mma_async"))
    assert taken.registers == 168
    assert found.products == limits.products
    assert found.shared_memory <= limits.shared_memory
    assert found.stack <= limits.stack
    assert "ld.global.b16" not in ptx  # queries are read 16 bytes at a time
    assert "griddepcontrol.wait" in ptx
    assert early_accesses(ptx) == []
    assert f"setmaxnreg.inc.sync.aligned.u32 \t{made['REGISTERS']};" in ptx  # whoever computes has more than that
