"""The timer of a tuning: each tile compiled in a process of its own, its numbers checked, then timed on the GPU.

Compiling takes seconds and needs no GPU time, timing must be alone on the GPU: so other processes compile ahead,
without a launch, into Triton's cache on the disk, and this one checks and times what they have found to fit.
"""

from __future__ import annotations

import hashlib
import io
import math
import multiprocessing
import signal
import sys
import tempfile
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from taut.benchmarks import BenchmarkError
from taut.benchmarks.kernels import TOLERANCE, in_a_line
from taut.benchmarks.tasks import TASKS, Paged, Task, relative_error
from taut.benchmarks.timing import cache_bytes, copies_past_cache, microseconds
from taut.benchmarks.tuning.search import Outcome
from taut.benchmarks.tuning.writing import as_json, only
from taut.common_kernels.providers import registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from taut.benchmarks.operations import Shape
    from taut.benchmarks.tasks import Call
    from taut.benchmarks.tuning.problems import Tuned
    from taut.benchmarks.tuning.search import Timer
    from taut.common_kernels.kernels import Kernels
    from taut.common_kernels.tiles import Tile, TileTable
    from taut.common_kernels.workspace import DeviceFacts

# Of the batch of the check. As many rows, and room for as many tokens, as divide by 16: Triton compiles for that.
CHECKED_LENGTHS = (0, 1, 17, 640, 2500, 63, 4096, 16, 15, 0, 64, 1023, 33, 2, 3000, 128)
CHECKED_TOKENS = 1000  # of each row where keys lie side by side
SECONDS = 240  # that the compiler may take for one tile
MILLISECONDS = 5  # of calls in one graph: many tiles are timed


class MisfitError(RuntimeError):
    """A kernel needs more shared memory than a program may use."""


def kernels_of(provider: str) -> Kernels:
    """A provider's operations, whatever the device: whether it can serve was asked before."""
    return next(one for one in registry().providers if one.name == provider).kernels


@contextmanager
def compiling_only(facts: DeviceFacts) -> Iterator[None]:
    """Within it what would be launched is compiled for a device of these facts and held against its shared memory.

    Only for kernels that have been imported by then.
    """
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def compile_it(kernel: Any, *arguments: Any, warmup: bool, **named: Any) -> None:  # noqa: ARG001
        needs = launch(kernel, *arguments, warmup=True, **named).metadata.shared
        if needs > facts.shared_memory:
            raise MisfitError(f"needs {needs} bytes of shared memory, {facts.shared_memory} are there")

    with ExitStack() as undo:
        undo.enter_context(patch.object(JITFunction, "run", compile_it))
        for name, module in list(sys.modules.items()):
            if name.startswith("taut.common_kernels.") and hasattr(module, "device_facts"):
                undo.enter_context(patch.object(module, "device_facts", lambda _device: facts))
        yield


def without_reproducers() -> redirect_stdout[io.StringIO]:
    """Within it Triton may print the whole program that its assembler refused; an outcome says why in a line."""
    return redirect_stdout(io.StringIO())


def compile_tile(question: Tuned, table: str, facts: DeviceFacts) -> Outcome:
    """Compile everything that a tile needs at every shape, on tensors without memory: "timed" if all of it fits.

    Args:
        question: what is tuned.
        table: a file with only this tile.
        facts: of the device.
    """
    try:
        kernels = kernels_of(question.provider)
        with compiling_only(facts), without_reproducers():
            for shape in (*question.shapes, checked_shape(question)):
                task = TASKS[question.operation](shape, "meta")
                task.call(kernels, task.workspace(kernels, table))()
    except MisfitError as error:
        return Outcome("does not fit", why=str(error))
    except Exception as error:  # whatever the compiler says of an odd tile
        return Outcome("failed", why=in_a_line(error))
    return Outcome("timed")


def _leave_interruptions_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@dataclass(frozen=True)
class Session:
    """What the timers of all questions share.

    Args:
        base: today's table.
        facts: of the device.
        device: "cuda:0".
        jobs: processes that compile; 0 to compile where it is timed.
        time: microseconds of one of several calls that take turns.
    """

    base: TileTable
    facts: DeviceFacts
    device: str
    jobs: int
    time: Callable[[Sequence[Call]], float] = lambda calls: microseconds(calls, milliseconds=MILLISECONDS)

    @contextmanager
    def timers(self) -> Iterator[Callable[[Tuned], Timer]]:
        """The timer of a question; the end of the context ends the processes and takes the files away."""
        with ExitStack() as undo:
            folder, pool = Path(undo.enter_context(tempfile.TemporaryDirectory())), None
            if self.jobs:
                new = multiprocessing.get_context("spawn").Pool
                pool = undo.enter_context(new(self.jobs, _leave_interruptions_to_the_parent))
            yield lambda question: Measurer(question, self, folder, pool)


