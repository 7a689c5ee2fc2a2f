"""The tiles that can be chosen for each operation of a table, and the choice among them from what a timer says.

Pure: the same answers give the same choice. What the numbers of a tile mean is said by its kernel.

From today's tile one number after another is changed, or a few together that trade one resource. A tile that is better
is kept, and the next changes are made to it, again and again, until no change makes it better. The timer gets all of
them at once, so that it can compile ahead; what follows a better tile is not asked for.

A tile is only chosen if it is slower than today's on no shape at all. So a timer may give a tile up at the first shape
where it is slower, and most tiles cost one short measurement.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import product
from statistics import geometric_mean
from typing import TYPE_CHECKING, Literal

from taut.benchmarks import BenchmarkError
from taut.benchmarks.operations import parse_grid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from taut.common_kernels.tiles import Tile

    # From tiles, and the most microseconds on each shape (None: no bound), to their outcomes, in order, one by one.
    # One that can measure no more ends early.
    Timer = Callable[[Sequence[Tile], Sequence[float] | None], Iterator["Outcome"]]


@dataclass(frozen=True)
class Space:
    """The tiles of one operation."""

    grid: str  # the values of each number of a tile, see `parse_grid`
    coupled: tuple[str, ...]  # numbers that are changed together too, since they trade one resource: "keys stages"
    possible: Callable[[Tile, Mapping[str, int]], bool]  # whether a tile makes sense for what is given, `Tuned.given`

    @property
    def axes(self) -> Mapping[str, Sequence[int]]:
        """The values of each number of a tile."""
        return parse_grid(self.grid)

    def whole(self, tile: Tile) -> Tile:
        """A table's tile with what it may leave out."""
        usual = {"cut": tile.get("keys", 0), "spread": 0}
        return {name: usual[name] for name in self.axes if name not in tile} | tile

    def changed(self, tile: Tile, change: str, given: Mapping[str, int]) -> list[Tile]:
        """The tiles that differ in all numbers of a change and in nothing else; only possible ones."""
        names = change.split()
        values = product(*([value for value in self.axes[name] if value != tile[name]] for name in names))
        found = [tile | dict(zip(names, numbers, strict=True)) for numbers in values]
        return [one for one in found if self.possible(one, given) and not unread(one, given) & {*names}]


def unread(tile: Tile, given: Mapping[str, int]) -> set[str]:
    """The numbers that the kernel does not look at with pages of this size: they are left as they are."""
    page, keys, found = given.get("page", 0), tile["keys"], set[str]()
    whole = page % keys == 0  # no tile crosses pages
    if "cut" in tile and whole and page:  # the schedule counts in whole tiles then, of which a share of halves is one
        found = {"cut", "share"} if tile["cut"] < keys else {"cut"}
    # Kernels of `hopper` have a number of registers for keys that the copy engine brings and one for those of threads.
    if "registers" in tile:
        found |= {"gather_registers"} if whole and given["cache_bytes"] == 2 else {"registers"}
    if "load_registers" in tile:
        boxed = whole or (page >= 16 and keys % page == 0)
        gathered = {"load_registers", "rows"} if "pack" in tile else {"load_registers"}
        found |= {"gather_registers"} if boxed else gathered
    return found


def _filled(rows: int, least: int) -> int:
    """The rows of the largest tile that so many rows fill more than half of, or of the least one that there is."""
    return max(least, 1 << (rows - 1).bit_length())


def _mla_possible(tile: Tile, given: Mapping[str, int]) -> bool:
    if tile["rows"] > _filled(given["rows"], 16) or (tile["transposed"] and tile["spread"]):
        return False
    return tile["keys"] * tile["rows"] >= 32 * tile["warps"]  # a warp without a part of the scores


