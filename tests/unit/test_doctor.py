"""`taut doctor`: what it finds, how it says it, and that it never falls over what it is there to find."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

import taut
from taut.adapters.engine import Touch, age_of
from taut.cli import UserError, doctor, main
from taut.cli.doctor import as_json, collect, look, probes, render
from taut.common_kernels.problem import Capability
from taut.common_kernels.providers import KernelProvider, Registry, default_registry, hookimpl
from taut.engine_plugins import hooks
from taut.engine_plugins.settings import Settings, variable

if TYPE_CHECKING:
    from pathlib import Path

    from taut.adapters.engine import EngineAdapter
    from taut.cli.doctor.report import Report, Row

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "dtype": "bfloat16",
}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "num_attention_heads": 128,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "dtype": "bfloat16",
}


def installed(adapter: EngineAdapter, **other: Any) -> EngineAdapter:
    """An adapter whose engine is always there: this very package stands for it."""
    releases = (taut.__version__, taut.__version__)
    return replace(adapter, **({"distributions": ("taut-attention",), "module": "taut", "releases": releases} | other))


def absent(adapter: EngineAdapter) -> EngineAdapter:
    return replace(adapter, distributions=("no-such-engine",), module="no_such_engine")


def adapters(monkeypatch: pytest.MonkeyPatch, *them: EngineAdapter) -> None:
    monkeypatch.setattr(look, "engines", lambda: {adapter.name: adapter for adapter in them})


VLLM, SGLANG = hooks.engines()["vllm"], hooks.engines()["sglang"]


@pytest.fixture(autouse=True)
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM is installed, SGLang is not, no GPU, nothing is set."""
    for name in [*map(variable, Settings.model_fields), "VLLM_PLUGINS", "SGLANG_PLUGINS"]:
        monkeypatch.delenv(name, raising=False)
    adapters(monkeypatch, installed(VLLM), absent(SGLANG))
    monkeypatch.setattr(look, "_gpus", list)


def report_of(**how: Any) -> Report:
    return collect(**({"kernels": default_registry([])} | how))


def wrong(report: Report) -> list[str]:
    return ["{about}: {says} {advice}".format(**finding) for finding in report.findings if finding["level"] == "wrong"]


def notes(report: Report) -> list[str]:
    return ["{about}: {says} {advice}".format(**finding) for finding in report.findings if finding["level"] == "note"]


def text(report: Report, width: int = 120) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(render(report))
    return out.getvalue()


def as_user(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[Any, str, str]:
    """Exit status, standard output and standard error of `taut ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["taut", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main.run()
    captured = capsys.readouterr()
    return stopped.value.code, captured.out, captured.err


def elsewhere(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`taut ARGUMENTS` in a process of its own, after some code."""
    script = f"import sys\n{code}\nsys.argv = ['taut', *{arguments!r}]\nfrom taut.cli.main import run\nrun()\n"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TAUT_")}
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=clean | environment)


# What is installed


def test_nothing_is_wrong() -> None:
    report = report_of()
    assert wrong(report) == []
    assert not report.wrong
    vllm, sglang = report.engines
    assert [vllm[key] for key in ("version", "in_range", "entry_point", "let_through")] == [
        taut.__version__,
        True,
        True,
        True,
    ]
    assert (sglang["version"], sglang["in_range"]) == (None, None)
    assert "Nothing is wrong." in text(report)


def test_no_engine_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters(monkeypatch, absent(VLLM), absent(SGLANG))
    (line,) = wrong(report_of())
    assert "no engine is installed beside taut" in line
    assert "install no-such-engine" in line


def test_the_engine_that_was_asked_for_is_missing() -> None:
    (line,) = wrong(report_of(engine="sglang"))
    assert "no-such-engine is not installed" in line


def test_an_engine_that_we_cannot_speak_to() -> None:
    with pytest.raises(UserError, match="There are vllm, sglang"):
        report_of(engine="tensorrt")


