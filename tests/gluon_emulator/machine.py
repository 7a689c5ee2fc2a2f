"""One program of a launch: its partitions, which run one at a time in a random order, and what is under way meanwhile.

Each partition is a greenlet, which runs until it calls something that synchronises, where `turn` draws who goes on and
which asynchronous operations (`Pending`) end meanwhile. Both are drawn from a seed that also says how: whether one
partition outruns the others, whether copies end at once, at random, or only when nobody can go on.
"""

from __future__ import annotations

import random
import sys
import traceback
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from greenlet import getcurrent, greenlet

from gluon_emulator.values import EmulationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from gluon_emulator.shared import Barrier, Product

HERE = str(Path(__file__).parent)
SPEEDS = (1.0, 1.0, 1.0, 0.02, 30.0)
ENDS = (0.0, 0.0, 0.05, 0.3, 0.9)  # how likely a copy ends at a turn


@dataclass
class Pending:
    """An asynchronous operation that is under way.

    Args:
        what: it is, with the line that issued it.
        end: does what is left of it.
    """

    what: str
    end: Callable[[], None]


@dataclass
class Partition:
    """Some warps of a program, which run one function together.

    Args:
        name: of the function.
        num_warps: how many.
        speed: how likely it goes on, beside the others.
        fenced: when it last fenced its ordinary writes.
        products: its warpgroup products, in order, that it has not waited for.
        copies: its cp.async that it has not asked a barrier to tell of.
        waited: whether the kernel ahead has ended, as far as it knows.
        until: what it waits for; None if for nothing.
        waits_for: the same in words.
        done: whether its function has returned.
        line: where it came last.
        greenlet: what runs it.
    """

    name: str
    num_warps: int
    speed: float = 1.0
    fenced: int = 0
    products: list[Product] = field(default_factory=list)
    copies: list[Pending] = field(default_factory=list)
    waited: bool = False
    until: Callable[[], bool] | None = None
    waits_for: str = ""
    done: bool = False
    line: str = ""
    greenlet: greenlet = field(default_factory=getcurrent)


