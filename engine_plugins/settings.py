"""The settings, `TAUT_*`: read once from the environment, validated, and each with where it came from.

| variable | values | meaning |
| --- | --- | --- |
| TAUT_ATTENTION | auto, on, off | auto: ours where it serves; on: ours or an error; off: nothing registered |
| TAUT_KERNELS | auto or a provider's name | which kernels serve |
| TAUT_TABLE | a file | a tile table in place of the packaged one |
| TAUT_LOG | debug, info, warning, error | how much is logged |

Unset, and an empty value is unset, nothing about an engine's choice changes.
"""

from __future__ import annotations

import difflib
import os
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, FilePath, ValidationError

if TYPE_CHECKING:
    from collections.abc import Mapping

PREFIX = "TAUT_"


class SettingsError(ValueError):
    """A setting that does not exist or cannot have this value; one line that says what to write instead."""


class Settings(BaseModel):
    """The validated settings; the names are those of the variables without their prefix, in lower case."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    attention: Literal["auto", "on", "off"] | None = Field(
        None, description="when ours is chosen; unset: when asked for"
    )
    kernels: str = Field("auto", min_length=1, description="which kernels serve: auto, or a provider's name")
    table: FilePath | None = Field(None, description="a tile table in place of the packaged one")
    log: Literal["debug", "info", "warning", "error"] = Field("info", description="how much is logged")

    def sources(self) -> dict[str, str]:
        """For each setting where its value came from: "TAUT_LOG" or "default"."""
        return {
            name: variable(name) if name in self.model_fields_set else "default" for name in type(self).model_fields
        }


def variable(name: str) -> str:
    """The environment variable of a setting: "log" -> "TAUT_LOG"."""
    return PREFIX + name.upper()


def read_settings(environment: Mapping[str, str]) -> Settings:
    """The settings of an environment.

    Raises:
        SettingsError: for the first unknown `TAUT_*` name or wrong value, with the nearest right spelling.
    """
    known = [variable(name) for name in Settings.model_fields]
    given: dict[str, Any] = {}
    for name, value in sorted(environment.items()):
        if not name.startswith(PREFIX):
            continue
        if name not in known:
            raise SettingsError(f"{name} is not a setting of taut: {_nearest(name, known)}")
        if value:
            given[name.removeprefix(PREFIX).lower()] = value
    try:
        return Settings(**given)
    except ValidationError as error:
        problem = error.errors()[0]
        setting = str(problem["loc"][0])
        raise SettingsError(_wrong_value(setting, given[setting], problem["msg"])) from None


@cache
def settings() -> Settings:
    """The settings of this process, read once.

    Raises:
        SettingsError: as `read_settings`.
    """
    return read_settings(os.environ)


def _wrong_value(setting: str, value: str, message: str) -> str:
    choices = _choices(setting)
    if not choices:
        return f"{variable(setting)}={value}: {message[0].lower()}{message[1:]}"
    return f"{variable(setting)}={value} is not a value of this setting: {_nearest(value, choices)}"


def _choices(setting: str) -> list[str]:
    """The values a setting may have, as its annotation lists them; empty where any text will do."""
    annotation = Settings.model_fields[setting].annotation
    literals = [annotation, *get_args(annotation)]
    return [value for literal in literals for value in get_args(literal) if isinstance(value, str)]


def _nearest(wrong: str, right: list[str]) -> str:
    folded = {name.lower(): name for name in right}
    near = difflib.get_close_matches(wrong.lower(), folded, n=1, cutoff=0.5)
    hint = f"did you mean {folded[near[0]]}? " if near else ""
    return f"{hint}There {'are' if len(right) > 1 else 'is'} {', '.join(right)}"
