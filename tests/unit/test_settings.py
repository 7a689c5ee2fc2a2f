"""The settings: every variable, every mistake, and where each value came from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from taut.engine_plugins import settings as module
from taut.engine_plugins.settings import Settings, SettingsError, read_settings, settings, variable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def fresh_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in Settings.model_fields:
        monkeypatch.delenv(variable(name), raising=False)
    settings.cache_clear()
    yield
    settings.cache_clear()


def test_unset_is_the_default() -> None:
    read = read_settings({"PATH": "/bin", "TAUTOLOGY": "x"})
    assert (read.attention, read.kernels, read.table, read.log) == (None, "auto", None, "info")
    assert set(read.sources().values()) == {"default"}


@pytest.mark.parametrize("value", ["auto", "on", "off"])
def test_attention(value: str) -> None:
    assert read_settings({"TAUT_ATTENTION": value}).attention == value


@pytest.mark.parametrize("value", ["debug", "info", "warning", "error"])
def test_log(value: str) -> None:
    assert read_settings({"TAUT_LOG": value}).log == value


def test_kernels_takes_any_name() -> None:
    assert read_settings({"TAUT_KERNELS": "mine"}).kernels == "mine"  # whether there is one, the registry knows


def test_table_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    file.write_text("{}")
    assert read_settings({"TAUT_TABLE": str(file)}).table == file


@pytest.mark.parametrize("name", list(Settings.model_fields))
def test_empty_is_unset(name: str) -> None:
    read = read_settings({variable(name): ""})
    assert read == Settings()
    assert read.sources()[name] == "default"


def test_sources() -> None:
    read = read_settings({"TAUT_LOG": "info", "TAUT_ATTENTION": "on"})
    assert read.sources() == {
        "attention": "TAUT_ATTENTION",
        "kernels": "default",
        "table": "default",
        "log": "TAUT_LOG",  # the default's value, but somebody wrote it
    }


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"TAUT_ATTENTON": "on"}, ("TAUT_ATTENTON", "did you mean TAUT_ATTENTION?")),
        ({"TAUT_KERNEL": "reference"}, ("did you mean TAUT_KERNELS?",)),
        ({"TAUT_XYZZY": ""}, ("TAUT_XYZZY is not a setting", "TAUT_ATTENTION, TAUT_KERNELS, TAUT_TABLE, TAUT_LOG")),
        ({"TAUT_ATTENTION": "onn"}, ("TAUT_ATTENTION=onn", "did you mean on?", "auto, on, off")),
        ({"TAUT_ATTENTION": "AUTO"}, ("did you mean auto?",)),
        ({"TAUT_ATTENTION": "1"}, ("TAUT_ATTENTION=1", "There are auto, on, off")),
        ({"TAUT_LOG": "warn"}, ("did you mean warning?",)),
        ({"TAUT_TABLE": "no/such/file.json"}, ("TAUT_TABLE=no/such/file.json", "file")),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_write(given: dict[str, str], says: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError) as error:
        read_settings(given)
    message = str(error.value)
    assert "\n" not in message
    for part in says:
        assert part in message


def test_nothing_near_gives_no_hint() -> None:
    with pytest.raises(SettingsError) as error:
        read_settings({"TAUT_ATTENTION": "1"})
    assert "did you mean" not in str(error.value)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        read_settings({}).log = "debug"


@pytest.mark.usefixtures("fresh_settings")
def test_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAUT_LOG", "error")
    first = settings()
    monkeypatch.setenv("TAUT_LOG", "debug")
    assert settings() is first
    assert first.log == "error"


def test_the_module_names_every_variable() -> None:
    assert module.__doc__ is not None
    for name in Settings.model_fields:
        assert variable(name) in module.__doc__
