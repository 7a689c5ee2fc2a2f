"""`taut bench`, all but its times: grids, floors, files of results, comparisons, tables, pictures, rows of a run."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from taut.benchmarks import BenchmarkError
from taut.benchmarks.operations import OPERATIONS, describe, floor_us, operation_named, parse_grid
from taut.benchmarks.results import (
    About,
    Ceilings,
    EngineResults,
    EngineRow,
    EngineRun,
    KernelResults,
    Load,
    Row,
    as_json,
    compare,
    percentile,
    read,
    spread,
    write,
)
from taut.benchmarks.tables import render
from taut.cli import main

if TYPE_CHECKING:
    from taut.benchmarks.tasks import Call

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "benchmarks" / "results"
ABOUT = About(gpu="Some GPU", target="sm_90", date="2026-01-02", packages={"torch": "9.9"})
CEILINGS = Ceilings(bytes_per_second=4e12, flops_per_second=8e14)


def row(**different: Any) -> Row:
    shape = OPERATIONS["mla_decode"].shape({"heads": 16})
    usual: dict[str, Any] = {
        "operation": "mla_decode", "shape": shape, "bytes": 4_000_000, "flops": 8_000,
        "us": {"taut": 10.0, "peer": 20.0},
    }  # fmt: skip
    return Row(**(usual | different))


def kernels(*rows: Row, gpu: str = "Some GPU") -> KernelResults:
    return KernelResults(about=ABOUT.model_copy(update={"gpu": gpu}), ceilings=CEILINGS, rows=list(rows) or [row()])


def engines(seconds: float = 2.0, gpu: str = "Some GPU") -> EngineResults:
    run = EngineRun(seconds=seconds, first_token_ms=spread([0.1]), between_tokens_ms=spread([0.01]))
    load = Load(requests=8, tokens_in=512, tokens_out=256, runs=[EngineRun(seconds=99, warm_up=True), run])
    rows = [EngineRow(engine="vllm", model="llama", backend=name, loads=[load]) for name in ("stock", "taut")]
    return EngineResults(about=ABOUT.model_copy(update={"gpu": gpu}), rows=rows)


def taut(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`taut ARGUMENTS` in a process of its own, on a machine without a GPU."""
    variables = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""} | environment
    command = [sys.executable, "-c", "from taut.cli.main import run; run()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=variables, check=False)


def stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[Any, str, str]:
    """Exit status, output and errors of `taut ARGUMENTS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["taut", *arguments])
    with pytest.raises(SystemExit) as end:
        main.run()
    captured = capsys.readouterr()
    return end.value.code, captured.out, captured.err


# Grids


def test_a_grid_is_read() -> None:
    axes = parse_grid("heads=16,128 context=1k..8k rows=3 page=16..100")
    assert axes == {
        "heads": [16, 128], "context": [1024, 2048, 4096, 8192], "rows": [3], "page": [16, 32, 64],
    }  # fmt: skip


@given(st.dictionaries(st.sampled_from(["heads", "rows", "context"]), st.lists(st.integers(1, 10**6), min_size=1)))
def test_what_is_written_is_read(axes: dict[str, list[int]]) -> None:
    text = " ".join(f"{name}={','.join(map(str, numbers))}" for name, numbers in axes.items())
    assert parse_grid(text) == {name: list(dict.fromkeys(numbers)) for name, numbers in axes.items()}


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        ("heads", "is no axis of a grid"),
        ("heads=", "is no axis of a grid"),
        ("heads=x", "x in heads=x is no number"),
        ("heads=1,,2", "nothing in heads=1,,2 is no number"),
        ("heads=8..4", "doubles from a number above 0"),
        ("heads=0..4", "doubles from a number above 0"),
        ("heads=1 heads=2", "stands twice"),
        ("haeds=1", "did you mean heads"),
        ("heads=0", "heads must be at least 1"),
        ("queries=9 context=4", "more than the context"),
        ("float8=2", "float8 is 1"),
        ("rows=1..128k context=1..128k heads=1..128k", "rows; take fewer values"),
    ],
)
def test_a_grid_that_is_none(grid: str, says: str) -> None:
    with pytest.raises(BenchmarkError, match=says):
        OPERATIONS["mla_decode"].shapes(grid)


def test_heads_that_cannot_be_shared() -> None:
    with pytest.raises(BenchmarkError, match="30 query heads cannot share 8"):
        OPERATIONS["paged_decode"].shapes("q_heads=30")


def test_an_operation_that_is_none() -> None:
    with pytest.raises(BenchmarkError, match="did you mean paged_decode"):
        operation_named("page_decode")


def test_the_usual_grid_holds_the_shapes_that_are_kept() -> None:
    """What has been measured once is measured again by the command without a grid."""
    usual = {f"{name} {describe(shape)}" for name, operation in OPERATIONS.items() for shape in operation.shapes()}
    kept = {one.name for file in KEPT.glob("*.json") for one in read(file).rows if isinstance(one, Row)}
    assert kept <= usual
    assert len(kept) >= 26


# Floors


def test_floors_by_hand() -> None:
    mla = OPERATIONS["mla_decode"]
    shape = mla.shape({"heads": 2, "rows": 3, "context": 100, "page": 64})
    assert mla.traffic is not None
    assert mla.traffic(shape) == 2 * 3 * 128 * 576 + 2 * 3 * 2 * (576 + 512)
    assert mla.work(shape) == 2 * 3 * 2 * 100 * (576 + 512)
    assert floor_us(4_000_000, 0, 4e12, 8e14) == pytest.approx(1.0)
    assert floor_us(0, 8 * 10**8, 4e12, 8e14) == pytest.approx(1.0)
    assert floor_us(4_000_000, 8 * 10**9, 4e12, 8e14) == pytest.approx(10.0)
    assert floor_us(0, 0, 4e12, 8e14) is None


@given(st.integers(1, 40), st.integers(0, 60))
def test_the_keys_that_queries_see(queries: int, cached: int) -> None:
    """Counted one by one."""
    extend = OPERATIONS["ragged_prefill"]
    context = queries + cached
    shape = extend.shape({"q_heads": 8, "rows": 2, "context": context, "queries": queries})
    seen = sum(position + 1 for position in range(cached, context))
    assert extend.work(shape) == 2 * 2 * 8 * seen * 256


SMALL = {
    "mla_decode": "heads=2 rows=2 context=100 queries=1,3 float8=0,1",
    "paged_decode": "q_heads=4 kv_heads=2 key=32 value=16 rows=2 context=70 float8=0,1",
    "paged_extend": "q_heads=4 kv_heads=2 key=32 value=32 rows=2 context=70 queries=30",
    "ragged_prefill": "q_heads=4 kv_heads=2 key=32 value=16 rows=2 context=70 queries=30",
    "store_kv": "tokens=5 kv_heads=2 key=16 float8=0,1",
    "store_mla_kv": "tokens=5 float8=0,1",
    "merge": "tokens=7 heads=3 parts=3 value=16",
    "schedule": "heads=4 rows=3",
}


def test_traffic_is_that_of_the_tensors() -> None:
    """Bytes by the formula against the bytes of the tensors that a task has; work against a multiply count in small."""
    from taut.benchmarks.tasks import TASKS

    tensors = {
        "mla_decode": ("cache", "query", "out"),
        "paged_decode": ("keys", "values", "query", "out"),
        "paged_extend": ("keys", "values", "query", "out"),
        "ragged_prefill": ("keys", "values", "query", "out"),
        "merge": ("parts", "lses", "out"),
    }
    for name, names in tensors.items():
        operation = OPERATIONS[name]
        assert operation.traffic is not None
        for shape in operation.shapes(SMALL[name]):
            task = TASKS[name](shape, "cpu")
            lse = 4 * task.out[..., 0].numel() if name == "merge" else 0
            assert operation.traffic(shape) == sum(getattr(task, one).nbytes for one in names) + lse, name


# A run, with a clock that is made up


def measured(time: Any = lambda _call: 7.0, names: tuple[str, ...] = ("merge",), **different: Any) -> list[Row]:
    from taut.benchmarks.kernels import Bench

    def run(call: Call) -> float:
        call()
        return float(time(call))

    bench = Bench(**({"device": "cpu", "time": run, "peers_for": lambda _: ()} | different))
    return [bench.row(OPERATIONS[name], shape) for name in names for shape in OPERATIONS[name].shapes(SMALL[name])]


def test_every_operation_runs_and_is_right() -> None:
    rows = measured(names=tuple(SMALL))
    assert {row.operation for row in rows} == set(OPERATIONS)
    assert all(row.us == {"taut": 7.0} for row in rows)
    assert all(row.errors == {"taut": 0.0} for row in rows if row.operation != "schedule")
    assert all(row.against == "reference" for row in rows if row.operation != "schedule")


def test_peers_beside_ours() -> None:
    """One that is right, one that is wrong, one that cannot: measured, measured with its error, left out."""
    from taut.benchmarks.kernels import wrong_rows
    from taut.benchmarks.peers import Peer

    def right(task: Any) -> Call:
        from taut.common_kernels import reference

        return task.call(reference)  # type: ignore[no-any-return]

    def wrong(task: Any) -> Call:
        return lambda: task.out.fill_(1.0)

    def cannot(_task: Any) -> Call:
        raise ValueError("takes one new token a row")

    def peers(_operation: str) -> list[Peer]:
        return [Peer(f.__name__, "torch", ("merge",), f) for f in (right, wrong, cannot)]

    from taut.benchmarks.kernels import Bench

    operation = OPERATIONS["merge"]
    bench = Bench("cpu", lambda _: 3.0, peers)
    (shape,) = operation.shapes(SMALL["merge"])
    row = bench.row(operation, shape)
    assert row.us == {"taut": 3.0, "right": 3.0, "wrong": 3.0}
    assert row.errors["right"] == 0.0
    assert row.errors["wrong"] > 0.5
    assert row.left_out == {"cannot": "ValueError: takes one new token a row"}
    assert wrong_rows([row]) == []
    assert wrong_rows([row.model_copy(update={"errors": {"taut": math.inf}})]) != []


def test_what_is_not_written_is_not_right() -> None:
    """The output is poison before each call: a kernel that writes nothing does not pass with what another one wrote."""
    from taut.benchmarks.tasks import TASKS, relative_error
    from taut.common_kernels import reference

    for name in ("merge", "store_kv"):
        task = TASKS[name](OPERATIONS[name].shapes(SMALL[name])[0], "cpu")
        right = task.result(task.call(reference))  # type: ignore[arg-type]
        assert relative_error(task.result(task.call(reference)), right) == 0.0  # type: ignore[arg-type]
        assert relative_error(task.result(lambda task=task: task.out), right) >= 1.0  # type: ignore[misc]


def test_a_provider_that_cannot_serve_is_left_out() -> None:
    rows = measured(providers=("auto", "triton"))
    assert all(set(row.us) == {"taut auto"} for row in rows)
    assert all("ProviderError" in row.left_out["taut triton"] for row in rows)


def test_a_gpu_that_is_full_is_a_reason() -> None:
    from torch import OutOfMemoryError

    def full(_call: Call) -> float:
        raise OutOfMemoryError("Tried to allocate 2.00 TiB")

    assert all("2.00 TiB" in row.left_out["taut"] and not row.us for row in measured(full))


# Files


@pytest.mark.parametrize("results", [kernels(), engines()], ids=["kernels", "engines"])
def test_what_is_written_can_be_read(tmp_path: Path, results: Any) -> None:
    write(results, tmp_path / "it.json")
    assert read(tmp_path / "it.json") == results
    assert [file.name for file in tmp_path.iterdir()] == ["it.json"]
    assert json.loads(as_json(results))["schema"] == 1


def test_the_files_that_are_kept_can_be_read() -> None:
    files = sorted(KEPT.glob("*.json"))
    assert len(files) >= 4
    assert {read(file).kind for file in files} == {"kernels", "engines"}


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"kind": "kernels"}', '{"kind": "else"}'])
def test_what_is_no_file_of_results(tmp_path: Path, text: str) -> None:
    (tmp_path / "it.json").write_text(text)
    with pytest.raises(BenchmarkError, match="holds no results of `taut bench`"):
        read(tmp_path / "it.json")


def test_an_unknown_key_is_no_result(tmp_path: Path) -> None:
    data = json.loads(as_json(kernels())) | {"gpu": "another"}
    (tmp_path / "it.json").write_text(json.dumps(data))
    with pytest.raises(BenchmarkError, match="gpu"):
        read(tmp_path / "it.json")


def test_the_run_that_counts() -> None:
    runs = [EngineRun(seconds=s, warm_up=w) for s, w in ((1, True), (5, False), (3, False), (4, False))]
    load = Load(requests=2, tokens_in=1, tokens_out=10, runs=runs)
    assert (load.counted.seconds, load.tokens_per_second) == (4, 5.0)
    assert load.model_copy(update={"runs": runs[:1]}).counted.seconds == 1


@given(st.lists(st.floats(0, 100), min_size=1))
def test_percentiles(numbers: list[float]) -> None:
    for share in (0.5, 0.99, 1.0):
        found = percentile(numbers, share)
        assert sum(number <= found for number in numbers) >= share * len(numbers)
        assert sum(number < found for number in numbers) < share * len(numbers)


# Comparisons


def test_ours_before_and_after() -> None:
    only = row(shape=OPERATIONS["mla_decode"].shape({}))
    (pair,) = compare(kernels(), kernels(row(us={"taut": 5.0, "taut triton": 4.0}), only))
    assert (pair.before, pair.after, pair.faster) == (10.0, 4.0, 2.5)
    pairs = compare(engines(2.0), engines(4.0))
    assert [pair.what for pair in pairs] == ["vllm llama stock 8x512/256", "vllm llama taut 8x512/256"]
    assert {pair.faster for pair in pairs} == {0.5}


def test_different_gpus_are_refused() -> None:
    with pytest.raises(BenchmarkError, match=r"on Some GPU, the second on NVIDIA H200: .* Measure both on one GPU"):
        compare(kernels(), kernels(gpu="NVIDIA H200"))


def test_what_else_cannot_be_compared() -> None:
    with pytest.raises(BenchmarkError, match="files of one kind"):
        compare(kernels(), engines())
    with pytest.raises(BenchmarkError, match="no row in common"):
        compare(kernels(), kernels(row(operation="merge")))


def test_a_slower_row_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before, after = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    write(kernels(), Path(before))
    write(kernels(row(us={"taut": 10.4})), Path(after))
    status = {
        limit: stopped(monkeypatch, capsys, "bench", "compare", before, after, "--slower", limit)[0] for limit in "35"
    }
    assert status == {"3": 1, "5": 0}
    write(kernels(gpu="Another"), Path(after))
    code, _, said = stopped(monkeypatch, capsys, "bench", "compare", before, after)
    assert code == 2
    assert all(part in said for part in (before, after, "Some GPU", "Another"))


# Tables and pictures


def text(results: Any, width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(render(results))
    return out.getvalue()


def test_tables() -> None:
    broken = row(shape=OPERATIONS["mla_decode"].shape({}), errors={"taut": 0.5}, left_out={"peer": "no [bold] reason"})
    shown = text(kernels(row(), broken, row(operation="schedule", bytes=0, flops=0)), 120)
    assert "10.0 WRONG" in shown
    assert "no [bold] reason" in shown
    assert "10%" in shown  # of the floor: 1 us of 10
    assert "0.40 TB/s" in shown
    assert "taut to peer: 2.00 times as fast" in shown
    shown = text(engines(), 120)
    assert "1024" in shown  # 8 x 256 tokens in 2 s
    assert "100.0" in shown


def test_numbers_are_never_cut() -> None:
    for file in KEPT.glob("*decode.json"):
        shown = text(read(file), 90)
        assert "…" not in shown
        for one in read(file).rows:
            assert all(f"{us:.1f}" in shown for us in one.us.values())


@pytest.mark.parametrize(("form", "starts"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_pictures(tmp_path: Path, form: str, starts: bytes) -> None:
    pytest.importorskip("matplotlib", reason="pictures need it")
    from taut.benchmarks.plots import draw

    results = [read(file) for file in sorted(KEPT.glob("*.json"))]
    files = draw(results, tmp_path / "deep" / "er", form)
    assert [file.name for file in files] == [f"{name}.{form}" for name in ("roofline", "latency", "speedup", "engines")]
    contents = [file.read_bytes() for file in files]
    assert all(content.startswith(starts) for content in contents)
    if form == "svg":
        draw(results, tmp_path / "again")
        assert contents == [(tmp_path / "again" / file.name).read_bytes() for file in files]


def test_pictures_of_what_has_none(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need it")
    from taut.benchmarks.plots import draw

    assert draw([kernels(row(operation="schedule", bytes=0, flops=0, us={"taut": 1.0}))], tmp_path) == []
    with pytest.raises(BenchmarkError, match="Another and Some GPU: draw those of one GPU"):
        draw([kernels(), kernels(gpu="Another")], tmp_path)
    with pytest.raises(BenchmarkError, match="there are svg, png"):
        draw([kernels()], tmp_path, "gif")


def test_pictures_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from taut.benchmarks import plots

    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(BenchmarkError, match=r"pip install 'taut-attention\[bench\]'"):
        plots.draw([kernels()], tmp_path)


# The command


def test_without_a_gpu_it_says_so() -> None:
    done = taut("bench", "kernels", "merge")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "measures on a GPU" in line
    assert "--dry-run" in line


def test_a_dry_run_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from taut.cli.main import run; run()"
    command = [sys.executable, "-c", code, "bench", "kernels", "merge", "--grid", "tokens=1,2", "--dry-run", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [one["shape"]["tokens"] for one in json.loads(done.stdout)] == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("kernels", "--grid", "rows=1"), "--grid is of one operation"),
        (("kernels", "merge", "-o", "no/such/folder/it.json"), "its folder is missing"),
        (("kernels", "merge", "-o", "."), "is a folder"),
        (("kernels", "merge", "--kernels", "tritn"), "did you mean 'triton'"),
        (("kernels", "merge", "--table", "no.json"), "is not a tile table"),
        (("show", "no.json"), "no such file"),
        (("engines", "vlm", "llama"), "there are vllm, sglang"),
        (("engines", "vllm", "lama"), "no built-in shape"),
        (("engines", "vllm", "llama", "--load", "8*512"), "is no load"),
        (("engines", "vllm", "llama", "--load", "1x131072/2"), "takes 131072 tokens, and a load needs 131074"),
        (("engines", "vllm", "llama", "taut", "taut"), "--rounds 2"),
        (("engines", "vllm", "llama", "--options", "[1]"), "must be a JSON object"),
        (("engines", "vllm", "llama", "--options", "{"), "is not JSON"),
    ],
)
def test_a_users_mistake_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: tuple[str, ...],
    says: str,
) -> None:
    from taut.benchmarks import engines as module

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "find_spec", lambda _name: True)
    status, out, err = stopped(monkeypatch, capsys, "bench", *arguments)
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("taut: ")
    assert says in line


def test_every_command_has_an_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("kernels", "engines", "show", "compare", "plot"):
        status, out, _ = stopped(monkeypatch, capsys, "bench", name, "--help")
        assert status == 0
        assert f"taut bench {name}" in " ".join(out.split())


# Everything


def published(folder: Path, *engines: str, taut: str = "echo taut") -> subprocess.CompletedProcess[str]:
    """What tools/measure_published.sh would call."""
    command = ["sh", str(ROOT / "tools" / "measure_published.sh"), str(folder), *engines]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TAUT": taut}, check=False)


def test_everything_is_what_is_published(tmp_path: Path) -> None:
    """The backends of the files that are kept are among those that one command measures."""
    done = published(tmp_path, "vllm", "sglang")
    calls = [line.split() for line in done.stdout.splitlines()]
    assert (done.returncode, calls[-1]) == (0, ["taut", "bench", "kernels", "-o", f"{tmp_path}/kernels.json"])
    asked = {(call[3], call[4]): set(call[5 : call.index("-o")]) for call in calls[:-1]}
    for file in KEPT.glob("*.json"):
        results = read(file)
        if isinstance(results, EngineResults):
            (where,) = {(one.engine, one.model) for one in results.rows}
            assert {one.backend for one in results.rows} <= asked[where]


def test_everything_goes_on_where_it_was(tmp_path: Path) -> None:
    """One part is there already, one fails, and the rest are measured all the same."""
    (tmp_path / "vllm_llama.json").write_text("{}")
    fails = tmp_path / "taut"
    fails.write_text('#!/bin/sh\necho "$@"\ncase "$*" in *deepseek*) exit 1;; esac\n')
    fails.chmod(0o755)
    done = published(tmp_path, "vllm", taut=str(fails))
    assert done.returncode == 1
    assert [line.split()[:3] for line in done.stdout.splitlines()] == [
        ["bench", "engines", "vllm"], ["bench", "kernels", "-o"],
    ]  # fmt: skip
    assert "vllm_llama.json is there already" in done.stderr
    assert done.stderr.splitlines()[-1] == "failed: vllm_deepseek"


# Engines


def test_what_an_engine_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from taut.benchmarks import engines as module
    from taut.benchmarks.models import model_named

    monkeypatch.setattr(module, "find_spec", lambda _name: True)
    monkeypatch.setenv("TAUT_KERNELS", "reference")
    plan = module.Plan(
        "vllm", model_named("llama"), ["stock", "taut", "FLASH_ATTN"], [(1, 40000, 8)], options={"seed": 1}
    )
    by_backend = {name: plan.arguments(name, "folder") for name in plan.backends}
    assert [by_backend[name].get("attention_backend") for name in plan.backends] == [None, None, "FLASH_ATTN"]
    assert all(one["max_model_len"] == 40008 and one["seed"] == 1 for one in by_backend.values())
    assert by_backend["taut"]["load_format"] == "dummy"
    environment = {name: plan.environment(name) for name in plan.backends}
    assert [one["TAUT_ATTENTION"] for one in environment.values()] == ["off", "on", "off"]
    assert all("TAUT_KERNELS" not in one for one in environment.values())


def test_what_an_engine_answers() -> None:
    from taut.benchmarks.engines import loads_of

    times = [[0.5, 0.6, 0.8], [1.0, 1.1, 1.4]]
    (load,) = loads_of([(2, 5, 3)], [[{"seconds": 9.0, "times": times}, {"seconds": 1.4, "times": times}]])
    assert [run.warm_up for run in load.runs] == [True, False]
    run = load.counted
    assert run.first_token_ms is not None
    assert run.between_tokens_ms is not None
    assert (run.first_token_ms.p50, run.first_token_ms.p99) == (500.0, 1000.0)
    assert (run.between_tokens_ms.p50, run.between_tokens_ms.p99) == pytest.approx((100.0, 300.0))
    assert load.tokens_per_second == pytest.approx(6 / 1.4)


def test_one_that_fails_costs_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Its log is shown and it is named at the end; what the others took is kept, of every round."""
    from taut.benchmarks import engines as module

    monkeypatch.setattr(module, "find_spec", lambda _name: True)
    monkeypatch.setattr("taut.cli.bench._on_gpu", lambda: True)
    begun = []

    def process(plan: module.Plan, backend: str, _say: object) -> EngineRow:
        begun.append(backend)
        if backend == "BROKEN":
            raise module.EngineFailedError(f"{plan.engine} with {backend} ended with status 1", "what it said")
        return engines(2.0).rows[0].model_copy(update={"backend": backend})

    monkeypatch.setattr(module, "_process", process)
    file = tmp_path / "it.json"
    call = ("bench", "engines", "vllm", "llama", "BROKEN", "taut", "--rounds", "2", "-o", str(file))
    status, _, err = stopped(monkeypatch, capsys, *call)
    assert status == 2
    assert "what it said" in err
    assert err.splitlines()[-1] == "taut: vllm with BROKEN ended with status 1"
    assert begun == ["BROKEN", "taut", "taut"]
    results = read(file)
    assert isinstance(results, EngineResults)
    assert [(one.backend, len(one.loads[0].runs)) for one in results.rows] == [("taut", 4)]


def test_rounds_are_joined() -> None:
    from taut.benchmarks.engines import _joined

    first, second = engines(2.0).rows[0], engines(4.0).rows[0].model_copy(update={"serves": ["a"]})
    joined = _joined(first, second)
    assert [run.seconds for run in joined.loads[0].runs] == [99, 2.0, 99, 4.0]
    assert joined.serves == ["a"]


CHILD = (
    "import subprocess, sys, time; "
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', sys.argv[1]]); "
)


def alive(mark: str) -> list[str]:
    """Processes with this word in their command line."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            line = (place / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if mark in line and int(place.name) != os.getpid():
            found.append(line)
    return found


@pytest.mark.parametrize("how", ["end", "time", "interruption"])
def test_no_process_is_left_behind(tmp_path: Path, how: str) -> None:
    """Children of an engine's process end with it, whatever ended it."""
    from taut.benchmarks.engines import follow

    mark = f"taut-test-{os.getpid()}-{how}"
    code = CHILD + ("print('taut bench: here', flush=True)" if how == "end" else "time.sleep(60)")
    command = [sys.executable, "-c", code, mark]
    said: list[str] = []

    def say(words: str) -> None:
        said.append(words)
        if how == "interruption" and len(alive(mark)) == 2:
            raise KeyboardInterrupt

    if how == "interruption":
        with pytest.raises(KeyboardInterrupt):
            follow(command, dict(os.environ), tmp_path / "log", 20, say)
    else:
        status = follow(command, dict(os.environ), tmp_path / "log", 20 if how == "end" else 1, say)
        assert status == (0 if how == "end" else None)
    for _ in range(50):
        if not alive(mark):
            break
        time.sleep(0.1)
    assert alive(mark) == []


def test_an_interruption_of_the_command_is_quiet(tmp_path: Path) -> None:
    """Ctrl-C while an engine starts: no traceback, no process, no file."""
    mark = f"taut-test-{os.getpid()}-ctrl-c"
    code = (
        "import sys\nfrom taut.benchmarks import engines\n"
        "engines.find_spec = lambda _: True\n"
        f"engines.sys.executable = {str(tmp_path / 'slow')!r}\n"
        "from taut.cli.main import run\nrun()"
    )
    slow = tmp_path / "slow"
    slow.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'import time; time.sleep(60)' {mark}\n")
    slow.chmod(0o755)
    (tmp_path / "here").mkdir()
    arguments = ["bench", "engines", "vllm", "llama", "--load", "1x8/2", "-o", "it.json"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path / "here", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    for _ in range(300):
        if alive(mark):
            break
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode not in (0, None)
    assert "Traceback" not in err
    assert alive(mark) == []
    assert list((tmp_path / "here").iterdir()) == []
