"""What an adapter tells of itself, and what it is told: no engine's name for anything stands here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable
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
class EngineAdapter:
    """An engine that we can speak to, as data.

    Args:
        name: "vllm", "sglang": what people call it.
        module: what is imported under that name.
        distributions: the packages that may bring it, the usual one first.
        plugin_group: the entry-point group through which it loads us.
        plugin_filter: the engine's variable that lists the plugins it may load.
        releases: the releases it was made for, first and last.
        flag: how a user asks for us with the engine's own words.
        serves: what of attention this release of ours serves there: "dense", "MLA"; nothing where it is still to come.
        register: tells the engine of our backends; idempotent, called in each of its processes.
    """

    name: str
    module: str
    distributions: tuple[str, ...]
    plugin_group: str
    plugin_filter: str
    releases: tuple[str, str]
    flag: str
    serves: tuple[str, ...]
    register: Callable[[Selection], None]
