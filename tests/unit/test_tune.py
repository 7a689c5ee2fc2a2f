"""`taut tune`, all but its times: questions, spaces, the search with a made-up timer, table, command."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from taut.benchmarks import BenchmarkError
from taut.benchmarks.models import MODELS
from taut.benchmarks.results import About
from taut.benchmarks.tuning.problems import questions
from taut.benchmarks.tuning.search import SLOWER, SPACES, Outcome, Space, score, search
from taut.cli import main, tune
from taut.common_kernels.tiles import built_in_tables, choose_table, read_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from taut.benchmarks.tuning.search import Found
    from taut.common_kernels.tiles import Tile

BASE = choose_table(built_in_tables(), "sm_90", 232_448)
BOTH = {name: MODELS[name] for name in ("llama", "deepseek")}
ASKED = questions(BOTH, target="sm_90")
OF_HOPPER = questions(BOTH, target="sm_90", provider_of=lambda _problem: "hopper")
SMALL = Space("a=1,2,3,4 b=1,2,3 keys=16,32,64", ("a b",), lambda _tile, _facts: True)
TILES = [dict(zip(SMALL.axes, numbers, strict=True)) for numbers in product(*SMALL.axes.values())]


class Timer:
    """A made-up timer: microseconds from a function of the tile; counts what it was asked."""

    def __init__(self, us: Callable[[Tile], Sequence[float]]) -> None:
        self.us: Callable[[Tile], Sequence[float]] = us
        self.asked: list[Tile] = []

    def __call__(self, tiles: Sequence[Tile], limits: Sequence[float] | None) -> Iterator[Outcome]:
        for tile in tiles:
            self.asked.append(dict(tile))
            yield self.outcome(tile, limits)

    def outcome(self, tile: Tile, limits: Sequence[float] | None) -> Outcome:
        us = tuple(self.us(tile))
        for number, one in enumerate(us):
            if limits is not None and one > limits[number]:
                return Outcome("slower", us[: number + 1])
        return Outcome("timed", us)


# Questions


def test_the_questions_of_a_llama_and_of_a_deepseek() -> None:
    assert [(one.name, one.operation, one.models) for one in ASKED] == [
        ("paged_decode rows=4 key_bytes=256 element_bytes=2 float8=0", "paged_decode", ("llama",)),
        ("paged_prefill rows=4 key_bytes=256 element_bytes=2 float8=0", "paged_extend", ("llama",)),
        ("mla_decode rows=128 rank=512 cache_bytes=2", "mla_decode", ("deepseek",)),
        ("paged_prefill rows=1 key_bytes=640 element_bytes=2 float8=0", "ragged_prefill", ("deepseek",)),
    ]
    assert all(shape["rows"] * shape["context"] <= 1 << 20 for one in ASKED for shape in one.shapes)
    assert {shape["page"] for shape in ASKED[2].shapes} == {64}


def test_whose_tiles_is_asked_for_each_problem() -> None:
    """As a provider that serves latent attention alone would have it; all else is measured alike."""
    asked = questions(
        BOTH, target="sm_90", provider_of=lambda problem: "hopper" if problem.operation == "mla_decode" else "triton"
    )
    assert [(one.provider, one.table_operation) for one in asked] == [
        ("triton", "paged_decode"), ("triton", "paged_prefill"), ("hopper", "hopper_mla_decode"),
        ("triton", "paged_prefill"),
    ]  # fmt: skip
    assert [(one.operation, one.facts, one.shapes) for one in asked] == [
        (one.operation, one.facts, one.shapes) for one in ASKED
    ]
    assert not {one.name for one in OF_HOPPER} & {one.name for one in ASKED}
    with pytest.raises(BenchmarkError, match=r"llama: the kernels of acme would serve .* names one of triton, hopper"):
        questions(BOTH, target="sm_90", provider_of=lambda _problem: "acme")


def test_every_question_is_one_that_its_table_answers() -> None:
    """The facts are those that the kernels ask with."""
    from taut.common_kernels.mla_decode.triton_launch import mla_tile
    from taut.common_kernels.paged_attention.triton_launch import tile_facts

    torch = pytest.importorskip("torch")
    decode, _, mla, _ = ASKED
    facts = tile_facts(4, 64, 64, torch.bfloat16, torch.bfloat16)
    assert dict(decode.facts) == facts
    tile = {**BASE.tile("mla_decode", mla.facts), "keys": 99}
    table = BASE.answering("mla_decode", mla.facts, tile)
    assert mla_tile(table, 128, 512, 2, 1).tile["keys"] == 99
    assert mla_tile(table, 64, 512, 2, 1).tile["keys"] != 99


def test_devices_share_the_heads_and_models_share_a_question() -> None:
    sharded = questions({"a": MODELS["deepseek"]}, target="sm_90", tensor_parallel=8, cache_dtype="float8_e4m3fn")
    assert sharded[0].facts == {"rows": 16, "rank": 512, "cache_bytes": 1}
    assert {shape["float8"] for shape in sharded[0].shapes} == {1}
    wide = MODELS["llama"] | {"num_attention_heads": 64, "num_key_value_heads": 16}
    both = questions({"a": MODELS["llama"], "b": wide}, target="sm_90", decode="rows=1 context=1k")
    assert both[0].models == ("a", "b")
    assert [shape["q_heads"] for shape in both[0].shapes] == [32, 64]


@pytest.mark.parametrize(
    ("config", "how", "says"),
    [
        ({"dtype": "float32", "torch_dtype": "float32"}, {}, "computes in float32"),
        ({}, {"tensor_parallel": 5}, "cannot be shared out over 5"),
        ({}, {"cache_dtype": "int4"}, "a cache of int4"),
        ({}, {"decode": "heads=3"}, "no axis heads"),
        ({}, {"decode": "kv_heads=3"}, "given by the model"),
        ({}, {"decode": "rows=1k context=1k,128k rows=2"}, "stands twice"),
        ({}, {"decode": "rows=64k context=64k"}, "holds no shape"),
        ({}, {"prefill": "context=1k queries=2k"}, "holds no shape"),
    ],
)
def test_what_cannot_be_asked(config: dict[str, Any], how: dict[str, Any], says: str) -> None:
    with pytest.raises(BenchmarkError, match=says):
        questions({"llama": MODELS["llama"] | config}, target="sm_90", **how)


def test_a_latent_of_another_size_is_refused() -> None:
    with pytest.raises(BenchmarkError, match="latent of 256 and rope of 64"):
        questions({"it": MODELS["deepseek"] | {"kv_lora_rank": 256}}, target="sm_90")


# Spaces


def all_changed(space: Space, tile: Tile, given: Mapping[str, int]) -> list[Tile]:
    """What the search tries from a tile, if none of it is better."""
    return [other for change in (*space.axes, *space.coupled) for other in space.changed(tile, change, given)]


@pytest.mark.parametrize("one", [*ASKED, *OF_HOPPER], ids=lambda one: one.name)
def test_todays_tiles_lie_in_their_space(one: Any) -> None:
    space = SPACES[one.table_operation]
    tile = space.whole(BASE.tile(one.table_operation, one.facts))
    assert all(tile[axis] in values for axis, values in space.axes.items())
    assert space.possible(tile, one.given)
    changed = all_changed(space, tile, one.given)
    assert 5 <= len(changed) <= 60
    assert tile not in changed
    assert len({tuple(sorted(other.items())) for other in changed}) == len(changed)
    assert all(set(other) == set(tile) for other in changed)
    most = max(len(names.split()) for names in space.coupled)
    assert all(sum(other[axis] != tile[axis] for axis in tile) <= most for other in changed)


def all_that_may_be_asked() -> Iterator[Any]:
    """Hopper's questions for many heads, key sizes and pages."""
    for heads, kv_heads, size in product((8, 20, 128), (1, 2, 8), (64, 128, 256)):
        if heads % kv_heads:
            continue
        wide = MODELS["llama"] | {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": size}
        many = MODELS["deepseek"] | {"num_attention_heads": heads}
        for page in (None, 1, 16, 32, 64, 128):
            yield from questions(
                {"a": wide, "b": many}, target="sm_90", provider_of=lambda _problem: "hopper", page_size=page
            )


def test_tiles_of_hopper_keep_to_what_its_kernels_take() -> None:
    """Slots of many rows are two, no part begins amid a box of any page size, and what fills no memory is not tried."""
    seen = set()
    for one in all_that_may_be_asked():
        space = SPACES[one.table_operation]
        start = space.whole(BASE.tile(one.table_operation, one.facts))
        assert space.possible(start, one.given), (one.name, start)
        for tile in all_changed(space, start, one.given):
            seen.add(one.table_operation)
            if one.operation == "mla_decode":
                assert (tile["keys"], tile["stages"], tile["programs"]) == (64, 2, 1)
                assert 504 - 2 * tile["registers"] >= 24
            elif one.operation == "paged_decode":
                assert all(tile["cut"] % box == 0 for box in (16, 32, 64) if box < tile["keys"])
                assert tile["rows"] in (8, 16, 32, 64)
            slots = tile["stages"] * tile["keys"] * one.facts.get("key_bytes", 1152) * tile.get("programs", 1)
            assert slots <= 232_448
    assert seen == {"hopper_mla_decode", "hopper_paged_decode", "hopper_paged_prefill"}


# The search


@given(st.lists(st.floats(1, 100), min_size=10, max_size=10), st.sampled_from(TILES))
def test_on_a_landscape_of_single_costs_it_finds_the_best(costs: list[float], start: Tile) -> None:
    """Each number of a tile has a cost of its own: then going where it gets better ends at the best of all."""
    places = [(axis, value) for axis, values in SMALL.axes.items() for value in values]
    cost = dict(zip(places, costs, strict=True))

    def us(tile: Tile) -> list[float]:
        return [sum(cost[place] for place in tile.items())]

    found = search(SMALL, {}, start, Timer(us), 100)
    best = min(us(tile)[0] for tile in TILES)
    assert not found.cut_short
    assert us(found.best)[0] <= best * (1 + 0.005 * 4)  # each step must gain half a percent
    assert found.after.us[0] <= found.before.us[0]


def test_all_alike_stays_as_it_is() -> None:
    timer = Timer(lambda _tile: [5.0, 7.0])
    found = search(SMALL, {}, TILES[7], timer, 100)
    assert (found.best, found.gain, found.cut_short) == (TILES[7], 1.0, "")
    assert len(timer.asked) == 1 + len(all_changed(SMALL, TILES[7], {}))


landscapes = st.lists(st.tuples(st.floats(1, 100), st.floats(1, 100)), min_size=len(TILES), max_size=len(TILES))


def rugged(numbers: list[tuple[float, float]]) -> Callable[[Tile], tuple[float, float]]:
    return lambda tile: numbers[TILES.index(dict(tile))]


@given(landscapes, st.sampled_from(TILES))
def test_never_slower_on_any_shape_and_never_measured_twice(numbers: list[tuple[float, float]], start: Tile) -> None:
    timer = Timer(rugged(numbers))
    found = search(SMALL, {}, start, timer, 100)
    before, after = rugged(numbers)(start), rugged(numbers)(found.best)
    assert all(mine <= its * (1 + SLOWER) for mine, its in zip(after, before, strict=True))
    assert score(found.after, found.before) <= 1
    keys = [tuple(sorted(tile.items())) for tile in timer.asked]
    assert len(keys) == len(set(keys)) == sum(found.counts.values())
    assert found.best == start or found.gain > 1


@given(landscapes, st.integers(1, 20))
def test_it_is_cut_short(numbers: list[tuple[float, float]], most: int) -> None:
    timer = Timer(rugged(numbers))
    found = search(SMALL, {}, TILES[0], timer, most)
    assert len(timer.asked) <= most
    assert found.best == TILES[0] or found.gain > 1
    assert search(SMALL, {}, TILES[0], Timer(rugged(numbers)), 1).best == TILES[0]
    assert search(SMALL, {}, TILES[0], Timer(rugged(numbers)), 1).cut_short == "--most allows more"


def test_what_does_not_fit_is_counted_and_never_chosen() -> None:
    space = Space("keys=16,32,64 stages=1,2,3", ("keys stages",), lambda _tile, _facts: True)

    class Small(Timer):
        def outcome(self, tile: Tile, limits: Sequence[float] | None) -> Outcome:
            if tile["keys"] * tile["stages"] > 32:
                return Outcome("does not fit", why="too large")
            return super().outcome(tile, limits)

    timer = Small(lambda tile: [100.0 - tile["keys"]])
    found = search(space, {}, {"keys": 16, "stages": 1}, timer, 100)
    assert found.best == {"keys": 32, "stages": 1}
    tried = [(tile["keys"], tile["stages"]) for tile in timer.asked]
    assert tried == [(16, 1), (32, 1), (64, 1), (32, 2), (32, 3), (16, 2), (16, 3), (64, 2), (64, 3)]
    assert found.counts == {"timed": 3, "does not fit": 6}


def test_numbers_that_trade_one_resource_are_changed_together() -> None:
    """More keys are better, but only so many of them fit: they are reached with fewer stages."""
    space = Space("keys=32,64 stages=2,4", ("keys stages",), lambda _tile, _facts: True)

    class Small(Timer):
        def outcome(self, tile: Tile, limits: Sequence[float] | None) -> Outcome:
            if tile["keys"] * tile["stages"] > 128:
                return Outcome("does not fit", why="too large")
            return super().outcome(tile, limits)

    timer = Small(lambda tile: [{(32, 4): 10.0, (32, 2): 12.0, (64, 2): 9.0}[tile["keys"], tile["stages"]]])
    assert search(space, {}, {"keys": 32, "stages": 4}, timer, 100).best == {"keys": 64, "stages": 2}


def test_a_gpu_that_takes_no_more_work_ends_the_search() -> None:
    """What was best until then is kept, and it is said after which tile."""

    class Crashes(Timer):
        def __call__(self, tiles: Sequence[Tile], limits: Sequence[float] | None) -> Iterator[Outcome]:
            for tile in tiles:
                if any(before["a"] > 3 for before in self.asked):
                    return
                yield from super().__call__([tile], limits)

        def outcome(self, tile: Tile, limits: Sequence[float] | None) -> Outcome:
            return Outcome("failed", why="an illegal instruction") if tile["a"] > 3 else super().outcome(tile, limits)

    found = search(SMALL, {}, {"a": 1, "b": 1, "keys": 16}, Crashes(lambda tile: [10.0 - tile["a"] - tile["b"]]), 100)
    assert found.best == {"a": 3, "b": 1, "keys": 16}
    assert found.counts == {"timed": 3, "failed": 1}
    assert found.cut_short == (
        "the GPU took no more work after {'a': 4, 'b': 1, 'keys': 16} failed: an illegal instruction"
    )


def test_slower_on_one_shape_cannot_be_chosen() -> None:
    """Whatever the others gain, and even if the timer did not give it up."""
    before = Outcome("timed", (10.0, 10.0))
    assert score(Outcome("timed", (1.0, 10.2)), before) == float("inf")
    assert score(Outcome("timed", (1.0, 10.05)), before) < 1
    assert score(Outcome("slower", (1.0, 9.0)), before) == float("inf")


def test_wrong_numbers_are_never_chosen() -> None:
    class Wrong(Timer):
        def outcome(self, tile: Tile, limits: Sequence[float] | None) -> Outcome:
            return Outcome("wrong", why="nan") if tile["a"] == 4 else super().outcome(tile, limits)

    assert search(SMALL, {}, TILES[0], Wrong(lambda tile: [10.0 - tile["a"]]), 100).best["a"] == 3


def test_todays_tile_must_work() -> None:
    class Broken(Timer):
        def outcome(self, *_: Any) -> Outcome:
            return Outcome("wrong", why="relative error 0.5")

    with pytest.raises(BenchmarkError, match=r"own tile .* wrong: relative error 0.5"):
        search(SMALL, {}, TILES[0], Broken(lambda _tile: [1.0]), 100)


# The table


def test_a_table_with_answers_is_taken_and_answers_as_before_elsewhere(tmp_path: Path) -> None:
    table = BASE
    for _ in range(2):  # an entry of the same question is replaced
        for one in ASKED:
            tile = {**BASE.tile(one.table_operation, one.facts), "stages": 9}
            table = table.answering(one.table_operation, one.facts, tile)
    assert sum(map(len, table.operations.values())) == sum(map(len, BASE.operations.values())) + len(ASKED)
    path = tmp_path / "it.json"
    path.write_text(table.as_json())
    read = read_table(path)
    assert read == replace(table, name="it.json")
    for one in ASKED:
        assert read.tile(one.table_operation, one.facts)["stages"] == 9
        for name in one.facts:
            other = {**one.facts, name: one.facts[name] * 2 if one.facts[name] else 1}
            if other not in [dict(two.facts) for two in ASKED]:
                assert read.tile(one.table_operation, other) == BASE.tile(one.table_operation, other)


def test_tables_are_written_as_they_are_read(tmp_path: Path) -> None:
    for table in built_in_tables():
        (tmp_path / "it.json").write_text(table.as_json())
        read = read_table(tmp_path / "it.json")
        assert (read.operations, read.targets, read.about) == (table.operations, table.targets, table.about)


# The timer, with a made-up clock


@pytest.fixture
def timer_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """The timer of a question to a provider `triton` that has these kernels."""
    from taut.benchmarks.tuning import measure
    from taut.common_kernels.workspace import INTERPRETED

    named = measure.kernels_of
    monkeypatch.setattr(measure, "CHECKED_LENGTHS", (0, 1, 17, 40))
    monkeypatch.setattr(measure, "CHECKED_TOKENS", 50)

    def timer(question: Any, kernels: Any, time: Any, device: str = "cpu") -> measure.Measurer:
        monkeypatch.setattr(measure, "kernels_of", lambda name: kernels if name == "triton" else named(name))
        return measure.Measurer(question, BASE, INTERPRETED, tmp_path, None, device, time)

    return timer


TINY = {
    "decode": "rows=1,2 context=40",
    "prefill": "rows=1 context=100 queries=50",
}


def tiny_questions() -> list[Any]:
    llama = MODELS["llama"] | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    deepseek = MODELS["deepseek"] | {"num_attention_heads": 2}
    return questions({"llama": llama, "deepseek": deepseek}, target="cpu", **TINY)


def test_a_tile_is_checked_and_timed(timer_of: Callable[..., Any]) -> None:
    from taut.common_kernels import reference

    for one in tiny_questions():
        tile = SPACES[one.table_operation].whole(BASE.tile(one.table_operation, one.facts))
        timer = timer_of(one, reference, lambda calls: (len(calls), calls[0]())[0] * 4.0)
        (outcome,) = timer([tile], None)
        assert outcome == Outcome("timed", (4.0,) * len(one.shapes))
        assert list(timer([tile, tile], [9.0] * len(one.shapes))) == [outcome] * 2
        assert [o.status for o in timer([tile], [1.0] * len(one.shapes))] == ["slower"]


def test_wrong_numbers_and_failures_are_outcomes(timer_of: Callable[..., Any]) -> None:
    from taut.common_kernels import reference

    def bad(*arguments: Any, **named: Any) -> None:
        reference.mla_decode(*arguments, **named)
        arguments[4][3, 0, 0] = float("nan")

    def broken(*_arguments: Any, **_named: Any) -> None:
        raise RuntimeError("a tile too far")

    (one,) = [one for one in tiny_questions() if one.operation == "mla_decode"]
    tile = SPACES["mla_decode"].whole(BASE.tile("mla_decode", one.facts))
    for operation, status, why in ((bad, "wrong", "relative error inf"), (broken, "failed", "a tile too far")):
        kernels = SimpleNamespace(mla_decode=operation, workspace=reference.workspace)
        (outcome,) = timer_of(one, kernels, lambda _calls: 1.0)([tile], None)
        assert outcome.status == status
        assert why in outcome.why


def test_the_check_is_ragged_and_poisoned() -> None:
    from taut.benchmarks.tuning.measure import CHECKED_LENGTHS, checked_task

    for one in tiny_questions():
        task: Any = checked_task(one, "cpu")
        if one.operation == "ragged_prefill":
            continue
        assert tuple(task.step.lengths.tolist()) == CHECKED_LENGTHS
        cache = task.cache if one.operation == "mla_decode" else task.keys
        unused = cache.flatten(2).isnan().all(-1).sum().item()
        assert unused == cache.shape[0] * cache.shape[1] - sum(CHECKED_LENGTHS)


def test_nothing_is_timed_when_the_gpu_takes_no_more_work(
    monkeypatch: pytest.MonkeyPatch, timer_of: Callable[..., Any]
) -> None:
    """The tile that broke it has failed; of those after it there is no outcome."""
    from taut.benchmarks.tuning import measure

    (one,) = [one for one in tiny_questions() if one.operation == "mla_decode"]
    tile = SPACES["mla_decode"].whole(BASE.tile("mla_decode", one.facts))
    monkeypatch.setattr(measure, "_gpu_works", lambda: False)
    monkeypatch.setattr(measure, "checked_task", lambda *_: 1 / 0)
    (outcome,) = timer_of(one, SimpleNamespace(), lambda _calls: 1.0, "cuda:0")([tile, tile, tile], None)
    assert (outcome.status, "division by zero" in outcome.why) == ("failed", True)


def test_compiling_only_launches_nothing_and_finds_misfits(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources
    from triton.runtime.jit import JITFunction

    from taut.benchmarks.tuning.measure import compiling_only
    from taut.common_kernels.workspace import DeviceFacts

    seen = []

    def run(_kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        seen.append((arguments, grid, warmup, named))
        return SimpleNamespace(metadata=SimpleNamespace(shared=1000))

    monkeypatch.setattr(JITFunction, "run", run)
    kernel = JITFunction(test_compiling_only_launches_nothing_and_finds_misfits)
    with compiling_only(DeviceFacts("sm_90", 1000, 1)):
        kernel[(3,)](1, keys=2)
    assert seen == [((1,), (3,), True, {"keys": 2})]
    too_small = pytest.raises(OutOfResources, match="shared memory, Required: 1000, Hardware limit: 999")
    with compiling_only(DeviceFacts("sm_90", 999, 1)), too_small:
        kernel[(3,)](1, keys=2)
    assert JITFunction.run is run


def test_processes_that_compile_end_with_the_tuning(tmp_path: Path) -> None:
    """Here they have no GPU to compile for, which is an outcome, and nothing of them is left."""
    import multiprocessing

    from taut.benchmarks.tuning import measure
    from taut.common_kernels.workspace import INTERPRETED

    one = tiny_questions()[0]
    with measure.compilers(1) as pool:
        tile = SPACES[one.table_operation].whole(BASE.tile(one.table_operation, one.facts))
        (outcome,) = measure.Measurer(one, BASE, INTERPRETED, tmp_path, pool, "cpu")([tile], None)
        assert len(multiprocessing.active_children()) == 1
    assert (outcome.status, outcome.us) == ("failed", ())
    assert multiprocessing.active_children() == []


# The command


def made_up(question: Any) -> Timer:
    """The timer of a question that stands for the GPU's."""
    return Timer(lambda tile: [100.0 / tile["stages"]] * len(question.shapes))


def interrupted(_question: Any) -> Timer:
    return Timer(lambda _tile: (_ for _ in ()).throw(KeyboardInterrupt))


def of_decode_alone(question: Any) -> Timer:
    class Broken(Timer):
        def outcome(self, *_: Any) -> Outcome:
            return Outcome("failed", why="no such instruction")

    return made_up(question) if question.operation == "paged_decode" else Broken(lambda _tile: [])


def tuning(monkeypatch: pytest.MonkeyPatch, timer_of: Callable[[Any], Timer], asked: list[Any]) -> None:
    """Have the command tune these questions here."""
    from taut.benchmarks.tuning import measure

    def measurer(question: Any, *_: Any, counted: Callable[[], None]) -> Timer:
        counted()
        return timer_of(question)

    monkeypatch.setattr(tune, "_facts", lambda: SimpleNamespace(target="sm_90", shared_memory=232_448))
    monkeypatch.setattr(tune, "questions", lambda *_args, **_named: asked)
    monkeypatch.setattr(measure, "Measurer", measurer)
    monkeypatch.setattr(measure, "compilers", lambda _jobs: nullcontext())


def as_user(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[Any, str, str]:
    monkeypatch.setattr(sys, "argv", ["taut", "tune", *arguments])
    with pytest.raises(SystemExit) as end:
        main.run()
    captured = capsys.readouterr()
    return end.value.code, captured.out, captured.err


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (ASKED, {"paged_decode": 5, "mla_decode": 4, "paged_prefill": 4}),
        (OF_HOPPER, {"hopper_paged_decode": 8, "hopper_mla_decode": 2, "hopper_paged_prefill": 4}),
    ],
    ids=["triton", "hopper"],
)
def test_a_run_from_its_questions_to_its_table(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    asked: list[Any],
    expected: dict[str, int],
) -> None:
    """The table, and nothing beside it."""
    path = tmp_path / "it.json"
    tuning(monkeypatch, made_up, asked)
    status, out, _ = as_user(monkeypatch, capsys, "llama", "deepseek", "-o", str(path), "--json")
    assert status == 0
    assert [file.name for file in tmp_path.iterdir()] == ["it.json"]
    told = json.loads(out)
    assert list(told) == ["schema", "table", "measured", "base", "questions"]
    stages = {one["operation"]: one["after"]["tile"]["stages"] for one in told["questions"]}
    assert stages == expected
    assert {one["provider"] for one in told["questions"]} == {one.provider for one in asked}
    assert all(one["gain"] >= 1 for one in told["questions"])

    table = read_table(path)
    assert (table.targets, table.vendor, table.shared_memory) == (("sm_90",), "nvidia", 232_448)
    assert table.about.startswith(f"measured on {told['measured']}: {asked[0].name}; ")
    for one, by in zip(asked, told["questions"], strict=True):
        assert table.tile(one.table_operation, one.facts) == by["after"]["tile"]
    untouched = set(BASE.operations) - {one.table_operation for one in asked}
    assert len(untouched) == 3
    assert all(table.operations[name] == BASE.operations[name] for name in untouched)


def test_an_interruption_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tuning(monkeypatch, interrupted, ASKED)
    status, out, err = as_user(monkeypatch, capsys, "llama", "-o", str(tmp_path / "it.json"))
    assert (status, out) == (130, "")
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_measured_costs_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "it.json"
    tuning(monkeypatch, of_decode_alone, ASKED)
    status, out, err = as_user(monkeypatch, capsys, "llama", "deepseek", "-o", str(path), "--json")
    assert status == 2
    assert [one["operation"] for one in json.loads(out)["questions"]] == ["paged_decode"]
    assert err.count("failed: no such instruction") == 3
    table = read_table(path)
    assert table.tile("paged_decode", ASKED[0].facts)["stages"] == 5
    assert table.tile("mla_decode", ASKED[2].facts) == BASE.tile("mla_decode", ASKED[2].facts)


@pytest.mark.parametrize(
    ("target", "arguments", "providers"),
    [
        ("sm_90", (), ["hopper"] * 4),
        ("sm_90", ("--kernels", "triton"), ["triton"] * 4),
        # Hopper's kernels of paged attention read no float8.
        ("sm_90", ("--cache-dtype", "float8_e4m3fn"), ["triton", "triton", "hopper", "hopper"]),
        ("sm_80", (), ["triton"] * 4),
        (None, (), ["triton"] * 4),
        (None, ("--kernels", "hopper"), ["hopper"] * 4),
    ],
)
def test_who_would_serve_is_tuned(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    target: str | None,
    arguments: tuple[str, ...],
    providers: list[str],
) -> None:
    monkeypatch.setattr(tune, "_facts", lambda: target and SimpleNamespace(target=target))
    status, out, _ = as_user(monkeypatch, capsys, "llama", "deepseek", "--dry-run", "--json", *arguments)
    told = json.loads(out)
    assert (status, [one["provider"] for one in told]) == (0, providers)
    assert all(one["table_operation"].startswith("hopper_") == (one["provider"] == "hopper") for one in told)


def test_the_setting_decides_unless_the_option_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from taut.engine_plugins import settings

    monkeypatch.setattr(tune, "_facts", lambda: SimpleNamespace(target="sm_90"))
    monkeypatch.setattr(settings, "settings", lambda: settings.Settings(kernels="triton"))
    for arguments, provider in (((), "triton"), (("--kernels", "hopper"), "hopper"), (("--kernels", "auto"), "hopper")):
        _, out, _ = as_user(monkeypatch, capsys, "llama", "--dry-run", "--json", *arguments)
        assert {one["provider"] for one in json.loads(out)} == {provider}


def test_who_cannot_serve_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tune, "_facts", lambda: SimpleNamespace(target="sm_90"))
    quantised = ("llama", "--dry-run", "--kernels", "hopper", "--cache-dtype", "float8_e4m3fn")
    status, _, err = as_user(monkeypatch, capsys, *quantised)
    assert status == 2
    assert "cache dtype float8_e4m3fn is not among" in err
    assert "Set --kernels auto" in err


def test_the_outcome_for_people() -> None:
    found: list[tuple[Any, Found]] = []
    for one in ASKED:
        start = BASE.tile(one.table_operation, one.facts)
        found.append((one, search(SPACES[one.table_operation], one.given, start, made_up(one), 60)))
    out = io.StringIO()
    about = About(gpu="Some GPU", target="sm_90", date="2026-01-02", packages={"torch": "9.9"})
    Console(file=out, width=100).print(tune.render(found, about))
    assert "with stages=5" in out.getvalue()
    assert "mla_decode rows=128" in out.getvalue()


def test_a_dry_run_for_people(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tune, "_facts", lambda: None)
    status, out, _ = as_user(monkeypatch, capsys, "llama", "--dry-run", "--decode", "rows=1 context=1k,2k")
    assert status == 0
    assert out.splitlines() == [
        f"triton: {ASKED[0].name}, measured as paged_decode at 2 shapes for llama",
        f"triton: {ASKED[1].name}, measured as paged_extend at 4 shapes for llama",
    ]


def test_a_dry_run_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from taut.cli.main import run; run()"
    command = [sys.executable, "-c", code, "tune", "llama", "--dry-run", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [one["table_operation"] for one in json.loads(done.stdout)] == ["paged_decode", "paged_prefill"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("lama",), "no built-in shape"),
        (("llama", "-o", "no/such/folder/it.json"), "its folder is missing"),
        (("llama", "--tp", "7"), "cannot be shared out over 7"),
        (("llama", "--decode", "rows"), "is no axis of a grid"),
        (("llama", "--kernels", "hoper"), "--kernels hoper names no kernel provider: did you mean 'hopper'?"),
        (("llama", "--kernels", "reference"), "--kernels names one of triton, hopper"),
        (("llama",), "measures on a GPU"),
    ],
)
def test_a_users_mistake_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: tuple[str, ...],
    says: str,
) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, err = as_user(monkeypatch, capsys, *arguments)
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("taut: ")
    assert says in line
    assert list(tmp_path.iterdir()) == []
