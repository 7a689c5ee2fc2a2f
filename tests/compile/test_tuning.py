"""What `taut tune` compiles ahead, for a GPU that is not there: what fits is compiled, what does not is told."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from triton import knobs
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from compile.launches import TARGETS, facts_of
from taut.benchmarks.models import MODELS
from taut.benchmarks.tasks import TASKS
from taut.benchmarks.tuning import measure
from taut.benchmarks.tuning.measure import compile_tile
from taut.benchmarks.tuning.problems import questions
from taut.benchmarks.tuning.search import SPACES
from taut.common_kernels.paged_attention import hopper_launch
from taut.common_kernels.tiles import built_in_tables, choose_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from taut.benchmarks.tuning.problems import Tuned
    from taut.common_kernels.tiles import Tile

TARGET = "sm_90"
BASE = choose_table(built_in_tables(), TARGET, TARGETS[TARGET][1])
FACTS = facts_of(TARGET)


def asked(provider: str, page: int | None = None) -> list[Tuned]:
    """What a Llama and a DeepSeek ask of a provider, at one small shape each."""
    return questions(
        {name: MODELS[name] for name in ("llama", "deepseek")},
        target=TARGET,
        provider_of=lambda _problem: provider,
        page_size=page,
        decode="rows=2 context=1k",
        prefill="rows=1 context=1k queries=1k",
    )


def todays(one: Tuned) -> Tile:
    """The tile that the table has."""
    return SPACES[one.table_operation].whole(BASE.tile(one.table_operation, one.facts))


def largest(one: Tuned) -> Tile:
    """From there number by number the largest that the space has: what would not compile or fit shows here."""
    space, tile = SPACES[one.table_operation], todays(one)
    for axis, values in space.axes.items():
        bigger = [{**tile, axis: value} for value in values]
        tile = [one_of_them for one_of_them in bigger if space.possible(one_of_them, one.given)][-1]
    return tile


def table_of(one: Tuned, tile: Tile, folder: Path) -> str:
    """A table that answers with this tile."""
    path = folder / f"{len(list(folder.iterdir()))}.json"
    path.write_text(BASE.answering(one.table_operation, one.facts, tile).as_json())
    return str(path)


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


@pytest.mark.parametrize(
    ("one", "tile_of"),
    [*((one, todays) for one in asked("triton")[::2]), *((one, largest) for one in asked("hopper")[:3])],
    ids=lambda it: getattr(it, "name", None),
)
def test_a_tile_fits_where_there_is_memory_enough(tmp_path: Path, one: Tuned, tile_of: Callable[[Tuned], Tile]) -> None:
    table = table_of(one, tile_of(one), tmp_path)
    outcome = compile_tile(one, table, FACTS)
    assert outcome.status == "timed", outcome.why
    # The same kernels, found in the cache, on a device that has less.
    misfit = compile_tile(one, table, replace(FACTS, shared_memory=1024))
    assert (misfit.status, "Hardware limit: 1024" in misfit.why) == ("does not fit", True)


@pytest.mark.parametrize("one", [asked("triton")[0], *asked("hopper")[:3]], ids=lambda one: one.name)
def test_what_is_compiled_ahead_is_what_is_launched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, one: Tuned
) -> None:
    """From tensors with memory comes no other kernel than from those without, for the batch of the check neither."""
    table = table_of(one, largest(one), tmp_path)
    assert compile_tile(one, table, FACTS).status == "timed"
    missed: list[str] = []
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **told: missed.append(told["repr"]))
    kernels = measure.kernels_of(one.provider)
    with measure.compiling_only(FACTS):
        for task in (*(TASKS[one.operation](shape, "cpu") for shape in one.shapes), measure.checked_task(one, "cpu")):
            task.call(kernels, task.workspace(kernels, table))()
    assert not missed


def test_the_compiler_says_nothing_of_a_tile_that_the_report_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Triton prints the whole program that its assembler refuses; a report has a line for it."""

    def refused(*_arguments: Any, **_named: Any) -> Any:
        print("the whole program")  # noqa: T201
        raise RuntimeError("ptxas failed")

    one = asked("triton")[0]
    monkeypatch.setattr(JITFunction, "run", refused)
    outcome = compile_tile(one, table_of(one, todays(one), tmp_path), FACTS)
    assert (outcome.status, "ptxas failed" in outcome.why) == ("failed", True)
    assert capsys.readouterr().out == ""


def test_a_tile_that_cannot_be_compiled(tmp_path: Path) -> None:
    one = asked("triton")[0]
    outcome = compile_tile(one, table_of(one, todays(one) | {"keys": 48, "cut": 48}, tmp_path), FACTS)
    assert outcome.status == "failed"
    assert outcome.why


class Told(list[Any]):
    """Stands in for compiling: what would be compiled and launched is kept."""

    def stand_in(self) -> Callable[..., Any]:
        def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
            assert warmup
            self.append((kernel.__name__, grid, [self._plain(argument) for argument in arguments], named))
            return SimpleNamespace(metadata=SimpleNamespace(shared=0))

        return run

    @staticmethod
    def _plain(argument: Any) -> Any:
        if isinstance(argument, TensorDescriptor):
            return argument.block_shape
        return tuple(argument.shape) if isinstance(argument, torch.Tensor) else argument


@pytest.mark.parametrize("page", [None, 1, 64, 128])
@pytest.mark.parametrize("provider", ["triton", "hopper"])
def test_every_tile_is_launched_as_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, provider: str, page: int | None
) -> None:
    """Every number that is tried reaches a kernel of its provider: no two tiles are timed that do the same."""
    monkeypatch.setattr(hopper_launch, "registers_can_move", lambda: True)
    kernels = {"mla_decode": "taut_mla_decode", "paged_decode": "taut_decode"}
    for one in asked(provider, page):
        start, space = todays(one), SPACES[one.table_operation]
        launches: list[Told] = []
        changes = (*space.axes, *space.coupled)
        changed = [other for change in changes for other in space.changed(start, change, one.given)]
        for tile in [start, *changed]:
            told = Told()
            monkeypatch.setattr(JITFunction, "run", told.stand_in())
            outcome = compile_tile(one, table_of(one, tile, tmp_path), FACTS)
            assert outcome.status == "timed", (tile, outcome.why)
            assert kernels.get(one.operation, "taut_prefill") in {name for name, *_ in told}
            assert told not in launches, tile
            launches.append(told)
