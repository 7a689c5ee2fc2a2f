"""What an engine's entry point does, without an engine."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import pytest

from taut.adapters.engine import Selection
from taut.adapters.sglang import selection as sglang_selection
from taut.common_kernels import registry
from taut.common_kernels.providers import ProviderError, default_registry
from taut.engine_plugins import hooks, sglang_plugin, vllm_plugin
from taut.engine_plugins.settings import Settings, SettingsError, settings, variable

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Settings, log and providers as in a process that has not loaded us yet."""
    for name in Settings.model_fields:
        monkeypatch.delenv(variable(name), raising=False)
    settings.cache_clear()
    monkeypatch.setattr(registry, "_registry", default_registry([]))
    log = logging.getLogger("taut")
    before = log.handlers[:], log.level, log.propagate
    log.handlers.clear()
    yield
    settings.cache_clear()
    log.handlers[:], _, log.propagate = before
    log.setLevel(before[1])


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Selection]:
    """What the vLLM adapter is told instead of registering."""
    told: list[Selection] = []
    adapters = {name: replace(adapter, register=told.append) for name, adapter in hooks.engines().items()}
    monkeypatch.setattr(hooks, "engines", lambda: adapters)
    return told


def test_both_engines_are_known_by_their_names() -> None:
    assert list(hooks.engines()) == ["vllm", "sglang"]
    assert all(name == adapter.name for name, adapter in hooks.engines().items())


@pytest.mark.parametrize("mode", [None, "auto", "on"])
def test_the_adapter_is_told_what_was_chosen(monkeypatch: pytest.MonkeyPatch, told: list[Selection], mode: Any) -> None:
    if mode:
        monkeypatch.setenv("TAUT_ATTENTION", mode)
    monkeypatch.setenv("TAUT_KERNELS", "reference")
    vllm_plugin.register()
    assert told == [Selection(mode, "reference", None)]


@pytest.mark.parametrize("plugin", [vllm_plugin, sglang_plugin])
def test_off_registers_nothing_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], told: list[Selection], plugin: Any
) -> None:
    monkeypatch.setenv("TAUT_ATTENTION", "off")
    plugin.register()
    assert told == []
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "TAUT_ATTENTION=off: nothing is registered" in lines[0]


def test_an_unknown_provider_stops_with_the_nearest_name(
    monkeypatch: pytest.MonkeyPatch, told: list[Selection]
) -> None:
    monkeypatch.setenv("TAUT_KERNELS", "referense")
    with pytest.raises(ProviderError, match="did you mean 'reference'"):
        vllm_plugin.register()
    assert told == []


def test_a_misspelt_setting_stops(monkeypatch: pytest.MonkeyPatch, told: list[Selection]) -> None:
    monkeypatch.setenv("TAUT_ATTENTION", "onn")
    with pytest.raises(SettingsError, match="did you mean on"):
        vllm_plugin.register()
    assert told == []


@pytest.mark.parametrize("mode", [None, "auto"])
def test_an_sglang_that_lacks_what_we_need_keeps_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mode: str | None
) -> None:
    """Nothing of SGLang can be imported here, and none of the probes holds: one line says which."""
    monkeypatch.setitem(sys.modules, "sglang", None)
    monkeypatch.setattr(sglang_selection._state, "said", set())
    if mode:
        monkeypatch.setenv("TAUT_ATTENTION", mode)
    sglang_plugin.register()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "SGLang keeps its own attention" in lines[0]
    assert "has no ATTENTION_BACKENDS" in lines[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [("TAUT_ATTENTION", "on"), ("TAUT_ATTENTION", "onn"), ("TAUT_KERNELS", "nobody"), ("TAUT_X", "1")],
)
def test_sglang_is_stopped_by_what_it_cannot_swallow(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setitem(sys.modules, "sglang", None)  # where nothing of it can be imported, `on` cannot take effect
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        sglang_plugin.register()
    line = stopped.value.code
    assert isinstance(line, str)  # Python prints it and exits with status 1
    assert line.startswith("taut: ")
    assert ("this SGLang has no" if value == "on" else name) in line
    assert "\n" not in line


def test_whatever_goes_wrong_stops_an_sglang_that_was_told_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_engine: str) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(hooks, "load_into", broken)
    with pytest.raises(RuntimeError):  # SGLang logs it, and serves without us
        sglang_plugin.register()
    monkeypatch.setenv("TAUT_ATTENTION", "on")
    with pytest.raises(SystemExit, match="cannot take effect: RuntimeError: out of order"):
        sglang_plugin.register()


@pytest.mark.parametrize(("name", "module"), [("vllm", vllm_plugin), ("sglang", sglang_plugin)])
def test_the_entry_points_are_installed_where_the_adapters_say(name: str, module: Any) -> None:
    group = hooks.engines()[name].plugin_group
    (point,) = [point for point in entry_points(group=group) if point.name == "taut"]
    assert point.load() is module.register


IMPORTS = """
import json, sys, time
if sys.argv[1] == "alone":
    sys.modules["vllm"] = sys.modules["sglang"] = sys.modules["torch"] = None  # importing them would raise
start = time.process_time()
import taut, taut.engine_plugins.vllm_plugin, taut.engine_plugins.sglang_plugin, taut.engine_plugins.hooks
taut.engine_plugins.hooks.engines()
seconds = time.process_time() - start
heavy = [name for name in ("torch", "triton", "vllm", "sglang", "numpy") if sys.modules.get(name)]
print(json.dumps({"seconds": seconds, "heavy": heavy}))
"""


def imports(how: str) -> dict[str, Any]:
    run = subprocess.run([sys.executable, "-c", IMPORTS, how], capture_output=True, text=True, check=True)
    return dict(json.loads(run.stdout))


def test_importing_us_imports_nothing_heavy_and_is_quick() -> None:
    tries = [imports("as it is") for _ in range(3)]
    assert tries[0]["heavy"] == []
    # Processor time, the best of three: the first may compile, and a shared machine is slow now and then.
    assert min(one["seconds"] for one in tries) < 0.3


def test_the_plugins_import_without_any_engine() -> None:
    assert imports("alone")["heavy"] == []
