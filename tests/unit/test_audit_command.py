"""`taut audit` without an engine: what it asks of one, what a user's mistakes get, and that no process stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from taut.audit import process as engine_process
from taut.audit.process import EngineFailedError, reason, run_engine
from taut.audit.records import Event, Place, Run, Scope, Step
from taut.audit.report import Report
from taut.audit.work import Request, held_bytes, prompts, scheduled_partials
from taut.cli import UserError, audit
from taut.cli.main import app

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def refused(*arguments: str) -> str:
    """What a user's mistake gets: a `UserError`, which the command shows as one line."""
    result = CliRunner().invoke(app, ["audit", *arguments])
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text("{}")
    return str(tmp_path)


@pytest.fixture(autouse=True)
def both_engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(audit, "find_spec", lambda name: name in ("vllm", "sglang"))
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the command takes it for itself


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["/nowhere/at/all", "--engine", "vllm"], "no such folder"),
        (["tiny", "--engine", "vllm"], "no model's name of the form ORGANISATION/NAME"),
        (["MODEL", "--engine", "vllm", "--fail-on", "fills,rubbish"], "--fail-on rubbish: nothing of this name"),
        (["MODEL"], "both installed here: name one"),
        (["MODEL", "--engine", "vllm", "--backend", ":Class"], "write package.module:Class"),
        (["MODEL", "--engine", "vllm", "--option", "dtype"], "write NAME=VALUE"),
    ],
)
def test_a_users_mistakes(model: str, arguments: list[str], says: str) -> None:
    assert says in refused(*[model if argument == "MODEL" else argument for argument in arguments])


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    assert "holds no config.json" in refused(str(tmp_path), "--engine", "vllm")


def test_an_engine_that_is_not_installed(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "find_spec", lambda name: name == "vllm")
    assert "sglang is not installed here" in refused(model, "--engine", "sglang")
    monkeypatch.setattr(audit, "find_spec", lambda _: None)
    assert "neither vLLM nor SGLang" in refused(model)


def test_an_unknown_engine_is_named_with_those_there_are(model: str) -> None:
    result = CliRunner().invoke(app, ["audit", model, "--engine", "llama.cpp"])
    assert result.exit_code == 2
    assert "vllm" in result.output
    assert "Traceback" not in result.output


def a_report(folder: Path) -> Path:
    """As `--json` prints one, of a run that fills in each of two layers."""
    event = Event("aten.zero_", "backend", {"fills": 1, "launches": 1}, 1.0, 2.0, 64, 0, Place("a.py", 7, "f"), None)
    scopes = [Scope(name, "layer", 0.0, 9.0, [event]) for name in ("one", "two")]
    run = Run("stock", "vllm", "0.1", "NVIDIA H200", "a.B", steps=[Step("decode", [3], 1, scopes=scopes)])
    file = folder / "report.json"
    file.write_text(Report.of(Request("vllm", "/a/model", "stock"), [run], "decode").as_json())
    return file


def test_a_report_is_shown_again_and_no_engine_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "run_engine", None)
    report, html, svg = str(a_report(tmp_path)), tmp_path / "page.html", tmp_path / "step.svg"
    arguments = ["audit", report, "--html", str(html), "--picture", str(svg), "--fail-on", "fills"]
    shown = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert shown.exit_code == 1, shown.output
    assert "2 x fills: aten.zero_, 128 B" in shown.output
    assert "fails stock: fills: 2 a decode step" in shown.output
    assert "a.py:7" in html.read_text()
    assert svg.read_text().startswith("<svg")
    again = CliRunner().invoke(app, ["audit", report, "--json"])
    assert json.loads(again.stdout)["runs"][0]["summary"]["totals"]["fills"] == 2


def test_a_report_of_an_earlier_release_lacks_fields(tmp_path: Path) -> None:
    file = a_report(tmp_path)
    report = json.loads(file.read_text())
    for field in ("left_out", "profiled"):
        del report["runs"][0]["summary"][field]
    file.write_text(json.dumps(report))
    assert CliRunner().invoke(app, ["audit", str(file)]).exit_code == 0


