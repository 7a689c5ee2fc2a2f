"""A grid of shapes through ours and the peers: each row built, checked, timed, and given back before the next.

What times a call and what builds the peers are arguments, so that all but the times can be tested without a GPU.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING

from taut.benchmarks import BenchmarkError
from taut.benchmarks.results import OURS, Row
from taut.common_kernels.providers import ProviderError, registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from taut.benchmarks.operations import Operation, Shape
    from taut.benchmarks.peers import Peer
    from taut.benchmarks.tasks import Call, Task
    from taut.common_kernels.kernels import Kernels

TOLERANCE = 2e-2  # relative error of a whole output in bfloat16, beyond which numbers are called wrong


@dataclass(frozen=True)
class Grid:
    """What to measure.

    Args:
        operation: which.
        shapes: at which shapes.
    """

    operation: Operation
    shapes: Sequence[Shape]


@dataclass(frozen=True)
class Bench:
    """How to measure.

    Args:
        device: "cuda:0", "cpu".
        time: microseconds of one call.
        peers_for: the peers of an operation.
        providers: which of our providers; "auto" for the one that would be chosen.
        table: a tile table in place of the packaged one.
    """

    device: str
    time: Callable[[Call], float]
    peers_for: Callable[[str], Sequence[Peer]]
    providers: Sequence[str] = ("auto",)
    table: str | None = None

    def row(self, operation: Operation, shape: Shape) -> Row:
        """One row. What cannot be measured is left out, with the reason; a GPU that is full is such a reason."""
        from torch import OutOfMemoryError

        gc.collect()  # so that it finds the memory of the row before
        us: dict[str, float] = {}
        errors: dict[str, float] = {}
        left_out: dict[str, str] = {}
        against = ""
        try:
            task, right = self._task(operation, shape)
            against = "" if right is None else "reference"
            for name, build in self._competitors(operation.name, task):
                measured = self._measure(name, build, task, right)
                if isinstance(measured, str):
                    left_out[name] = measured
                    continue
                us[name], error = measured
                if error is not None:
                    errors[name] = error
        except OutOfMemoryError as full:
            left_out["all"] = in_a_line(full)
        return Row(
            operation=operation.name,
            shape=shape,
            bytes=operation.traffic(shape) if operation.traffic else 0,
            flops=operation.work(shape),
            us=us,
            errors=errors,
            against=against,
            left_out=left_out,
        )

    def _measure(
        self, name: str, build: Callable[[], Call], task: Task, right: Tensor | None
    ) -> tuple[float, float | None] | str:
        """Microseconds and relative error of one, or why it cannot be measured."""
        from torch import OutOfMemoryError

        from taut.benchmarks.tasks import relative_error

        try:
            call = build()
            error = None if right is None else relative_error(task.result(call), right)
            return self.time(call), error
        except (ProviderError, OutOfMemoryError) as refused:
            return in_a_line(refused)
        except Exception as failed:  # another project's code, called as one of its releases is
            if name.startswith(OURS):
                raise
            return in_a_line(failed)

    def _task(self, operation: Operation, shape: Shape) -> tuple[Task, Tensor | None]:
        """The tensors of a row, and what every call of it must give; None where there are no numbers to hold."""
        from taut.benchmarks.tasks import TASKS

        task = TASKS[operation.name](shape, self.device)
        if operation.name == "schedule":
            return task, None
        return task, task.result(task.call(registry().choose(task.problem, "reference").provider.kernels))

    def _competitors(self, operation: str, task: Task) -> Iterator[tuple[str, Callable[[], Call]]]:
        """Ours, then the peers: names, and what builds the call."""
        for wanted in self.providers:
            name = OURS if len(self.providers) == 1 else f"{OURS} {wanted}"
            yield name, lambda wanted=wanted: ours(task, wanted, self.table)  # type: ignore[misc]
        for peer in self.peers_for(operation):
            yield peer.name, lambda peer=peer: peer.build(task)  # type: ignore[misc]


def ours(task: Task, wanted: str, table: str | None) -> Call:
    """The call of one of our providers, its step prepared.

    Raises:
        ProviderError: it cannot serve the task.
    """
    kernels: Kernels = registry().choose(task.problem, wanted).provider.kernels
    return task.call(kernels, task.workspace(kernels, table))


def in_a_line(error: Exception) -> str:
    """An error's type and message, cut where they are long."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:297] + "..."


def wrong_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows in which one of ours gives other numbers than the reference."""
    return [row for row in rows if any(n.startswith(OURS) and e > TOLERANCE for n, e in row.errors.items())]


def check_providers(wanted: Sequence[str]) -> None:
    """Refuse names that no provider has.

    Raises:
        BenchmarkError: one is none.
    """
    try:
        for name in wanted:
            registry().check_name(name)
    except ProviderError as error:
        raise asked_with_option(error) from None


def asked_with_option(error: ProviderError) -> BenchmarkError:
    """What a provider's refusal says to somebody who named it with --kernels."""
    return BenchmarkError(str(error).replace("TAUT_KERNELS=", "--kernels "))