def test_a_release_outside_the_range_is_worth_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters(monkeypatch, installed(VLLM, releases=("98.0", "99.0")))
    report = report_of()
    assert report.engines[0]["in_range"] is False
    assert wrong(report) == []
    assert any("not within 98.0 to 99.0" in line for line in notes(report))


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.20.2", True),
        ("0.20.1", False),
        ("0.33.0", True),
        ("0.33.1", False),
        ("0.9.9", False),
        ("0.32.0+cpu", True),
        ("0.24.1rc2.dev3+gabc123", True),
        ("0.33.0.post1", True),
        ("1.0", False),
    ],
)
def test_the_range_of_releases(version: str, expected: bool) -> None:
    assert (age_of(version, ("0.20.2", "0.33.0")) == "within") is expected


def test_two_packages_of_one_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters(monkeypatch, installed(VLLM, distributions=("taut-attention", "pluggy")))
    monkeypatch.setattr(look, "_brings", lambda _distribution, _module: True)
    assert any("both installed" in line for line in notes(report_of()))


def test_a_package_that_only_lends_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """What brings no file of the engine is not the engine."""
    adapters(monkeypatch, installed(VLLM, distributions=("rich", "pluggy"), module="pluggy"))
    report = report_of()
    assert not any("both installed" in line for line in notes(report))
    assert report.engines[0]["distribution"] == "pluggy"


def test_an_engine_that_is_not_served_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters(monkeypatch, installed(SGLANG, serves=()))
    report = report_of(model=LLAMA)
    assert any("does not yet serve sglang" in line for line in notes(report))
    assert report.model is not None
    assert report.model["outcomes"]["sglang"]["on"].startswith("sglang stops with an error")


def test_our_plugin_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters(monkeypatch, installed(VLLM, plugin_group="no.such.group"))
    report = report_of()
    assert not report.engines[0]["entry_point"]
    assert any("no.such.group" in line and "pip install" in line for line in wrong(report))


@pytest.mark.parametrize(
    ("adapter", "listed", "passes"),
    [
        (VLLM, None, True),
        (VLLM, "taut", True),
        (VLLM, "other,taut", True),
        (VLLM, "other", False),
        (VLLM, "other, taut", False),  # vLLM compares as it stands
        (VLLM, "", False),  # and takes this for a list
        (SGLANG, "other, taut", True),
        (SGLANG, "", True),
        (SGLANG, "tautology", False),
    ],
)
def test_the_engines_list_of_plugins(
    monkeypatch: pytest.MonkeyPatch, adapter: EngineAdapter, listed: str | None, passes: bool
) -> None:
    adapters(monkeypatch, installed(adapter))
    report = report_of(environment={} if listed is None else {adapter.plugin_filter: listed})
    assert report.engines[0]["let_through"] is passes
    assert report.wrong is not passes
    assert passes or any(f"{adapter.plugin_filter}={listed}" in line for line in wrong(report))


def test_a_gpu_without_kernels_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {"index": 0, "name": "Some GPU", "target": "sm_90", "memory_gib": 79.6}
    monkeypatch.setattr(look, "_gpus", lambda: [gpu])
    only_cpu = registry_of(provider("mine", automatic_on=("cpu",)))
    report = report_of(kernels=only_cpu)
    assert report.gpus == [gpu]
    assert any("on sm_90 no kernel provider is chosen by itself" in line for line in notes(report))
    assert "Some GPU" in text(report)


def test_a_driver_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> list[Row]:
        raise RuntimeError("no driver [here]")

    monkeypatch.setattr(look, "_gpus", fail)
    assert any("no driver [here]" in line for line in wrong(report_of()))


# Settings


def test_a_misspelt_setting_is_a_finding_and_the_others_are_shown() -> None:
    report = report_of(environment={"TAUT_ATTENTON": "on", "TAUT_LOG": "loud", "TAUT_KERNELS": "reference"})
    lines = wrong(report)
    assert len(lines) == 2
    assert "did you mean TAUT_ATTENTION?" in lines[0]
    assert "TAUT_LOG=loud" in lines[1]
    assert [(s["name"], s["value"], s["source"]) for s in report.settings] == [
        ("TAUT_ATTENTION", None, "default"),
        ("TAUT_KERNELS", "reference", "TAUT_KERNELS"),
        ("TAUT_TABLE", None, "default"),
        ("TAUT_LOG", "info", "default"),
    ]


