"""The tiles that `taut tune` tries for the provider `hopper`, emulated: they reach its kernels and are right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gluon_emulator
import pytest

from taut.benchmarks.models import MODELS
from taut.benchmarks.tuning import measure
from taut.benchmarks.tuning.problems import Tuned, questions
from taut.benchmarks.tuning.search import SPACES
from taut.common_kernels.tiles import Tile, built_in_tables, choose_table
from taut.common_kernels.workspace import INTERPRETED

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from taut.benchmarks.tasks import Call

# Instructions of which a CPU has none, by what they compute.
for name in ("worked_out", "anew"):
    gluon_emulator.replace(name, lambda number: number)
gluon_emulator.replace("rescaled", lambda acc, decay: acc * decay)

BASE = choose_table(built_in_tables(), "sm_90", 232_448)
ASKED = questions(
    {
        "llama": MODELS["llama"] | {"num_attention_heads": 4, "num_key_value_heads": 2},
        "deepseek": MODELS["deepseek"] | {"num_attention_heads": 64},
    },
    target="sm_90",
    provider_of=lambda _problem: "hopper",
    decode="rows=2 context=200",
    prefill="rows=1 context=200 queries=40",
)


def corners(one: Tuned) -> list[Tile]:
    """From today's tile number by number the least that the space has, and the greatest."""
    space = SPACES[one.table_operation]
    found = []
    for end in (0, -1):
        tile = space.whole(BASE.tile(one.table_operation, one.facts))
        for axis, values in space.axes.items():
            tile = [it for value in values if space.possible(it := {**tile, axis: value}, one.given)][end]
        found.append(tile)
    return found


@pytest.mark.parametrize("one", ASKED[:3], ids=lambda one: one.name)
def test_tiles_are_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, one: Tuned) -> None:
    monkeypatch.setattr(measure, "CHECKED_LENGTHS", (0, 1, 200, 65))
    monkeypatch.setattr(measure, "CHECKED_TOKENS", 150)
    kernel = {"mla_decode": "taut_mla_decode", "paged_decode": "taut_decode"}.get(one.operation, "taut_prefill")
    timed = []

    def time(calls: Sequence[Call]) -> float:
        timed.append(calls[0]())
        return 1.0

    timer = measure.Measurer(one, BASE, INTERPRETED, tmp_path, None, "cpu", time)
    for tile in corners(one):
        with gluon_emulator.seeded(0) as launched:
            (outcome,) = timer([tile], None)
        assert outcome.status == "timed", outcome.why
        assert launched.count(kernel) == 2
    assert len(timed) == 2
