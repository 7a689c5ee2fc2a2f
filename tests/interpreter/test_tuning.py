"""What `taut tune` measures: every tile that it tries really reaches the kernel, and gives the reference's numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from taut.benchmarks.models import MODELS
from taut.benchmarks.tasks import Task
from taut.benchmarks.tuning import measure
from taut.benchmarks.tuning.problems import questions
from taut.benchmarks.tuning.search import SPACES
from taut.common_kernels.tiles import built_in_tables, choose_table
from taut.common_kernels.workspace import INTERPRETED

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

BASE = choose_table(built_in_tables(), INTERPRETED.target, INTERPRETED.shared_memory)
LLAMA = MODELS["llama"] | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
ASKED = questions(
    {"llama": LLAMA, "deepseek": MODELS["deepseek"] | {"num_attention_heads": 2}},
    target="cpu", decode="rows=2 context=40", prefill="rows=1 context=40 queries=20",
)  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Task, "dtype", torch.float16)  # the interpreter computes in numpy, which has no bfloat16
    monkeypatch.setattr(measure, "CHECKED_LENGTHS", (0, 1, 17, 40))
    monkeypatch.setattr(measure, "CHECKED_TOKENS", 50)


@pytest.mark.parametrize("one", ASKED, ids=lambda one: one.name)
def test_tiles_reach_the_kernel_and_are_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, one: Any) -> None:
    space = SPACES[one.table_operation]
    tile = space.whole(BASE.tile(one.table_operation, one.facts))
    tiles = [tile, {**tile, "keys": 64, **({"cut": 64} if "cut" in tile else {})}]
    seen: list[tuple[str, int]] = []

    run = InterpretedFunction.run

    def spy(kernel: Any, *arguments: Any, **named: Any) -> Any:
        seen.append((kernel.fn.__name__, named.get("BLOCK_N", named.get("KEYS"))))
        return run(kernel, *arguments, **named)

    monkeypatch.setattr(InterpretedFunction, "run", spy)

    def time(calls: Sequence[Any]) -> float:
        calls[0]()
        return 1.0

    kernel = {"mla_decode": "taut_mla_decode", "paged_decode": "taut_decode", "paged_prefill": "taut_prefill"}
    timer = measure.Measurer(one, BASE, INTERPRETED, tmp_path, None, "cpu", time)
    for wanted, outcome in zip(tiles, timer(tiles, None), strict=True):
        assert outcome.status == "timed", outcome.why
        launched = {keys for name, keys in seen if name == kernel[one.table_operation]}
        assert launched == {wanted["keys"]}
        seen.clear()