def test_a_file_is_shown_without_its_folder(tmp_path: Path) -> None:
    table = tmp_path / "mine.json"
    table.write_text("{}")
    report = report_of(environment={"TAUT_TABLE": str(table)})
    assert "mine.json" in text(report)
    assert str(tmp_path) not in text(report, 1000) + as_json(report)


def test_the_home_folder_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    report = report_of(environment={"TAUT_TABLE": "/home/somebody/lost.json"})
    assert any("~/lost.json" in line for line in wrong(report))
    assert "somebody" not in as_json(report)


# Kernel providers


def provider(name: str, **other: Any) -> KernelProvider:
    def load() -> Any:
        raise AssertionError("the doctor loads no kernels")

    can = tuple(Capability(operation) for operation in ("paged_attention", "store_kv"))
    told: dict[str, Any] = {"summary": "a [bold] one", "priority": 5, "capabilities": can, "load": load}
    return KernelProvider(name, **(told | other))


def registry_of(*them: KernelProvider) -> Registry:
    class Plugin:
        @hookimpl
        def taut_kernels(self) -> list[KernelProvider]:
            return list(them)

    registry = default_registry([])
    registry.plugins.unregister(name="taut")
    registry.plugins.register(Plugin(), name="plugin")
    return registry


def test_providers_and_what_each_can_do() -> None:
    limited = Capability(
        "paged_attention", ("sm_80+",), head_sizes=frozenset({128, 64}), features=frozenset({"causal"})
    )
    report = report_of(kernels=registry_of(provider("low", priority=1), provider("high", capabilities=(limited,))))
    assert [p["name"] for p in report.providers] == ["high", "low"]
    assert report.providers[0]["origin"] == "entry point plugin"
    shown = text(report)
    for part in ("What high can do", "64, 128", "sm_80+", "a [bold] one"):
        assert part in shown


def test_a_provider_that_lacks_what_it_needs_has_no_kernels() -> None:
    lacking = provider("lacking", requires=("no_such_module",))
    report = report_of(kernels=registry_of(lacking), model=LLAMA)
    assert any("there are no kernels for cpu" in line for line in notes(report))
    assert report.model is not None
    assert "needs no_such_module" in report.model["asked"][0]["reasons"]["lacking"][0]


def test_the_built_in_ones_say_so() -> None:
    (reference,) = [p for p in report_of().providers if p["name"] == "reference"]
    assert reference["origin"] == "built in"


def test_a_provider_that_does_not_exist_is_wrong() -> None:
    (line,) = wrong(report_of(environment={"TAUT_KERNELS": "referense"}, model=LLAMA))
    assert "did you mean 'reference'" in line


def test_two_providers_of_one_name_are_wrong() -> None:
    assert any(
        "two kernel providers are named 'twin'" in line
        for line in wrong(report_of(kernels=registry_of(*map(provider, ["twin"] * 2))))
    )


