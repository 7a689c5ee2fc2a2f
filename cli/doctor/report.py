"""What the doctor found, as data; docs/doctor.md tells what each field holds."""

from __future__ import annotations

import json
import platform
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import taut

if TYPE_CHECKING:
    from collections.abc import Mapping

    from taut.common_kernels.problem import Problem

Level = Literal["ok", "note", "wrong"]
Row = dict[str, Any]  # a row of a table, and an object of the JSON
SCHEMA = 1  # of the JSON; it rises when a key goes or changes its meaning


@dataclass(frozen=True)
class Finding:
    """One thing the doctor has to say about something, and what to do; "" where nothing is to be done."""

    level: Level
    about: str
    says: str
    advice: str


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


@dataclass
class Report:
    """Everything the doctor found, each field a key of the JSON."""

    schema: int = SCHEMA
    taut: str = taut.__version__
    python: str = field(default_factory=platform.python_version)
    platform: str = field(default_factory=lambda: f"{platform.system()} {platform.machine()}")
    torch: Row | None = None
    triton: str | None = None
    gpus: list[Row] = field(default_factory=list)
    engines: list[Row] = field(default_factory=list)
    entry_points: list[Row] = field(default_factory=list)
    providers: list[Row] = field(default_factory=list)
    settings: list[Row] = field(default_factory=list)
    model: Model | None = None
    logs: list[Row] = field(default_factory=list)
    bridge: list[Row] = field(default_factory=list)
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
    return json.dumps(asdict(report), indent=2, default=sorted)  # a set is sorted
