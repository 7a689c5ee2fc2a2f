"""The kernels of `mla_decode`, its merge, the schedule and the stores, as the built-in tables cut them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compile.launches import TARGETS, Recorder, compile_for, facts_of
from taut.common_kernels import portable
from taut.common_kernels import workspace as workspaces
from taut.common_kernels.merge import triton_launch as merge
from taut.common_kernels.mla_decode import triton_launch as mla
from taut.common_kernels.problem import Problem
from taut.common_kernels.schedule import triton_launch as schedule
from taut.common_kernels.step import PageTable, Step
from taut.common_kernels.store_kv import triton_launch as store

# Of each entry of the tables the problem that needs most; smaller ranks have the same tiles and need less.
CASES: dict[str, dict[str, Any]] = {
    "few heads": {"heads": 16},
    "some heads": {"heads": 32},
    "many heads, several queries": {"heads": 128, "max_query": 8},
    "float8, few heads": {"heads": 16, "cache_dtype": "float8_e4m3fn"},
    "float8, many heads": {"heads": 128, "cache_dtype": "float8_e4m3fn"},
}
MODULES = {
    "taut_mla_decode": mla,
    "taut_merge": merge,
    "taut_merge_states": merge,
    "taut_schedule": schedule,
    "taut_store_kv": store,
}


def launches(
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    heads: int,
    *,
    max_query: int = 1,
    cache_dtype: str = "bfloat16",
    page_size: int = 64,
) -> dict[str, tuple[Any, dict[str, Any]]]:
    """The launches of a step and a layer: kernel and arguments, by the kernel's name."""
    recorders = {name: Recorder(getattr(module, name)) for name, module in MODULES.items()}
    for name, module in MODULES.items():
        monkeypatch.setattr(module, name, recorders[name])
    for module in (mla, store, workspaces):
        monkeypatch.setattr(module, "device_facts", lambda _: facts_of(target))
    rows, tokens = 3, 3 * max_query
    problem = Problem("mla_decode", target, "bfloat16", cache_dtype, heads, 1, 576, 512, page_size, max_query)
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
    workspace = portable.workspace(problem, rows, tokens, "cpu")
    workspace.prepare(step)
    portable.mla_decode(q_nope, q_pe, cache, step, out, scale=0.1, lse=lse, cache_scale=one, workspace=workspace)
    portable.store_mla_kv(q_nope[:, 0], q_pe[:, 0], cache, torch.zeros(tokens, dtype=torch.int64), cache_scale=one)
    portable.merge(torch.stack([out, out]), torch.stack([lse, lse]), out, lse)
    return {name: (recorder.kernel, recorder.launches[0]) for name, recorder in recorders.items()}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_attention_fits(monkeypatch: pytest.MonkeyPatch, target: str, case: str) -> None:
    compile_for(*launches(monkeypatch, target, **CASES[case])["taut_mla_decode"], target)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_pages_of_one_token(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    compile_for(*launches(monkeypatch, target, 128, page_size=1)["taut_mla_decode"], target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", [name for name in MODULES if name != "taut_mla_decode"])
def test_the_others_fit(monkeypatch: pytest.MonkeyPatch, target: str, kernel: str) -> None:
    made = launches(monkeypatch, target, 128, cache_dtype="float8_e4m3fn")
    compile_for(*made[kernel], target)


@pytest.mark.parametrize("kernel", ["taut_mla_decode", "taut_merge", "taut_schedule"])
@pytest.mark.parametrize(("target", "dependent"), [("sm_80", False), ("sm_90", True)])
def test_what_is_launched_early_waits(
    monkeypatch: pytest.MonkeyPatch, target: str, dependent: bool, kernel: str
) -> None:
    made = launches(monkeypatch, target, 128)[kernel]
    assert ("griddepcontrol.wait" in compile_for(*made, target).asm["ptx"]) == dependent
    assert made[1].get("launch_pdl", False) == dependent


def test_the_warps_of_hopper_share_out_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 rows occupy one group of four warps: the other one must not compute the same scores again."""
    kernel, launch = launches(monkeypatch, "sm_90", 128)["taut_mla_decode"]

    def products(spread: bool) -> int:
        ptx = compile_for(kernel, launch | {"SPREAD": spread}, "sm_90").asm["ptx"]
        return sum("wgmma.mma_async" in line for line in ptx.splitlines())

    assert launch["SPREAD"]
    assert products(spread=True) < 0.7 * products(spread=False)