WHEN_ASKED = """
from taut.common_kernels.providers import hookimpl

@hookimpl
def taut_kernels():
    raise OSError("full moon")
"""


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("raise ImportError('needs a moon')", "ImportError: needs a moon"),
        (WHEN_ASKED, "OSError: full moon"),
    ],
    ids=["at import", "when asked"],
)
def test_a_broken_providers_entry_point_is_shown(tmp_path: Path, source: str, says: str) -> None:
    (tmp_path / "broken_kernels.py").write_text(source)
    info = tmp_path / "broken_kernels-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-kernels\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[taut]\nbroken = broken_kernels\n")
    done = elsewhere("", "doctor", "--quick", "--json", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    found = [
        f["says"] for f in json.loads(done.stdout)["findings"] if f["level"] == "wrong" and f["about"] == "providers"
    ]
    assert found == [f"the entry point broken of broken-kernels 1.2 is of no use: {says}"]
    points = {point["name"]: point for point in json.loads(done.stdout)["entry_points"]}
    assert (points["broken"]["package"], points["broken"]["loads"]) == ("broken-kernels 1.2", f"no: {says}")


# A model


def test_a_model_that_is_served() -> None:
    report = report_of(model=LLAMA)
    assert report.model is not None
    assert [(a["problem"].operation, a["provider"]) for a in report.model["asked"]] == [
        ("paged_attention", "reference"),
        ("store_kv", "reference"),
    ]
    assert list(report.model["outcomes"]) == ["vllm"]  # the only one that is installed
    outcomes = report.model["outcomes"]["vllm"]
    assert list(outcomes) == ["off", "unset", "auto", "on"]
    assert outcomes["auto"] == outcomes["on"] == "taut"
    assert "--attention-backend CUSTOM" in outcomes["unset"]
    assert not report.wrong


def test_mla_is_served() -> None:
    report = report_of(model=DEEPSEEK)
    assert report.model is not None
    assert report.model["kind"] == "MLA"
    outcomes = report.model["outcomes"]["vllm"]
    assert outcomes["auto"] == outcomes["on"] == "taut"
    assert not report.wrong


def test_nobody_can_serve_and_every_reason_is_told() -> None:
    wants_64 = provider("narrow", capabilities=(Capability("paged_attention", head_sizes=frozenset({64})),))
    shy = provider("shy", automatic_on=("gfx942",))
    report = report_of(model=LLAMA, target="sm_90", kernels=registry_of(wants_64, shy))
    assert report.model is not None
    paged, store = report.model["asked"]
    assert paged["provider"] is None
    assert paged["reasons"] == {
        "narrow": ("head size 128 is not among 64",),
        "shy": ("is never chosen by itself on sm_90",),
    }
    assert store["reasons"]["narrow"] == ("does not provide store_kv",)
    assert "no kernels for paged_attention, store_kv on sm_90" in report.model["outcomes"]["vllm"]["auto"]


def test_a_chosen_provider_and_why_not_the_others() -> None:
    one, two = provider("one", priority=1), provider("two", priority=2)
    report = report_of(model=LLAMA, kernels=registry_of(one, two), environment={"TAUT_KERNELS": "one"})
    assert report.model is not None
    assert report.model["asked"][0]["provider"] == "one"
    assert report.model["asked"][0]["reasons"] == {"two": ("TAUT_KERNELS=one asks for another",)}


def test_a_config_that_tells_too_little() -> None:
    report = report_of(model={"model_type": "mamba"})
    assert report.model is None
    assert any("no num_attention_heads" in line for line in wrong(report))


# How it is said


@pytest.mark.parametrize("width", [40, 80, 200])
def test_it_fits(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    lines = text(report_of(model=DEEPSEEK, environment={"TAUT_ATTENTON": "x" * 300}), width).splitlines()
    assert max(map(len, lines)) <= width


def test_json_keys() -> None:
    data = json.loads(as_json(report_of(model=LLAMA)))
    assert list(data) == [
        "schema",
        "taut",
        "python",
        "platform",
        "torch",
        "triton",
        "gpus",
        "engines",
        "entry_points",
        "providers",
        "settings",
        "model",
        "logs",
        "bridge",
        "findings",
    ]
    assert all(list(finding) == ["level", "about", "says", "advice"] for finding in data["findings"])
    assert data["model"]["asked"][0]["problem"]["features"] == ["causal"]
    assert data["providers"][-1]["capabilities"][0]["targets"] == ["any"]
    assert doctor.command.__doc__ is not None
    for key in data:
        assert key in doctor.command.__doc__
    assert json.loads(as_json(report_of()))["model"] is None


# The command


def test_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    for place in (tmp_path, tmp_path / "config.json"):
        status, out, _ = as_user(monkeypatch, capsys, "doctor", "--quick", "--json", "--model", str(place))
        assert status == 0
        assert json.loads(out)["model"]["model_type"] == "llama"
        assert str(tmp_path) not in out
    monkeypatch.setenv("TAUT_LOUD", "1")
    status, out, _ = as_user(monkeypatch, capsys, "doctor", "--quick")
    assert status == 1
    assert "TAUT_LOUD is not a setting" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--model", "no/such/model"), "no/such/model: no such file or folder"),
        (("--model", "."), "config.json: no such file or folder"),
        (("--model", "list.json"), "holds no model's config"),
        (("--model", "text.json"), "text.json is not JSON"),
        (("--engine", "tensorrt"), "There are vllm, sglang"),
    ],
)
def test_a_users_mistake_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: tuple[str, ...],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "text.json").write_text("once upon a time")
    status, out, err = as_user(monkeypatch, capsys, "doctor", "--quick", *arguments)
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("taut: ")
    assert says in line


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = as_user(monkeypatch, capsys, "--version")
    assert (status, out) == (0, f"taut-attention {taut.__version__}\n")


