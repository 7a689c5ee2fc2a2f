"""What `taut tune` compiles ahead, for a GPU that is not there: what fits is compiled, what does not is told."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from triton.runtime import driver

from compile.launches import TARGETS, facts_of
from taut.benchmarks.models import MODELS
from taut.benchmarks.tuning.measure import compile_tile
from taut.benchmarks.tuning.problems import questions
from taut.benchmarks.tuning.space import space_of
from taut.benchmarks.tuning.writing import as_json, only
from taut.common_kernels.tiles import built_in_tables, choose_table

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TARGET = "sm_90"
BASE = choose_table(built_in_tables(), TARGET, TARGETS[TARGET][1])
GRIDS = {"decode": "rows=2 context=1k", "prefill": "rows=1 context=1k queries=1k"}
ASKED = questions({name: MODELS[name] for name in ("llama", "deepseek")}, target=TARGET, **GRIDS)


class Driver:
    """Stands for a GPU's driver: it has a target, and nothing runs on it."""

    def get_current_target(self) -> Any:
        return TARGETS[TARGET][0]

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_stream(self, _device: int | None = None) -> int:
        return 0


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    before = getattr(driver, "_active", None)
    driver.set_active(Driver())
    yield
    driver._active = before


@pytest.mark.parametrize("one", ASKED[::2], ids=lambda one: one.name)
def test_todays_tile_fits_and_a_huge_one_does_not(tmp_path: Path, one: Any) -> None:
    tile = space_of(one.table_operation).whole(BASE.tile(one.table_operation, one.facts))
    facts = facts_of(TARGET)
    (tmp_path / "it.json").write_text(as_json(only(BASE, one.table_operation, tile)))
    job = (one.operation, one.shapes, str(tmp_path / "it.json"))
    assert compile_tile((*job, facts)).status == "timed"
    # The same kernels, found in the cache, on a device that has less.
    misfit = compile_tile((*job, replace(facts, shared_memory=1024)))
    assert (misfit.status, "1024 are there" in misfit.why) == ("does not fit", True)


def test_a_tile_that_cannot_be_compiled(tmp_path: Path) -> None:
    one = ASKED[0]
    tile = space_of(one.table_operation).whole(BASE.tile(one.table_operation, one.facts)) | {"keys": 48, "cut": 48}
    (tmp_path / "it.json").write_text(as_json(only(BASE, one.table_operation, tile)))
    outcome = compile_tile((one.operation, one.shapes, str(tmp_path / "it.json"), facts_of(TARGET)))
    assert outcome.status == "failed"
    assert outcome.why
