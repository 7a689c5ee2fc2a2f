"""The kernels of `paged_attention` and `ragged_attention`, as the built-in tables cut them, for every target."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compile.launches import TARGETS, Recorder, compile_for, facts_of
from taut.common_kernels import portable
from taut.common_kernels.paged_attention import triton_launch
from taut.common_kernels.problem import Problem
from taut.common_kernels.step import Mask, PageTable, Step

FEATURES = {"mask": Mask(left=4096, soft_cap=30.0), "sinks": True, "alibi": True, "lse": True}
# Of each kind the largest: what is not here has the same tile and needs less.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one row": {"rows": 1, "max_query": 1},
    "many heads": {"group": 64, "page_size": 1},
    "192 and 128": {"head_size": 192},
    "256, all features": {"head_size": 256, "value_size": 256, **FEATURES},
    "float32": {"head_size": 256, "value_size": 256, "dtype": "float32"},
    "float8": {"head_size": 256, "value_size": 256, "cache_dtype": "float8_e4m3fn"},
}


# Of each kernel the module that launches it, and its name there.
TRITON = {"decode": (triton_launch, "taut_decode"), "prefill": (triton_launch, "taut_prefill")}


def launches(
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    *,
    provider: Any = portable,
    kernels: dict[str, tuple[Any, str]] = TRITON,
    rows: int = 3,
    max_query: int = 0,
    group: int = 4,
    page_size: int = 16,
    head_size: int = 128,
    value_size: int = 128,
    dtype: str = "bfloat16",
    cache_dtype: str = "",
    mask: Mask | None = None,
    sinks: bool = False,
    alibi: bool = False,
    lse: bool = False,
) -> dict[str, tuple[Any, dict[str, Any]]]:
    """The launches of a batch, mixed unless `max_query` bounds it: kernel and arguments by the name in `kernels`."""
    recorders = {name: Recorder(getattr(*place)) for name, place in kernels.items()}
    for name, place in kernels.items():
        monkeypatch.setattr(*place, recorders[name])
    for module in (triton_launch, *(module for module, _ in kernels.values())):
        monkeypatch.setattr(module, "device_facts", lambda _: facts_of(target))
        monkeypatch.setattr(module, "merge_items", lambda *_: None)
    triton_launch.prefill_tile.cache_clear()

    kv_heads, tokens = 2, rows * max_query or 40
    q_heads = kv_heads * group
    problem = Problem(
        "paged_attention",
        target,
        dtype,
        cache_dtype or dtype,
        q_heads,
        kv_heads,
        head_size,
        value_size,
        page_size,
        max_query,
    )
    numbers, cached = getattr(torch, dtype), getattr(torch, cache_dtype or dtype)
    step = Step(
        torch.zeros(rows + 1, dtype=torch.int32),
        torch.zeros(rows, dtype=torch.int32),
        PageTable(torch.zeros(rows, 64, dtype=torch.int32), page_size),
        max_query=max_query or 100,
        max_length=1000,
    )
    scales = {}
    if cache_dtype:
        scales = {"key_scale": torch.ones(kv_heads), "value_scale": torch.ones(1)}
    provider.paged_attention(
        torch.zeros(tokens, q_heads, head_size, dtype=numbers),
        torch.zeros(8, page_size, kv_heads, head_size).to(cached),
        torch.zeros(8, page_size, kv_heads, value_size).to(cached),
        step,
        mask or Mask(),
        torch.zeros(tokens, q_heads, value_size, dtype=numbers),
        scale=0.1,
        lse=torch.zeros(tokens, q_heads) if lse else None,
        sinks=torch.zeros(q_heads) if sinks else None,
        alibi_slopes=torch.zeros(q_heads) if alibi else None,
        workspace=provider.workspace(problem, rows, tokens, "cpu"),
        **scales,
    )
    triton_launch.prefill_tile.cache_clear()
    for recorder in recorders.values():
        for launch in recorder.launches:
            if dtype == "float32" and target.startswith("sm_"):
                launch["PRECISION"] = "tf32x3"  # which only a CUDA tensor asks for
    return {name: (recorder.kernel, recorder.launches[0]) for name, recorder in recorders.items() if recorder.launches}


NO_PREFILL = ("many heads", "one row")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("case", "which"),
    [(case, which) for case in CASES for which in ("decode", "prefill") if which == "decode" or case not in NO_PREFILL],
)
def test_compiles(monkeypatch: pytest.MonkeyPatch, target: str, which: str, case: str) -> None:
    kernel, launch = launches(monkeypatch, target, **CASES[case])[which]
    compile_for(kernel, launch, target)


@pytest.mark.parametrize(("target", "dependent"), [("sm_80", False), ("sm_90", True)])
def test_what_is_launched_early_waits_first(monkeypatch: pytest.MonkeyPatch, target: str, dependent: bool) -> None:
    """Before it reads anything; and the merge is let in only after that, since it reads the schedule at once."""
    kernel, launch = launches(monkeypatch, target, **CASES["one row"])["decode"]
    ptx = compile_for(kernel, launch, target).asm["ptx"]
    wait, let_in, load = (ptx.find(word) for word in ("griddepcontrol.wait", "griddepcontrol.launch", "ld.global"))
    assert (0 < wait < min(let_in, load)) if dependent else wait == let_in == -1
    assert launch.get("launch_pdl", False) == dependent


def test_hopper_uses_its_matrix_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, launch = launches(monkeypatch, "sm_90")["prefill"]
    assert "wgmma.mma_async" in compile_for(kernel, launch, "sm_90").asm["ptx"]
