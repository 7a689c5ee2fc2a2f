"""Tile tables: how large a kernel's tiles are on which GPU, as data, looked up by pure functions; nothing is tuned.

A table is a JSON file, one per kind of GPU:

    {"about": "measured on ...",                        for people
     "vendor": "nvidia",                                or "amd"
     "targets": ["sm_90"],                              exact targets; empty for a table that is safe by shared memory
     "shared_memory": 232448,                           bytes that a program may use; every tile fits
     "operations": {"mla_decode": [
         {"when": {"rows": [1, 16]}, "tile": {"keys": 64, "warps": 4}},
         {"when": {},                "tile": {"keys": 32, "warps": 8}}]}}

An entry serves when every fact named in its `when` lies in its range, both ends included; the first that serves is
taken. What the facts and the numbers of a tile mean is said by the operation's own `triton_launch`.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Tile = dict[str, int]


class TileError(ValueError):
    """A tile table that cannot be used; the message says which, where and why."""


@dataclass(frozen=True)
class Entry:
    """One line of a table.

    Args:
        when: for each fact the least and the greatest value that this entry serves.
        tile: the numbers that the operation's kernel is compiled with.
    """

    when: Mapping[str, tuple[int, int]]
    tile: Tile

    def serves(self, facts: Mapping[str, int]) -> bool:
        """Whether every fact that this entry names lies in its range."""
        return all(low <= facts[name] <= high for name, (low, high) in self.when.items())


@dataclass(frozen=True)
class TileTable:
    """The tiles of one kind of GPU; see this module's text for the file.

    Args:
        name: the file it was read from, for messages.
        about: where its numbers come from.
        vendor: "nvidia" or "amd".
        targets: exact targets that it was made for; empty for one that is safe by shared memory.
        shared_memory: bytes that a program may use.
        operations: the entries of each operation, the first that serves is taken.
    """

    name: str
    about: str
    vendor: str
    targets: tuple[str, ...]
    shared_memory: int
    operations: Mapping[str, tuple[Entry, ...]]

    def tile(self, operation: str, facts: Mapping[str, int]) -> Tile:
        """The tile of the first entry that serves.

        Raises:
            TileError: no entry does, or one asks for a fact that the operation does not know.
        """
        try:
            for entry in self.operations.get(operation, ()):
                if entry.serves(facts):
                    return entry.tile
        except KeyError as error:
            raise TileError(
                f"{self.name}: {operation} knows no {error}; it knows {', '.join(sorted(facts))}"
            ) from error
        raise TileError(f"{self.name} has no entry of {operation} for {dict(facts)}")

    def answering(self, operation: str, facts: Mapping[str, int], tile: Tile) -> TileTable:
        """A table that answers these facts with this tile, and everything else as this one."""
        entry = Entry({name: (number, number) for name, number in facts.items()}, tile)
        others = [one for one in self.operations.get(operation, ()) if one.when != entry.when]
        return replace(self, operations={**self.operations, operation: (entry, *others)})

    def as_json(self) -> str:
        """The file of this table, an entry a line."""
        raw = asdict(self)
        del raw["name"]
        return re.sub(r"\n {4,}|\n {3}(?=})", " ", json.dumps(raw, indent=1)) + "\n"


def read_table(path: Path) -> TileTable:
    """Read a table from its file.

    Raises:
        TileError: it is not such a file.
    """
    try:
        raw = json.loads(path.read_text())
        operations = {
            operation: tuple(
                Entry({name: (int(low), int(high)) for name, (low, high) in entry["when"].items()}, dict(entry["tile"]))
                for entry in entries
            )
            for operation, entries in raw["operations"].items()
        }
        return TileTable(
            path.name, raw["about"], raw["vendor"], tuple(raw["targets"]), int(raw["shared_memory"]), operations
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TileError(f"{path} is not a tile table: {type(error).__name__}: {error}") from error


@lru_cache
def built_in_tables() -> tuple[TileTable, ...]:
    """Every table that comes with this package."""
    import taut.configs

    folder = Path(next(iter(taut.configs.__path__)))
    return tuple(read_table(path) for path in sorted(folder.glob("*.json")))


def choose_table(tables: Iterable[TileTable], target: str, shared_memory: int) -> TileTable:
    """The table for a GPU: one made for its target, or else, of the same vendor, the largest that fits.

    Args:
        tables: to choose from.
        target: "sm_90", "gfx942".
        shared_memory: bytes that a program may use there.

    Raises:
        TileError: there is none.
    """
    vendor = "amd" if target.startswith("gfx") else "nvidia"
    fitting = [t for t in tables if t.vendor == vendor and t.shared_memory <= shared_memory]
    exact = [t for t in fitting if target in t.targets]
    safe = [t for t in fitting if not t.targets]
    if not exact and not safe:
        raise TileError(f"no tile table fits {target} with {shared_memory} bytes of shared memory")
    return max(exact or safe, key=lambda table: table.shared_memory)


def table_for(target: str, shared_memory: int, path: str | None = None) -> TileTable:
    """The table for a GPU, or the one in the file at `path` where the user named one (`TAUT_TABLE`)."""
    return read_table(Path(path)) if path else choose_table(built_in_tables(), target, shared_memory)