def test_a_log_tells_how_far_each_engine_is(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no terminal shows it: and with --json nothing but the record goes to standard output."""

    def run(request: Request, _: object, follow: Callable[[str], None]) -> Run:
        follow("tracing")
        return Run(request.asked, "vllm")

    monkeypatch.setattr(audit, "run_engine", run)
    arguments = ["audit", model, "--engine", "vllm", "--against", "stock", "--json"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.stderr.splitlines() == ["taut: tracing, after 0 s", "stock: tracing, after 0 s"]
    assert [run["asked"] for run in json.loads(shown.stdout)["runs"]] == ["taut", "stock"]


def test_what_is_no_report(tmp_path: Path) -> None:
    file = a_report(tmp_path)
    assert "--phase: this is a report, which is only shown again" in refused(str(file), "--phase", "prefill")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema": 99}))
    assert "a report of schema 99" in refused(str(file))
    for text in ("{}", "[]", "no json", '{"schema": 1, "runs": [{"summary": 3}]}'):
        file.write_text(text)
        assert "no report that `taut audit --json` has printed" in refused(str(file))


def test_help_has_examples() -> None:
    shown = CliRunner().invoke(app, ["audit", "--help"], env={"COLUMNS": "200"}).output
    assert "taut audit .models/SmolLM2-135M-Instruct --against stock" in shown
    assert "--fail-on" in shown


def test_what_an_engine_is_asked(model: str) -> None:
    asked = audit.request_of("vllm", model, "TRITON_MLA", 4, 64, 3, 0, False, ["dtype=float16", "block_size=32"])
    assert (asked.flag, asked.plugin, asked.made_up) == ("TRITON_MLA", "", True)  # there are no weights
    assert asked.options == {"dtype": "float16", "block_size": 32}
    Path(model, "model.safetensors").write_text("")
    asked = audit.request_of("vllm", model, "a.b:C", 4, 64, 3, 0, False, [])
    assert (asked.flag, asked.plugin, asked.made_up) == ("", "a.b.C", False)
    assert audit.request_of("vllm", model, "taut", 4, 64, 3, 2, False, []).made_up  # fewer layers than weights
    assert audit.request_of("vllm", "org/name", "stock", 4, 64, 3, 0, False, []).model == "org/name"


def test_the_variables_of_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAUT_ATTENTION", "auto")
    monkeypatch.setenv("TAUT_LOG", "debug")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    ours, stock = (audit.environment_of(Request("vllm", "m", name)) for name in ("taut", "stock"))
    assert (ours["TAUT_ATTENTION"], stock["TAUT_ATTENTION"]) == ("on", "off")
    assert (ours["TAUT_LOG"], ours["VLLM_CPU_KVCACHE_SPACE"]) == ("debug", "7")


@pytest.mark.parametrize(
    ("log", "says"),
    [
        (["  File x", "ValueError: no such head size", "RuntimeError: Engine core initialization failed."],
         "ValueError: no such head size"),
        (["(EngineCore) ERROR [core.py:1] vllm.errors.NotSupportedError: fp8 on a CPU"], "NotSupportedError: fp8"),
        (["ValueError: handled long ago", "taut: vLLM took CPU_ATTN in place of TRITON_MLA"], "vLLM took CPU_ATTN"),
        (["Killed"], "Killed"),
        ([], "it said nothing"),
    ],
)  # fmt: skip
def test_the_engines_reason(log: list[str], says: str) -> None:
    assert reason(log).startswith(says)


# A stand-in for an engine's process: it starts another one, which ignores to be told to end, and does as it is asked.
STAND_IN = textwrap.dedent(
    """
    import json, subprocess, sys, time
    from pathlib import Path
    asked = json.loads(Path(sys.argv[1]).read_text())
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", stubborn])
    Path(asked["model"], "child").write_text(str(child.pid))
    print("taut audit: starting", flush=True)
    if asked["asked"] == "hangs":
        time.sleep(600)
    if asked["asked"] == "fails":
        raise ValueError("no such head size")
    Path(sys.argv[2]).write_text(json.dumps({"asked": asked["asked"], "engine": "vllm"}))
    """
)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nshift 2\nexec "{sys.executable}" "{script}" "$@"\n')  # in place of -m MODULE
    python.chmod(0o755)
    monkeypatch.setattr(engine_process.sys, "executable", str(python))
    monkeypatch.setattr(engine_process, "PATIENCE", 0.5)
    return tmp_path


def alive(folder: Path) -> bool:
    """Whether the stand-in's child is running; a zombie is not."""
    try:
        status = Path("/proc", (folder / "child").read_text(), "stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_a_record_comes_back_and_nothing_stays(stand_in: Path) -> None:
    said: list[str] = []
    run = run_engine(Request("vllm", str(stand_in), "ends"), os.environ, said.append)
    assert (run.asked, said) == ("ends", ["starting"])
    assert not alive(stand_in)


def test_an_engine_that_fails_gives_its_reason_and_a_log(stand_in: Path) -> None:
    with pytest.raises(EngineFailedError, match="ValueError: no such head size") as failed:
        run_engine(Request("vllm", str(stand_in), "fails"), os.environ, lambda _: None)
    log = Path(str(failed.value).rpartition(": ")[2])
    assert "Traceback" in log.read_text()
    log.unlink()
    assert not alive(stand_in)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_stopped_leaves_no_process(stand_in: Path, number: signal.Signals) -> None:
    """Ctrl-C, or to be told to end, while the engine starts."""
    (stand_in / "config.json").write_text("{}")
    code = (
        "import sys; from taut.audit import process; from taut.cli import audit, main\n"
        f"process.PATIENCE = 0.5; process.sys.executable = {str(stand_in / 'python')!r}\n"
        f"audit.find_spec = lambda _: True\n"
        f"sys.argv = ['taut', 'audit', {str(stand_in)!r}, '--engine', 'vllm', '--backend', 'hangs']\n"
        "main.run()\n"
    )
    command = subprocess.Popen([REAL_PYTHON, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until = time.monotonic() + 60
    while not (stand_in / "child").exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.3)
    assert alive(stand_in)
    command.send_signal(number)
    said, _ = command.communicate(timeout=60)
    assert command.returncode not in (0, None)
    assert "Traceback" not in said
    assert not alive(stand_in)


REAL_PYTHON = sys.executable


def test_prompts_are_ragged_and_unlike() -> None:
    made = prompts(4, 64)
    assert [len(prompt) for prompt in made] == [16, 32, 48, 64]
    assert len({tuple(prompt[:4]) for prompt in made}) == 4
    assert [len(prompt) for prompt in prompts(3, 1)] == [1, 1, 1]


class Thing:
    """An object of a backend's."""

    def __init__(self, **attributes: object) -> None:
        self.__dict__.update(attributes)


class Slotted:
    """Another one, without a dictionary."""

    __slots__ = ("buffer",)

    def __init__(self, buffer: object) -> None:
        self.buffer = buffer


class Stubborn:
    """An object of an engine's that fails when it is looked into, as proxies of other processes do."""

    __slots__ = ("connection",)

    def __getattribute__(self, name: str) -> object:
        if name == "__class__":
            return Stubborn
        raise ConnectionError(name)


def engine_of(**attributes: object) -> SimpleNamespace:
    """An engine's object: its class is written elsewhere."""
    return SimpleNamespace(**attributes)


def test_held_bytes_count_each_memory_once_and_nothing_of_the_engines() -> None:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    buffer, cache = torch.empty(100, dtype=torch.float32), torch.empty(1000)
    inner = Thing(scratch=buffer[10:], again=buffer)
    model = torch.nn.Sequential(torch.nn.Linear(9, 9))
    # As a descriptor of Triton's refers to a layer's cache, deep inside a workspace.
    descriptors = {"layer 0": (Thing(base=cache[5:]),)}
    outer = Thing(inner=inner, boxes=Thing(kept=descriptors), many={"a": [torch.empty(3, dtype=torch.int64)]})
    outer.__dict__ |= {"model": model, "weight": model[0].weight.T, "slotted": Slotted(torch.empty(2))}
    inner.outer = outer  # type: ignore[attr-defined]
    with FakeTensorMode():
        fake = torch.empty(50)
    outer.__dict__["sparse"] = torch.eye(3).to_sparse()
    others = [Stubborn(), fake, torch.empty(5, device="meta")]
    engine = engine_of(pools=[engine_of(caches={0: cache})], model=model, backend=outer, others=others)
    assert held_bytes([outer], [engine], "cpu") == 400 + 24 + 8
    assert held_bytes([outer], [engine], "cuda") == 0
    assert held_bytes([], [engine], "cpu") == 0


def test_what_the_engine_keeps_for_a_backend_is_the_backends() -> None:
    """The metadata of the last step refers to the backend's workspace; the tables in it are the engine's."""
    import torch

    workspace, table = torch.empty(7), torch.empty(5)
    builder = Thing(workspace=workspace, last=Thing(table=table))
    runner = engine_of(builder=builder, tables=[table], state=engine_of(metadata=Thing(workspace=workspace)))
    assert held_bytes([builder], [runner], "cpu") == 28


def test_partial_results_by_a_schedule_of_ours() -> None:
    """Of three items one is cut into four parts: four partials, written and read; a prompt's are not counted."""
    import torch

    from taut.common_kernels.schedule.shape import Item, ScheduleShape
    from taut.common_kernels.workspace import ScheduledWorkspace

    workspace = ScheduledWorkspace(ScheduleShape(parts=8, max_items=5, cut=16, block=1), 5, 16, 64, "cpu")
    workspace.items = 3
    for i, splits in enumerate((1, 4, 0, 9, 9)):  # the last two are of another step
        workspace.schedule.items[i] = torch.tensor(Item(0, 0, 1, 0, 0, 1, splits, 0))
    prompt = ScheduledWorkspace(ScheduleShape(parts=8, max_items=5, cut=16, block=8), 5, 16, 64, "cpu")
    prompt.items = 1
    prompt.schedule.items[0] = torch.tensor(Item(0, 0, 8, 0, 0, 8, 8, 0))
    expected = 2 * 4 * 16 * (64 + 1) * 4
    assert scheduled_partials([object(), Thing(workspaces={"dense": workspace, "prompt": prompt})]) == expected
    assert scheduled_partials([Thing(workspace=workspace)]) == expected  # latent attention has one
    assert scheduled_partials([object()]) is None
    assert scheduled_partials([prompt]) is None
