"""The steps that adapters run idle: which there are, and what they hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from taut.common_kernels import warm_up
from taut.common_kernels.warm_up import IdleStep, mixed_steps, prompt_steps, uniform_steps

if TYPE_CHECKING:
    from collections.abc import Callable

CPU = torch.device("cpu")


def test_every_power_of_two_of_rows_and_the_most_there_can_be() -> None:
    assert mixed_steps(6, [1, 16, 1]) == [IdleStep(rows, most) for rows in (1, 2, 4, 6) for most in (1, 16)]
    assert uniform_steps(3, [1, 4]) == [IdleStep(rows, count, count) for rows in (1, 2, 3) for count in (1, 4)]


def test_prompts_are_promised_on_both_sides_of_where_kernels_change() -> None:
    promised = [1, 2, 4, 6, 8, 9]
    assert prompt_steps(5, 9, [6]) == [*(IdleStep(1, most) for most in promised), IdleStep(5, 1)]


@pytest.mark.parametrize("queries", [1, 3])
def test_a_step_has_queries_but_no_keys(queries: int) -> None:
    idle = IdleStep(4, 16, queries)
    step = idle.step(32, CPU)
    assert step.query_starts.tolist() == [row * queries for row in range(5)]
    assert step.lengths.tolist() == [0] * 4
    assert step.pages.table.tolist() == [[0]] * 4
    assert (step.pages.page_size, step.max_query) == (32, 16)
    assert {tensor.dtype for tensor in (step.query_starts, step.lengths, step.pages.table)} == {torch.int32}
    assert idle.tokens == 4 * queries
    assert idle.no_slots(CPU).tolist() == [-1] * idle.tokens


@pytest.mark.parametrize(("device", "calls"), [("cpu", ["run"]), ("cuda", ["compile", "run"])])
def test_on_a_gpu_kernels_are_compiled_before_any_is_launched(
    device: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def compile_ahead(_run: Callable[[], None]) -> None:
        said.append("compile")

    monkeypatch.setattr(warm_up, "compile_ahead", compile_ahead)
    warm_up.warm_up(lambda: said.append("run"), torch.device(device))
    assert said == calls