LACKS = "for name in ('torch', 'triton', 'vllm', 'sglang'): sys.modules[name] = None"


def test_help_needs_neither_torch_nor_an_engine() -> None:
    done = elsewhere(LACKS, "--help")
    assert done.returncode == 0, done.stderr
    assert "doctor" in done.stdout


def test_a_missing_torch_is_said_clearly() -> None:
    done = elsewhere(LACKS, "doctor", "--quick", "--json")
    assert done.returncode == 1
    assert done.stderr == ""
    data = json.loads(done.stdout)
    assert (data["torch"], data["triton"], data["gpus"]) == (None, None, [])
    (finding,) = [finding for finding in data["findings"] if finding["about"] == "torch"]
    assert finding["level"] == "wrong"
    assert "torch is missing" in finding["says"]
    assert "pip install torch" in finding["advice"]


def test_no_engine_is_imported() -> None:
    tell = "import atexit; atexit.register(lambda: sys.stderr.write(str({'vllm', 'sglang'} & set(sys.modules))))"
    done = elsewhere(tell, "doctor", "--quick")
    assert done.stderr == "set()"


def test_a_provider_is_chosen_by_itself_on_the_targets_its_patterns_mean() -> None:
    """As the choice itself reads them: "sm_80+" is sm_90 too."""
    report = report_of(kernels=registry_of(provider("later", automatic_on=("sm_80+",))), target="sm_90")
    assert any("on sm_90 kernels are chosen from: later" in finding["says"] for finding in report.findings)


# The probes


def probed(what: str, verdict: str, needed: bool = True) -> Row:
    return {"engine": "vllm", "what": what, "since": "0.1", "until": "", "verdict": verdict, "needed": needed}


def test_probes_are_summed_up_and_shown_when_asked() -> None:
    assert report_of().bridge == []
    entries = [probed("touch 0", "here"), probed("touch 1", "here"), probed("odd", "not here", needed=False)]
    report = report_of(probe=lambda _engine: entries)
    assert not report.wrong
    assert any("all 2 internals" in finding["says"] for finding in report.findings)
    short = text(report)
    assert "2 of 2" in short
    assert "odd" not in short
    out = io.StringIO()
    Console(file=out, width=120).print(render(report, every_touch=True))
    assert "odd" in out.getvalue()


def test_what_is_needed_and_not_here_is_wrong() -> None:
    verdicts = ("here", "not here", "failed: ImportError: no such place")
    entries = [probed(f"touch {i}", verdict) for i, verdict in enumerate(verdicts)]
    report = report_of(probe=lambda _engine: entries)
    lines = [finding["says"] for finding in report.findings if finding["level"] == "wrong"]
    assert lines == ["not here: touch 1", "failed: ImportError: no such place: touch 2"]


def test_a_broken_engine_is_said_in_one_line() -> None:
    def broken(_engine: str) -> list[Row]:
        raise probes.ProbeError("status -11, it said nothing")

    (line,) = wrong(report_of(probe=broken))
    assert "vllm cannot be imported" in line
    assert "status -11" in line