def _hopper_rows_possible(tile: Tile, given: Mapping[str, int]) -> bool:
    most = min(64, _filled(given["rows"], 8))
    return tile["rows"] in (most, most // 2)  # fewer read the same keys more often still


def _hopper_decode_possible(tile: Tile, given: Mapping[str, int]) -> bool:
    # A part must not begin amid a box, and boxes are pages of up to half a tile. Tables are not asked with the page.
    if tile["cut"] not in (tile["keys"], tile["keys"] // 2) or not _hopper_rows_possible(tile, given):
        return False
    return _hopper_fits(tile, given, tile["rows"] * tile["keys"] * given["element_bytes"], tile["programs"])


def _hopper_prefill_possible(tile: Tile, given: Mapping[str, int]) -> bool:
    # Three warpgroups attend only with heads of 64, and each of their threads needs 160 registers.
    if tile["rows"] == 192 and (given["key_bytes"] > 256 or tile["load_registers"] > 32):
        return False
    return tile["pack"] <= _filled(given["rows"], 1) and _hopper_fits(tile, given)


def _hopper_fits(tile: Tile, given: Mapping[str, int], weights: int = 0, programs: int = 1) -> bool:
    """Whether programs with ring, queries and weights share a multiprocessor; what they need exactly is compiled."""
    needs = weights + tile["stages"] * tile["keys"] * given["key_bytes"] + tile["rows"] * given["key_bytes"] // 2
    return programs * (needs + 1024) <= 233_472  # bytes; 1024 of each program are reserved


SPACES = {
    "mla_decode": Space(
        "keys=16..128 rows=16..64 transposed=0,1 warps=4,8 stages=1,2,3,4 programs=1,2 share=1,2 spare=1..8 apart=0,1 "
        "spread=0,1",
        ("keys stages", "warps programs", "rows warps"),
        _mla_possible,
    ),
    "paged_decode": Space(
        "rows=16..64 keys=32..128 cut=16..128 warps=2..8 stages=2,3,4,5 programs=1,2,3,4 share=1,2 spare=2..8",
        ("keys stages", "keys cut", "warps programs"),
        lambda tile, given: tile["keys"] % tile["cut"] == 0 and tile["rows"] <= _filled(given["rows"], 16),
    ),
    "paged_prefill": Space(
        "rows=64,128 keys=32..128 pack=1..8 warps=4,8 stages=1,2,3,4",
        ("keys stages", "rows warps"),
        lambda tile, given: tile["pack"] <= given["rows"] and tile["rows"] >= 16 * tile["warps"] // 2,
    ),
    # Always 64 keys, two slots and one program: more do not fit.
    "hopper_mla_decode": Space(
        "rows=8..64 registers=208,216,224,232,240 gather_registers=168,184,200,208,216,224 share=1..4 spare=0,2,4,8",
        ("rows registers", "rows gather_registers", "share spare"),
        _hopper_rows_possible,
    ),
    # Not three programs: 85 registers a thread are handed out as 88, of which the multiprocessor has too few for three.
    "hopper_paged_decode": Space(
        "rows=8..64 keys=64,128 cut=32..128 stages=2,3,4,5,6,8 programs=1..4 share=1,2 spare=2..8 "
        "load_registers=24,40,56,72 gather_registers=24,40,56,72",
        ("keys stages", "keys cut", "keys cut stages", "stages programs"),
        _hopper_decode_possible,
    ),
    "hopper_paged_prefill": Space(
        "rows=128,192 keys=64,128 stages=2,3,4,5,6 pack=1..8 load_registers=24,32,40,56,72 "
        "gather_registers=24,40,56,72",
        ("keys stages", "rows load_registers"),
        _hopper_prefill_possible,
    ),
}

SLOWER = 0.01  # by this share a tile may be slower on a shape: what two runs of one tile differ by
GAIN = 0.005  # a tile that is better by less is not better


@dataclass(frozen=True)
class Outcome:
    """What a timer says of a tile.

    It is "timed" on every shape; "slower" than allowed on one, and given up there; gives "wrong" numbers; "does not
    fit" into shared memory; "failed" to compile or to run.
    """

    status: Literal["timed", "slower", "wrong", "does not fit", "failed"]
    us: tuple[float, ...] = ()  # microseconds on each shape, as far as it came
    why: str = ""  # what went wrong, in a line


@dataclass(frozen=True)
class Found:
    """What a search found."""

    start: Tile  # today's
    before: Outcome  # what it takes
    best: Tile  # that is chosen
    after: Outcome  # what that takes
    counts: dict[str, int]  # how many tiles ended how
    cut_short: str  # why tiles that might be better were not measured; "" where no change makes the best better

    @property
    def gain(self) -> float:
        """How many times as fast the best is, the geometric mean over the shapes."""
        return 1 / score(self.after, self.before)


def score(outcome: Outcome, before: Outcome) -> float:
    """The geometric mean over the shapes of a tile's time over today's; infinite for one that cannot be chosen."""
    if outcome.status != "timed":
        return float("inf")
    ratios = [mine / its for mine, its in zip(outcome.us, before.us, strict=True)]
    return geometric_mean(ratios) if max(ratios) <= 1 + SLOWER else float("inf")


def search(space: Space, given: Mapping[str, int], start: Tile, measure: Timer, most: int) -> Found:
    """The best tile that can be reached from `start`, today's, when `most` tiles are measured.

    Raises:
        BenchmarkError: `start` cannot be timed, so that nothing can be held against it.
    """
    best = start = space.whole(start)
    (before,) = measure([start], None)
    if before.status != "timed":
        raise BenchmarkError(f"the table's own tile {dict(start)} {before.status}: {before.why}")
    limits = [us * (1 + SLOWER) for us in before.us]
    after, order, tried = before, [*space.axes, *space.coupled], [(start, before)]
    while True:
        known = [tile for tile, _ in tried]
        changed = [(at, tile) for at, change in enumerate(order) for tile in space.changed(best, change, given)]
        wanted = [(at, tile) for at, tile in changed if tile not in known]
        allowed = wanted[: most - len(tried)]
        outcomes = measure([tile for _, tile in allowed], limits)
        for (at, tile), outcome in zip(allowed, outcomes, strict=False):
            tried.append((tile, outcome))
            if score(outcome, before) < score(after, before) * (1 - GAIN):
                best, after, order = tile, outcome, order[at:] + order[:at]
                break
        else:
            break
    cut_short = "--most allows more" if len(allowed) < len(wanted) else ""
    if len(tried) < len(known) + len(allowed):
        last, outcome = tried[-1]
        cut_short = f"the GPU took no more work after {dict(last)} {outcome.status}: {outcome.why}"
    return Found(start, before, best, after, dict(Counter(it.status for _, it in tried)), cut_short)
