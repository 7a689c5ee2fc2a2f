"""Kernels compiled side by side, before anything is launched: with the driver of a GPU that is not there."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import driver

from compile.launches import TARGETS
from taut.common_kernels.compiling import compile_ahead

if TYPE_CHECKING:
    from pathlib import Path


@triton.jit
def doubled(numbers: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr) -> None:  # noqa: N803
    places = tl.arange(0, BLOCK)
    tl.store(numbers + places, 2 * tl.load(numbers + places, mask=places < count), mask=places < count)


@triton.jit
def wrong(numbers: tl.tensor) -> None:
    tl.store(numbers, tl.no_such_thing(numbers))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """By which threads kernels were launched, on a GPU that compiles for sm_90 and runs nothing."""
    by: list[int] = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    absent = SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda _: 0, get_current_target=lambda: TARGETS["sm_90"][0]
    )
    monkeypatch.setattr(driver, "_active", absent)
    compiled = triton.compiler.CompiledKernel
    monkeypatch.setattr(compiled, "launch_metadata", lambda *_: None)
    monkeypatch.setattr(compiled, "run", lambda *_: by.append(threading.get_ident()))
    monkeypatch.setattr(compiled, "function", 0, raising=False)
    for kernel in (doubled, wrong):
        kernel.device_caches.clear()
    return by


def instances(kernel: Any) -> int:
    return len(kernel.device_caches[0][0])


def test_nothing_is_launched_and_nothing_compiles_afterwards(launched: list[int]) -> None:
    numbers = torch.zeros(64)

    def steps() -> None:
        for block in (16, 32, 32):
            doubled[(1,)](numbers, 7, BLOCK=block)

    compile_ahead(steps)
    assert launched == []
    assert instances(doubled) == 2
    made = {id(kernel) for kernel in doubled.device_caches[0][0].values()}
    steps()
    assert len(launched) == 3
    assert {id(kernel) for kernel in doubled.device_caches[0][0].values()} == made


def test_what_another_thread_launches_meanwhile_is_launched(launched: list[int]) -> None:
    numbers = torch.zeros(64)
    other = threading.Thread(target=lambda: doubled[(1,)](numbers, 7, BLOCK=64))

    def steps() -> None:
        other.start()
        other.join()
        doubled[(1,)](numbers, 7, BLOCK=16)

    compile_ahead(steps)
    assert launched == [other.ident]
    assert instances(doubled) == 2


def test_a_kernel_that_cannot_be_compiled_fails_where_it_is_launched(launched: list[int]) -> None:
    numbers = torch.zeros(64)
    compile_ahead(lambda: wrong[(1,)](numbers))
    with pytest.raises(triton.CompilationError, match="no_such_thing"):
        wrong[(1,)](numbers)
    assert launched == []
