"""The kernel of the page table of windowed layers, compiled for every target."""

from __future__ import annotations

import pytest
import torch

from compile.launches import TARGETS, Recorder, compile_for
from taut.common_kernels.step import PageTable, Step
from taut.common_kernels.windowed_pages import triton_launch


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("named", [True, False])
def test_it_fits(monkeypatch: pytest.MonkeyPatch, target: str, named: bool) -> None:
    recorder = Recorder(triton_launch.taut_windowed_pages)
    monkeypatch.setattr(triton_launch, "taut_windowed_pages", recorder)
    rows = torch.zeros(3, dtype=torch.int64) if named else None
    table = torch.zeros(4, 64, dtype=torch.int32)
    step = Step(torch.zeros(4, dtype=torch.int32), torch.zeros(3, dtype=torch.int32), PageTable(table, 1, rows), 1, 64)
    triton_launch.fill(step, torch.zeros(9, dtype=torch.int64), 7, table[:3], step.lengths)
    compile_for(recorder.kernel, recorder.launches[0], target)
