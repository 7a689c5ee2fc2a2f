"""The table that comes of a tuning: today's, with an entry for each question before those that it had."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from taut.common_kernels.tiles import Entry, TileTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from taut.benchmarks.tuning.problems import Tuned
    from taut.common_kernels.tiles import Tile


def tuned_table(
    base: TileTable, chosen: Sequence[tuple[Tuned, Tile]], *, target: str, shared_memory: int, measured: str
) -> TileTable:
    """A table that answers these questions with these tiles, and every other as `base` does.

    Args:
        base: today's table.
        chosen: questions and tiles.
        target: of the GPU.
        shared_memory: bytes that a program may use there.
        measured: on what and when, for people.
    """
    operations = dict(base.operations)
    for question, tile in reversed(chosen):
        entry = Entry({name: (number, number) for name, number in question.facts.items()}, tile)
        others = [one for one in operations.get(question.table_operation, ()) if dict(one.when) != dict(entry.when)]
        operations[question.table_operation] = (entry, *others)
    names = "; ".join(question.name for question, _ in chosen)
    about = f"measured on {measured}: {names}. The rest as in {base.name}: {base.about}"
    return replace(base, about=about, targets=(target,), shared_memory=shared_memory, operations=operations)


def as_json(table: TileTable) -> str:
    """A table's file, an entry a line."""
    raw = asdict(table)
    del raw["name"]
    return re.sub(r"\n {4,}|\n {3}(?=})", " ", json.dumps(raw, indent=1)) + "\n"


def only(base: TileTable, table_operation: str, tile: Tile) -> TileTable:
    """A table that always answers one question with one tile."""
    return replace(base, operations={**base.operations, table_operation: (Entry({}, tile),)})
