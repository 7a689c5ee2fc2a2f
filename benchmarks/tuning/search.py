"""The choice of a tile from what a timer says. Pure: the same answers give the same choice.

From today's tile one number after another is changed, or a few together that trade one resource. A tile that is better
is kept, and the next changes are made to it, again and again, until no change makes it better. The timer gets all of
them at once, so that it can compile ahead; what follows a better tile is not asked for.

A tile is only chosen if it is slower than today's on no shape at all. So a timer may give a tile up at the first shape
where it is slower, and most tiles cost one short measurement.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from statistics import geometric_mean
from typing import TYPE_CHECKING, Literal

from taut.benchmarks import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from taut.benchmarks.tuning.space import Space
    from taut.common_kernels.tiles import Tile

    # From tiles, and the most microseconds on each shape (None: no bound), to their outcomes, in order, one by one.
    # One that can measure no more ends early.
    Timer = Callable[[Sequence[Tile], Sequence[float] | None], Iterator["Outcome"]]

SLOWER = 0.01  # by this share a tile may be slower on a shape: what two runs of one tile differ by
GAIN = 0.005  # a tile that is better by less is not better


@dataclass(frozen=True)
class Outcome:
    """What a timer says of a tile.

    Args:
        status: "timed" on every shape; "slower" than allowed on one, and given up there; "wrong" numbers; "does not
            fit" into shared memory; "failed" to compile or to run.
        us: microseconds on each shape, as far as it came.
        why: what went wrong, in a line.
    """

    status: Literal["timed", "slower", "wrong", "does not fit", "failed"]
    us: tuple[float, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        start: today's tile.
        before: what it takes.
        best: the tile that is chosen.
        after: what that takes.
        counts: how many tiles ended how.
        cut_short: why tiles that might be better were not measured; "" where no change makes the best better.
    """

    start: Tile
    before: Outcome
    best: Tile
    after: Outcome
    counts: dict[str, int]
    cut_short: str = ""

    @property
    def gain(self) -> float:
        """How many times as fast the best is, the geometric mean over the shapes."""
        return 1 / score(self.after, self.before)


def score(outcome: Outcome, before: Outcome) -> float:
    """The geometric mean over the shapes of a tile's time over today's; infinite for one that cannot be chosen."""
    if outcome.status != "timed" or len(outcome.us) != len(before.us):
        return float("inf")
    ratios = [mine / its for mine, its in zip(outcome.us, before.us, strict=True)]
    return geometric_mean(ratios) if max(ratios) <= 1 + SLOWER else float("inf")


def search(space: Space, given: Mapping[str, int], start: Tile, measure: Timer, most: int) -> Found:
    """The best tile that can be reached from `start`.

    Args:
        space: the tiles.
        given: of the question.
        start: today's tile.
        measure: the timer.
        most: tiles to measure; the search is cut short there.

    Raises:
        BenchmarkError: `start` cannot be timed, so that nothing can be held against it.
    """
    start = space.whole(start)
    (before,) = measure([start], None)
    if before.status != "timed":
        raise BenchmarkError(f"the table's own tile {dict(start)} {before.status}: {before.why}")
    limits = [us * (1 + SLOWER) for us in before.us]
    tried = [(start, before)]
    best, after, order = start, before, space.changes
    while True:
        known = [tile for tile, _ in tried]
        changed = [(at, tile) for at, names in enumerate(order) for tile in space.changed(best, names, given)]
        wanted = [(at, tile) for at, tile in changed if tile not in known]
        allowed = wanted[: most - len(tried)]
        outcomes = measure([tile for _, tile in allowed], limits) if allowed else iter(())
        for (at, tile), outcome in zip(allowed, outcomes, strict=False):
            tried.append((tile, outcome))
            if score(outcome, before) < score(after, before) * (1 - GAIN):
                best, after, order = tile, outcome, order[at:] + order[:at]
                break
        else:
            break
    last, outcome = tried[-1]
    cut_short = ""
    if len(tried) < len(known) + len(allowed):
        cut_short = f"the GPU took no more work after {dict(last)} {outcome.status}: {outcome.why}"
    elif len(allowed) < len(wanted):
        cut_short = "--most allows more"
    return Found(start, before, best, after, dict(Counter(it.status for _, it in tried)), cut_short)
