"""What the doctor found, as data; `as_json` gives it to programs."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import taut

if TYPE_CHECKING:
    from taut.common_kernels.problem import Capability, Problem

Level = Literal["ok", "note", "wrong"]
SCHEMA = 1  # of the JSON; it rises when a key goes or changes its meaning


@dataclass(frozen=True)
class Finding:
    """One thing the doctor has to say.

    Args:
        level: "ok", "note" (worth knowing) or "wrong" (to be put right).
        about: what it concerns, in a word or two.
        says: the finding, a sentence.
        advice: what to do; "" where nothing is to be done.
    """

    level: Level
    about: str
    says: str
    advice: str = ""


@dataclass(frozen=True)
class Engine:
    """An engine as it is installed here; `version` is None where it is not, "unknown" where no package tells it."""

    name: str
    distribution: str | None
    version: str | None
    releases: tuple[str, str]
    in_range: bool | None
    flag: str
    serves: tuple[str, ...]
    entry_point: bool
    let_through: bool


@dataclass(frozen=True)
class Torch:
    """torch as it is installed here; `build` is "CUDA 12.9", "HIP 6.4" or "CPU"."""

    version: str
    build: str


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch can use."""

    index: int
    name: str
    target: str
    memory_gib: float


@dataclass(frozen=True)
class Provider:
    """A kernel provider, where it comes from and what it can do."""

    name: str
    priority: int
    summary: str
    origin: str
    requires: tuple[str, ...]
    automatic_on: tuple[str, ...]
    graphs: bool
    capabilities: tuple[Capability, ...]


@dataclass(frozen=True)
class Setting:
    """A setting; `source` is its variable, or "default"."""

    name: str
    value: str | None
    source: str


@dataclass(frozen=True)
class Asked:
    """A problem of the model: who serves it (None: nobody), and the reasons against the others."""

    problem: Problem
    provider: str | None
    reasons: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Model:
    """What a model asks for; `outcomes`: engine -> value of TAUT_ATTENTION -> what would happen there."""

    model_type: str
    architectures: tuple[str, ...]
    kind: Literal["dense", "MLA"]
    target: str
    asked: tuple[Asked, ...]
    outcomes: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Probed:
    """An entry of an adapter's ledger, and what its probe found in the engine that is installed."""

    engine: str
    what: str
    since: str
    until: str
    verdict: str
    needed: bool


@dataclass(frozen=True)
class EntryPoint:
    """An entry point through which an engine finds plugins, or we find kernels.

    Args:
        group: "vllm.general_plugins", "taut".
        name: of the plugin.
        value: the module, and the function in it.
        package: that brings it, with its release; "" where it is not known.
        loads: "yes", "no: REASON", or "not tried" for what is another's affair.
    """

    group: str
    name: str
    value: str
    package: str
    loads: str


@dataclass(frozen=True)
class Logged:
    """The line that each process of an engine logs once on its standard error.

    Args:
        engine: whose processes.
        when: for which attention, and asked for how.
        line: "" where nothing is logged.
    """

    engine: str
    when: str
    line: str


@dataclass
class Report:
    """Everything the doctor found."""

    schema: int = SCHEMA
    taut: str = taut.__version__
    python: str = field(default_factory=platform.python_version)
    platform: str = field(default_factory=lambda: f"{platform.system()} {platform.machine()}")
    torch: Torch | None = None
    triton: str | None = None
    gpus: list[Gpu] = field(default_factory=list)
    engines: list[Engine] = field(default_factory=list)
    entry_points: list[EntryPoint] = field(default_factory=list)
    providers: list[Provider] = field(default_factory=list)
    settings: list[Setting] = field(default_factory=list)
    model: Model | None = None
    logs: list[Logged] = field(default_factory=list)
    bridge: list[Probed] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def wrong(self) -> bool:
        """Whether anything has to be put right."""
        return any(finding.level == "wrong" for finding in self.findings)

    def add(self, level: Level, about: str, says: str, advice: str = "") -> None:
        """Add a finding."""
        self.findings.append(Finding(level, about, tidy(says), tidy(advice)))


def tidy(text: str) -> str:
    """One line, with the home folder as `~` and no password of an address: a report is pasted in public."""
    home = str(Path.home())
    text = re.sub(r"(://)[^/@\s]+@", r"\1", " ".join(text.split()))
    return text.replace(home, "~") if len(home) > 1 else text


def as_json(report: Report) -> str:
    """The report for programs. Its keys are told of in docs/doctor.md and stay."""
    return json.dumps(_plain(report), indent=2)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
