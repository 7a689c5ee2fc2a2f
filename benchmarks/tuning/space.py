"""The tiles that can be chosen for each operation of a table. What their numbers mean is said by its kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from taut.benchmarks import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from taut.common_kernels.tiles import Tile


@dataclass(frozen=True)
class Space:
    """The tiles of one operation.

    Args:
        axes: the values of each number of a tile, in order.
        coupled: pairs of numbers that are changed together too, since they trade one resource.
        possible: whether a tile makes sense for these facts at all.
        growing: numbers of which more never needs less shared memory.
        usual: numbers that a table may leave out, and what they then are, by the tile.
    """

    axes: Mapping[str, tuple[int, ...]]
    coupled: tuple[tuple[str, str], ...]
    possible: Callable[[Tile, Mapping[str, int]], bool]
    growing: tuple[str, ...] = ("keys", "rows", "stages")
    usual: Callable[[Tile], Tile] = lambda _tile: {}

    def whole(self, tile: Tile) -> Tile:
        """A table's tile with what it may leave out."""
        return {**self.usual(tile), **tile}

    def neighbours(self, tile: Tile, facts: Mapping[str, int]) -> list[Tile]:
        """The tiles that differ in one number, then those that differ in a coupled pair; only possible ones."""
        found = [{**tile, axis: value} for axis, values in self.axes.items() for value in values if value != tile[axis]]
        for one, other in self.coupled:
            found += [
                {**tile, one: a, other: b}
                for a in self.axes[one]
                for b in self.axes[other]
                if a != tile[one] and b != tile[other]
            ]
        return [one for one in found if self.possible(one, facts)]

    def needs_more(self, tile: Tile, other: Tile) -> bool:
        """Whether a tile needs at least the shared memory of another one: alike but for what only grows."""
        alike = all(tile[name] == other[name] for name in tile if name not in self.growing)
        return alike and all(tile[name] >= other[name] for name in self.growing if name in tile)


def _mla_possible(tile: Tile, facts: Mapping[str, int]) -> bool:
    rows = facts["rows"]
    if tile["rows"] > max(16, 1 << (rows - 1).bit_length()):  # rows that nobody fills
        return False
    if tile["transposed"] and tile["spread"]:
        return False
    return tile["keys"] * tile["rows"] >= 32 * tile["warps"]  # a warp without a part of the scores


def _decode_possible(tile: Tile, facts: Mapping[str, int]) -> bool:
    if tile["keys"] % tile["cut"]:
        return False
    return tile["rows"] <= max(16, 1 << (facts["rows"] - 1).bit_length())


def _prefill_possible(tile: Tile, facts: Mapping[str, int]) -> bool:
    return tile["pack"] <= facts["rows"] and tile["rows"] >= 16 * tile["warps"] // 2


SPACES: dict[str, Space] = {
    "mla_decode": Space(
        {
            "keys": (16, 32, 64, 128),
            "rows": (16, 32, 64),
            "transposed": (0, 1),
            "warps": (4, 8),
            "stages": (1, 2, 3, 4),
            "programs": (1, 2),
            "share": (1, 2),
            "spare": (1, 2, 4, 8),
            "apart": (0, 1),
            "spread": (0, 1),
        },
        (("keys", "stages"), ("warps", "programs"), ("rows", "warps")),
        _mla_possible,
        usual=lambda _: {"spread": 0},
    ),
    "paged_decode": Space(
        {
            "rows": (16, 32, 64),
            "keys": (32, 64, 128),
            "cut": (16, 32, 64, 128),
            "warps": (2, 4, 8),
            "stages": (2, 3, 4, 5),
            "programs": (1, 2, 3, 4),
            "share": (1, 2),
            "spare": (2, 4, 8),
        },
        (("keys", "stages"), ("keys", "cut"), ("warps", "programs")),
        _decode_possible,
        usual=lambda tile: {"cut": tile["keys"]},
    ),
    "paged_prefill": Space(
        {
            "rows": (64, 128),
            "keys": (32, 64, 128),
            "pack": (1, 2, 4, 8),
            "warps": (4, 8),
            "stages": (1, 2, 3, 4),
        },
        (("keys", "stages"), ("rows", "warps")),
        _prefill_possible,
    ),
}


def space_of(table_operation: str) -> Space:
    """The tiles of an operation of a table.

    Raises:
        BenchmarkError: it has none here.
    """
    if table_operation not in SPACES:
        raise BenchmarkError(f"the tiles of {table_operation} are not tuned: those of {', '.join(SPACES)} are")
    return SPACES[table_operation]