def test_the_process_of_the_probes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What fails in a probe is told; an engine that cannot be imported, or ends the process, is one error."""

    def broken() -> bool:
        raise ImportError("no such place")

    def entry(what: str, **different: Any) -> Touch:
        return Touch(what=what, since="0.1", until="", detected="so", why="so", ends="never", **different)

    touches = (entry("a", probe=lambda: True), entry("b", probe=lambda: False, needed=True), entry("c", probe=broken))
    adapter = replace(installed(VLLM), ledger=lambda: touches)
    monkeypatch.setattr(probes, "engines", lambda: {"vllm": adapter})
    probes.main("vllm", str(tmp_path / "answer.json"))
    verdicts = [entry["verdict"] for entry in json.loads((tmp_path / "answer.json").read_text())]
    assert verdicts == ["here", "not here", "failed: ImportError: no such place"]

    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise OSError('a library is missing')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(probes.ProbeError, match="status 1, OSError: a library is missing"):
        probes.probe("vllm")
    (tmp_path / "vllm" / "__init__.py").write_text("import os; os.abort()")
    with pytest.raises(probes.ProbeError, match="status -6"):
        probes.probe("vllm")


# What is logged, and the usual mistakes


def test_what_each_process_would_log() -> None:
    def lines(**environment: str) -> list[tuple[str, str]]:
        return [(told["when"], told["line"]) for told in report_of(environment=environment).logs]

    asked = "only with `--attention-backend CUSTOM`"
    said = f"taut INFO [PROCESS pid=NUMBER] taut {taut.__version__} serves {{}} attention in vLLM {taut.__version__}: "
    end = "kernels reference, tile table none"
    expected = [(f"{kind}, {asked}", said.format(kind) + end) for kind in ("dense", "MLA")]
    assert lines() == expected
    assert [when for when, _ in lines(TAUT_ATTENTION="auto")] == [
        "dense, TAUT_ATTENTION=auto",
        "MLA, TAUT_ATTENTION=auto",
    ]
    assert {line for _, line in lines(TAUT_LOG="warning")} == {""}
    ((_, off),) = lines(TAUT_ATTENTION="off")
    assert "nothing is registered" in off
    (only,) = report_of(model=DEEPSEEK).logs
    assert only["when"].startswith("MLA")


def test_the_line_is_the_one_that_is_logged() -> None:
    from taut.engine_plugins import logs

    record = logging.LogRecord("taut", logging.INFO, "", 0, "words", None, None)
    record.processName, record.process = "PROCESS", 7
    assert logging.Formatter(logs.FORMAT).format(record).replace("=7", "=NUMBER") == look._as_logged("words")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("TUAT_ATTENTION", "TAUT_ATTENTION"),
        ("taut_log", "TAUT_LOG"),
        ("TAUTKERNELS", "TAUT_KERNELS"),
        ("VLLM_PLUGINS", None),
        ("PATH", None),
    ],
)
def test_a_slip_in_the_prefix_is_noticed(name: str, meant: str | None) -> None:
    said = [line for line in notes(report_of(environment={name: "x"})) if f"{name} is set" in line]
    assert [meant in line for line in said if meant] == [True] * bool(meant)
    assert bool(said) is bool(meant)


@pytest.mark.parametrize(
    ("releases", "says", "advice"),
    [(("98.0", "99.0"), "it is older", "update vllm"), (("0.0.1", "0.0.2"), "it is newer", "update taut")],
)
def test_older_and_newer_engines(
    monkeypatch: pytest.MonkeyPatch, releases: tuple[str, str], says: str, advice: str
) -> None:
    adapters(monkeypatch, installed(VLLM, releases=releases))
    (line,) = [line for line in notes(report_of()) if "for which taut" in line]
    assert says in line
    assert advice in line


def test_the_advice_for_a_filter_can_be_pasted() -> None:
    (line,) = wrong(report_of(environment={"VLLM_PLUGINS": "other, more"}))
    assert "export VLLM_PLUGINS=other,more,taut" in line


def test_the_password_of_an_address_is_not_shown() -> None:
    report = report_of(environment={"TAUT_TABLE": "https://me:secret@somewhere/table.json"})
    assert "secret" not in as_json(report)


def test_our_entry_points_are_told() -> None:
    (point,) = [
        point for point in report_of().entry_points if (point["group"], point["name"]) == (VLLM.plugin_group, "taut")
    ]
    assert (point["loads"], point["package"]) == ("yes", f"taut-attention {taut.__version__}")


def test_a_plugin_is_asked_once() -> None:
    asked = []

    class Plugin:
        @hookimpl
        def taut_kernels(self) -> list[KernelProvider]:
            asked.append(1)
            return [provider("mine")]

    registry = default_registry([])
    registry.plugins.register(Plugin(), name="plugin")
    assert "mine" in {one["name"] for one in report_of(kernels=registry).providers}
    assert asked == [1]
