"""The choice of a tile from what a timer says. Pure: the same answers give the same choice.

From the tile that the table has today, every neighbour is measured; where several of its numbers would be better
changed by themselves, the tile with all of them changed is measured too; then the same from the best, until no
neighbour is better.

A tile is only chosen if it is slower than today's on no shape at all. So a timer may give a tile up at the first shape
where it is slower, and most tiles cost one short measurement.

The best of many times is often only the luckiest. So what the search found is measured again, in turn with today's
tile, and these times decide.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from statistics import geometric_mean, median
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from taut.benchmarks.tuning.space import Space
    from taut.common_kernels.tiles import Tile

    # From tiles, and the most microseconds on each shape (None: no bound), to their outcomes, in order, one by one.
    Timer = Callable[[Sequence[Tile], Sequence[float] | None], Iterator["Outcome"]]

Status = Literal["timed", "slower", "wrong", "does not fit", "failed"]
SLOWER = 0.01  # by this share a tile may be slower on a shape: what two runs of one tile differ by
GAIN = 0.005  # a tile that is better by less is not better
FINALISTS = 3  # tiles that are measured again, one after another, until one is better once more
TURNS = 3  # of such a tile and today's


@dataclass(frozen=True)
class Outcome:
    """What a timer says of a tile.

    Args:
        status: "timed" on every shape; "slower" than allowed on one, and given up there; "wrong" numbers; "does not
            fit" into shared memory; "failed" to compile or to run.
        us: microseconds on each shape, as far as it came.
        why: what went wrong, in a line.
    """

    status: Status
    us: tuple[float, ...] = ()
    why: str = ""


@dataclass
class Found:
    """What a search found.

    Args:
        start: today's tile.
        before: what it takes.
        best: the tile that is chosen.
        after: what that takes.
        counts: how many tiles ended how.
        complete: whether no neighbour of the best is better; False where the search was cut short.
        finalists: what was better than today's, the best first.
    """

    start: Tile
    before: Outcome
    best: Tile
    after: Outcome
    counts: dict[str, int] = field(default_factory=dict)
    complete: bool = True
    finalists: tuple[Tile, ...] = ()

    @property
    def gain(self) -> float:
        """How many times as fast the best is, the geometric mean over the shapes."""
        return 1 / score(self.after, self.before)


class SearchError(RuntimeError):
    """Today's tile cannot be measured, so that nothing can be held against it."""


def score(outcome: Outcome, before: Outcome) -> float:
    """The geometric mean over the shapes of a tile's time over today's; infinite for one that cannot be chosen."""
    if outcome.status != "timed" or len(outcome.us) != len(before.us):
        return float("inf")
    ratios = [mine / its for mine, its in zip(outcome.us, before.us, strict=True)]
    return geometric_mean(ratios) if max(ratios) <= 1 + SLOWER else float("inf")


def search(
    space: Space,
    given: Mapping[str, int],
    start: Tile,
    measure: Timer,
    most: int = 100,
) -> Found:
    """The best tile that can be reached from `start`.

    Args:
        space: the tiles.
        given: of the question.
        start: today's tile.
        measure: the timer.
        most: tiles to measure; the search is cut short there.

    Raises:
        SearchError: `start` cannot be timed.
    """
    start = space.whole(start)
    (before,) = measure([start], None)
    if before.status != "timed":
        raise SearchError(f"the table's own tile {dict(start)} {before.status}: {before.why}")
    limits = [us * (1 + SLOWER) for us in before.us]
    seen: dict[tuple[int, ...], Outcome] = {_key(start): before}
    tiles: dict[tuple[int, ...], Tile] = {_key(start): start}
    best, complete = start, True

    def try_out(candidates: Sequence[Tile]) -> bool:
        """Measure what is new of these; whether all of them could be."""
        misfits = [tiles[key] for key, outcome in seen.items() if outcome.status == "does not fit"]
        new = {
            _key(tile): tile
            for tile in candidates
            if _key(tile) not in seen and not any(space.needs_more(tile, misfit) for misfit in misfits)
        }
        room = most - len(seen)
        batch = list(new.values())[: max(0, room)]
        for tile, outcome in zip(batch, measure(batch, limits) if batch else (), strict=True):
            seen[_key(tile)], tiles[_key(tile)] = outcome, tile
        return len(batch) == len(new)

    def value(tile: Tile) -> float:
        return score(seen[_key(tile)], before) if _key(tile) in seen else float("inf")

    while complete:
        neighbours = space.neighbours(best, given)
        complete = try_out(neighbours)
        jump = dict(best)
        for axis, values in space.axes.items():
            singles = [{**best, axis: number} for number in values]
            winner = min(singles, key=value)
            if value(winner) < value(best) * (1 - GAIN):
                jump[axis] = winner[axis]
        if space.possible(jump, given):
            complete = try_out([jump]) and complete
        winner = min([best, *neighbours, jump], key=value)
        if value(winner) >= value(best) * (1 - GAIN):
            break
        best = winner
    counts: dict[str, int] = {}
    for outcome in seen.values():
        counts[outcome.status] = counts.get(outcome.status, 0) + 1
    ranked = sorted((tile for tile in tiles.values() if value(tile) < 1 - GAIN), key=value)
    return Found(start, before, best, seen[_key(best)], counts, complete, tuple(ranked[:FINALISTS]))


def settle(found: Found, fresh: Callable[[int], Timer]) -> Found:
    """The choice once more, by times that no tile was chosen by: the first finalist that is better than today's again.

    Args:
        found: what a search found.
        fresh: from a number to a timer whose answers are its own.

    Returns:
        The same with the times that decided, the median of a few turns on each shape; today's tile if none is better.
    """
    for place, tile in enumerate(found.finalists):
        timers = (fresh(place * TURNS + turn) for turn in range(TURNS))
        before, after = zip(*(tuple(timer([found.start, tile], None)) for timer in timers), strict=True)
        usual, its = _median(before), _median(after)
        if score(its, usual) < 1 - GAIN:
            return replace(found, before=usual, best=tile, after=its)
    return replace(found, best=found.start, after=found.before)


def _median(outcomes: Iterable[Outcome]) -> Outcome:
    """The median time on each shape; an outcome without times, if there is one."""
    outcomes = list(outcomes)
    bad = next((one for one in outcomes if one.status != "timed"), None)
    return bad or Outcome("timed", tuple(median(times) for times in zip(*(one.us for one in outcomes), strict=True)))


def _key(tile: Tile) -> tuple[int, ...]:
    return tuple(tile[name] for name in sorted(tile))
