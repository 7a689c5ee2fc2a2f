"""What an adapter tells of itself, and what it is told: no engine's name for anything stands here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import taut

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

Mode = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class Selection:
    """What the user chose, as an adapter needs to know it.

    Args:
        mode: when our attention is chosen; None: only when the engine's own flag asks for it.
        kernels: "auto", or the name of the kernel provider that must serve.
        table: a tile table in place of the packaged one.
    """

    mode: Mode | None = None
    kernels: str = "auto"
    table: Path | None = None


@dataclass(frozen=True)
class Touch:
    """One entry of an adapter's ledger: a touch of an engine's internals, or a difference between its releases.

    Args:
        what: the internal or the difference.
        since: the first release that has it.
        until: the last release that has it; "" while it lasts.
        detected: how it is told apart, in words.
        why: what we need it for.
        ends: when the entry can go.
        probe: whether this release has it; imports the engine. None where nothing is asked.
        needed: whether we cannot serve without it.
    """

    what: str
    since: str
    until: str
    detected: str
    why: str
    ends: str
    probe: Callable[[], bool] | None = None
    needed: bool = False

    def verdict(self) -> str:
        """What the probe finds in the engine that is installed: "here", "not here", "failed: ...", or "not probed"."""
        if self.probe is None:
            return "not probed"
        try:
            return "here" if self.probe() else "not here"
        except Exception as error:  # a release that is unlike all others, or an engine that is broken
            return f"failed: {type(error).__name__}: {error}"


@dataclass(frozen=True)
class EngineAdapter:
    """An engine that we can speak to, as data.

    Args:
        name: "vllm", "sglang": what commands and settings call it.
        title: "vLLM", "SGLang": what people call it.
        module: what is imported under that name.
        distributions: the packages that may bring it, the usual one first.
        plugin_group: the entry-point group through which it loads us.
        plugin_filter: the engine's variable that lists the plugins it may load.
        releases: the releases it was made for, first and last.
        flag: how a user asks for us with the engine's own words.
        serves: what of attention this release of ours serves there: "dense", "MLA"; nothing where it is still to come.
        register: tells the engine of our backends; idempotent, called in each of its processes.
        ledger: every touch of the engine's internals; imports nothing of the engine until its probes are asked.
    """

    name: str
    title: str
    module: str
    distributions: tuple[str, ...]
    plugin_group: str
    plugin_filter: str
    releases: tuple[str, str]
    flag: str
    serves: tuple[str, ...]
    register: Callable[[Selection], None]
    ledger: Callable[[], Sequence[Touch]] = tuple


def age_of(version: str, releases: tuple[str, str]) -> Literal["older", "within", "newer"]:
    """How a release of an engine stands to the first and the last of those that an adapter was made for."""
    given, first, last = ([*map(int, re.findall(r"\d+", each.split("+")[0])[:3])] for each in (version, *releases))
    return "older" if given < first else "newer" if given > last else "within"


def serving_line(kind: str, engine: str, version: str, provider: str, table: object | None) -> str:
    """What each process of an engine logs once, when it serves through us.

    Args:
        kind: "dense" or "MLA".
        engine: its title, "vLLM".
        version: of the engine.
        provider: of the kernels.
        table: the tile table that the user named, if any.
    """
    tiles = "none" if provider == "reference" else table or "packaged"
    return (
        f"taut {taut.__version__} serves {kind} attention in {engine} {version}: kernels {provider}, tile table {tiles}"
    )