class Program:
    """One program of the grid.

    Args:
        place: its program ids.
        grid: how many there are.
        num_warps: of the default partition.
        seed: of everything random in it.
        shared_limit: bytes of shared memory it may have.
        dependent: whether it starts before the kernel ahead has ended, and must wait for it.

    Attributes:
        partition: the one that runs.
        pending: what is under way.
        clock: counts stores and fences.
    """

    def __init__(
        self, place: tuple[int, ...], grid: tuple[int, ...], num_warps: int, seed: str, shared_limit: int,
        dependent: bool = False,
    ) -> None:  # fmt: skip
        self.place = place
        self.grid = grid
        self.random = random.Random(seed)
        self.ends = self.random.choice(ENDS)
        self.shared_limit = shared_limit
        self.shared_bytes = 0
        self.clock = 1
        self.partitions = [Partition("the program", num_warps, waited=not dependent)]
        self.pending: list[Pending] = []
        self.barriers: list[Barrier] = []
        self.partition: Partition = self.partitions[0]

    def start(self, what: str, end: Callable[[], None]) -> Pending:
        """Let something be under way until `end` is called, sooner or later."""
        operation = Pending(f"{what} of {kernel_line()}", end)
        self.pending.append(operation)
        return operation

    def turn(self, until: Callable[[], bool] | None = None, waits_for: str = "") -> None:
        """Let others go on, and come back some time after `until` holds.

        Raises:
            EmulationError: it never will.
        """
        me = self.partition
        me.line = kernel_line()
        me.until, me.waits_for = until, waits_for
        while True:
            self.partition = self._next()
            if self.partition is me:
                break
            self.partition.greenlet.switch()
            if self.partition is me:  # or else another one has ended, and who goes on is to be drawn
                break
        me.until = None

    def _next(self) -> Partition:
        """Who goes on; meanwhile copies end."""
        while self.pending and self.random.random() < self.ends:
            self._end_one()
        while True:
            ready = [p for p in self.partitions if not p.done and (p.until is None or p.until())]
            if ready:
                return self.random.choices(ready, [p.speed for p in ready])[0]
            if not self.pending:
                raise EmulationError(self._deadlock())
            self._end_one()

    def _end_one(self) -> None:
        self.pending.pop(self.random.randrange(len(self.pending))).end()

    def _deadlock(self) -> str:
        lines = ["no partition can go on:"]
        lines += [f"  {p.name}, {p.line}: waits for {p.waits_for}" for p in self.partitions if not p.done]
        lines += [f"  {barrier.describe()}" for barrier in self.barriers]
        return "\n".join(lines)

    def specialise(self, functions: list[tuple[str, Callable[[], Any], int]]) -> Any:
        """Run functions at once, the first in the warps of the program; (name, function, warps) each.

        Returns:
            What the first returns.
        """
        if len(self.partitions) > 1:
            raise EmulationError("warp_specialize within a partition, or a second one in a program: not emulated")
        main, *others = functions
        me = self.partitions[0]
        me.name = main[0]
        self.partitions += [Partition(name, warps, waited=me.waited) for name, _, warps in others]
        for partition in self.partitions:
            partition.speed = self.random.choice(SPEEDS)
        for partition, (_, function, _) in zip(self.partitions[1:], others, strict=True):
            partition.greenlet = greenlet(partial(self._run, partition, function))
        self.turn()
        result = main[1]()
        self.check_end(me)
        self.turn(lambda: all(p.done for p in self.partitions[1:]), "the other partitions to end")
        return result

    def _run(self, partition: Partition, function: Callable[[], Any]) -> None:
        try:
            function()
            self.check_end(partition)
        except Exception as error:  # goes on to the first partition, whose own lines say nothing of it
            raise EmulationError(f"{error_text(error)}\n  {partition.name}: {where(error)}") from None
        partition.done = True

    def check_waited(self, doing: str) -> None:
        """The kernel ahead has ended before what its partition does now; it may have written what that reads."""
        if not self.partition.waited:
            raise EmulationError(f"{doing} of {self.partition.name}, which has not waited for the kernel ahead")

    def check_end(self, partition: Partition) -> None:
        """Everything that a partition began has been waited for."""
        left = [f"the product of {product.line}" for product in partition.products]
        left += [copy.what for copy in partition.copies]
        if left:
            raise EmulationError(f"{partition.name} ends without having waited for: {'; '.join(left)}")

    def finish(self) -> None:
        """What must hold when a program ends."""
        self.check_end(self.partitions[0])
        if not any(partition.waited for partition in self.partitions):
            raise EmulationError("the program ends before the kernel ahead: the next one would take both for done")
        if self.pending:
            raise EmulationError(f"the program ends before {self.pending[0].what}")
        for barrier in self.barriers:
            barrier.check_end()


def kernel_line() -> str:
    """The line of the kernel that is running, "file:line in function"."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(HERE):
        frame = frame.f_back
    if frame is None:
        return "?"
    return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno} in {frame.f_code.co_name}"


def where(error: BaseException) -> str:
    """The lines of the kernel that led to an error, the innermost last."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(HERE)]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames))


def error_text(error: BaseException) -> str:
    """What an error says, and its kind where it is none of the emulator's."""
    return str(error) if isinstance(error, EmulationError) else f"{type(error).__name__}: {error}"


_current: list[Program] = []


def program() -> Program:
    """The program that runs."""
    if not _current:
        raise EmulationError("this stands for something on the device: call it within a @gluon.jit function")
    return _current[-1]


def running(one: Program) -> Any:
    """A context in which `one` runs."""

    class _Running:
        def __enter__(self) -> None:
            _current.append(one)

        def __exit__(self, *_: object) -> None:
            _current.pop()

    return _Running()
