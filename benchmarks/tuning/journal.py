"""What was measured so far, in a file: a line for each finished tile, so that an interrupted run goes on where it was.

The first line says what the times depend on; a journal of other circumstances is refused. A line is written with one
call and is on the disk when that returns; one that was cut off by a crash is taken back.
"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any

from taut.benchmarks import BenchmarkError
from taut.benchmarks.tuning.search import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from taut.common_kernels.tiles import Tile


class Journal:
    """A journal; made or gone on with.

    Args:
        path: its file.
        circumstances: what the times depend on.

    Raises:
        BenchmarkError: the file is a journal of other circumstances, or none.
    """

    def __init__(self, path: Path, circumstances: Mapping[str, Any]) -> None:
        self.path = path
        self._outcomes: dict[tuple[str, str], Outcome] = {}
        lines = self._whole_lines()
        if lines:
            self._go_on(lines, circumstances)
        else:
            self._append({"circumstances": circumstances})

    def __len__(self) -> int:
        return len(self._outcomes)

    def _whole_lines(self) -> list[str]:
        """The lines that were finished; what follows them is taken back."""
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) != len(content):
            os.truncate(self.path, len(whole))
        return whole.decode(errors="replace").splitlines()

    def _go_on(self, lines: Sequence[str], circumstances: Mapping[str, Any]) -> None:
        try:
            first, *rest = map(json.loads, lines)
            before = first["circumstances"]
            for line in rest:
                outcome = Outcome(line["status"], tuple(line["us"]), line["why"])
                self._outcomes[line["question"], line["tile"]] = outcome
        except (ValueError, KeyError, TypeError):
            raise BenchmarkError(
                f"{self.path} is no journal of `taut tune`: move it away, or give another --output"
            ) from None
        now = json.loads(json.dumps(circumstances))
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                raise BenchmarkError(
                    f"{self.path} was begun with {name} {before.get(name)}, which is now {now.get(name)}: the times "
                    "of both do not go together. Begin anew with --fresh, or give another --output"
                )

    def _append(self, line: Mapping[str, Any]) -> None:
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, (json.dumps(line) + "\n").encode())
            os.fsync(file)
        finally:
            os.close(file)

    def kept(
        self, question: str, measure: Callable[[Sequence[Tile], Sequence[float] | None], Iterator[Outcome]]
    ) -> Callable[[Sequence[Tile], Sequence[float] | None], Iterator[Outcome]]:
        """A timer that answers from the journal where it can, and writes what it had to measure."""

        def through(tiles: Sequence[Tile], limits: Sequence[float] | None) -> Iterator[Outcome]:
            new = [tile for tile in tiles if (question, _name(tile)) not in self._outcomes]
            measured = iter(measure(new, limits) if new else ())
            for tile in tiles:
                key = (question, _name(tile))
                if key not in self._outcomes:
                    outcome = next(measured)
                    self._append({"question": key[0], "tile": key[1], **dataclasses.asdict(outcome)})
                    self._outcomes[key] = outcome
                yield self._outcomes[key]

        return through

    def remove(self) -> None:
        """What is done needs no journal."""
        self.path.unlink(missing_ok=True)


def _name(tile: Tile) -> str:
    return json.dumps(tile, sort_keys=True)