class Measurer:
    """The timer of one question.

    Args:
        question: what is tuned.
        session: where.
        folder: for tables.
        pool: the processes that compile; None to compile where it is timed.
    """

    def __init__(self, question: Tuned, session: Session, folder: Path, pool: Any) -> None:
        self.question, self.session, self.folder, self.pool = question, session, folder, pool
        self.kernels = kernels_of(question.provider)
        self._works = True

    def __call__(self, tiles: Sequence[Tile], limits: Sequence[float] | None) -> Iterator[Outcome]:
        """The outcome of each tile, in order; see `search`. None any more when the GPU takes no more work."""
        tables = list(map(self._table, tiles))
        for table, fits in zip(tables, self._compiled(tables), strict=True):
            if not self._works:
                return
            yield self._measure(table, limits) if fits.status == "timed" else fits

    def _table(self, tile: Tile) -> str:
        """A file that answers the question with this tile; each has a name of its own, since tables are remembered."""
        text = as_json(only(self.session.base, self.question.table_operation, tile))
        path = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
        path.write_text(text)
        return str(path)

    def _compiled(self, tables: Sequence[str]) -> Iterator[Outcome]:
        """What `compile_tile` says of each, in order, while the later ones are still compiled."""
        if self.pool is None:
            yield from [Outcome("timed")] * len(tables)
            return
        facts = self.session.facts
        for answer in [self.pool.apply_async(compile_tile, (self.question, table, facts)) for table in tables]:
            answer.wait(SECONDS)
            late = Outcome("failed", why=f"the compiler gave no answer within {SECONDS} seconds")  # or it has crashed
            yield answer.get() if answer.ready() else late

    def _measure(self, table: str, limits: Sequence[float] | None) -> Outcome:
        from triton.runtime.errors import OutOfResources

        try:
            with without_reproducers():
                return self._checked_and_timed(table, limits)
        except OutOfResources as misfit:
            return Outcome("does not fit", why=in_a_line(misfit))
        except torch.OutOfMemoryError:
            raise BenchmarkError(
                "the GPU has too little memory: give smaller shapes with --decode and --prefill, "
                "or end the other programs on it"
            ) from None
        except Exception as failed:  # what an odd tile makes of a kernel
            self._works = self.session.device == "cpu" or _gpu_works()
            return Outcome("failed", why=in_a_line(failed))

    def _checked_and_timed(self, table: str, limits: Sequence[float] | None) -> Outcome:
        task, right = self._check
        error = relative_error(task.result(task.call(self.kernels, task.workspace(self.kernels, table))), right)
        if error > TOLERANCE:
            return Outcome("wrong", why=f"relative error {error:.2g} against the reference")
        us: list[float] = []
        for number, tasks in enumerate(self._tasks):
            workspace = tasks[0].workspace(self.kernels, table)  # all of them have the same lengths
            us.append(self.session.time([task.call(self.kernels, workspace) for task in tasks]))
            if limits is not None and us[-1] > limits[number]:
                return Outcome("slower", tuple(us))
        return Outcome("timed", tuple(us))

    @cached_property
    def _tasks(self) -> list[list[Task]]:
        """Sets of tensors of each shape; more of them than the L2 cache holds."""
        make, device = TASKS[self.question.operation], self.session.device
        tasks = []
        for shape in self.question.shapes:
            first = make(shape, device)
            held = sum(t.nbytes for t in vars(first).values() if isinstance(t, torch.Tensor))
            copies = copies_past_cache(held, cache_bytes()) if device != "cpu" else 1
            tasks.append([first, *(make(shape, device) for _ in range(copies - 1))])
        return tasks

    @cached_property
    def _check(self) -> tuple[Task, Tensor]:
        """A ragged batch whose unused slots are poison, and what the reference makes of it."""
        task, reference = checked_task(self.question, self.session.device), kernels_of("reference")
        return task, task.result(task.call(reference, task.workspace(reference)))


def _gpu_works() -> bool:
    """Whether the GPU still takes work from this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def checked_shape(question: Tuned) -> Shape:
    """The shape of the batch of the check; prefill has more new tokens than decode would take."""
    shape = {**question.shapes[0], "rows": len(CHECKED_LENGTHS), "context": max(CHECKED_LENGTHS)}
    if question.operation == "ragged_prefill":  # all rows alike, for keys that lie side by side have no page table
        return shape | {"queries": 40, "context": CHECKED_TOKENS}
    return shape | ({"queries": 40} if question.operation == "paged_extend" else {})


def checked_task(question: Tuned, device: str) -> Task:
    """A small batch for the check: rows of no token, of one, across pages; NaN in every slot that is not in use."""
    shape = checked_shape(question)
    task = TASKS[question.operation](shape, device)
    if task.step is None:  # keys that lie side by side are all in use
        return task
    task.step.lengths.copy_(torch.tensor(CHECKED_LENGTHS))
    pages, page = task.step.pages.table, shape["page"]
    caches = [task.keys, task.values] if isinstance(task, Paged) else [vars(task)["cache"]]
    positions = torch.arange(pages.shape[1] * page, device=device)
    slots = pages.long()[:, positions // page] * page + positions % page
    unused = slots[positions[None, :] >= task.step.lengths[:, None]]
    for cache in caches:
        poison = torch.full((1,), math.nan, device=device).to(cache.dtype)
        cache.view(-1, *cache.shape[2:])[unused] = poison
    return task
