"""The timer of a tuning: each tile compiled in a process of its own, its numbers checked, then timed on the GPU.

Compiling takes seconds and needs no GPU time, timing must be alone on the GPU: so other processes compile ahead,
without a launch, into Triton's cache on the disk, and this one checks and times what they have found to fit.
"""

from __future__ import annotations

import io
import math
import multiprocessing
import signal
import sys
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import cached_property, partial, wraps
from itertools import repeat
from typing import TYPE_CHECKING, Any, ParamSpec
from unittest.mock import patch

import torch

from taut.benchmarks import BenchmarkError
from taut.benchmarks.kernels import TOLERANCE, in_a_line
from taut.benchmarks.tasks import TASKS, Call, Task, relative_error
from taut.benchmarks.timing import cache_bytes, copies_past_cache, microseconds
from taut.benchmarks.tuning.search import Outcome
from taut.common_kernels.providers import registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from taut.benchmarks.operations import Shape
    from taut.benchmarks.tuning.problems import Tuned
    from taut.common_kernels.kernels import Kernels
    from taut.common_kernels.tiles import Tile, TileTable
    from taut.common_kernels.workspace import DeviceFacts

# Of the batch of the check. As many rows, and room for as many tokens, as divide by 16: Triton compiles for that.
CHECKED_LENGTHS = (0, 1, 17, 640, 2500, 63, 4096, 16, 15, 0, 64, 1023, 33, 2, 3000, 128)
CHECKED_TOKENS = 1000  # of each row where keys lie side by side
SECONDS = 240  # that the compiler may take for one tile
TIME = partial(microseconds, milliseconds=5)  # of calls in one graph: many tiles are timed
P = ParamSpec("P")


def kernels_of(provider: str) -> Kernels:
    """A provider's operations, whatever the device: whether it can serve was asked before."""
    return next(one for one in registry().providers if one.name == provider).kernels


@contextmanager
def compiling_only(facts: DeviceFacts) -> Iterator[None]:
    """Within it what would be launched is compiled for a device of these facts and held against its shared memory.

    Only for kernels that have been imported by then.
    """
    from triton.runtime.errors import OutOfResources
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def compile_it(kernel: Any, *arguments: Any, warmup: bool, **named: Any) -> None:  # noqa: ARG001
        needs = launch(kernel, *arguments, warmup=True, **named).metadata.shared
        if needs > facts.shared_memory:
            raise OutOfResources(needs, facts.shared_memory, "shared memory")

    with ExitStack() as undo:
        undo.enter_context(patch.object(JITFunction, "run", compile_it))
        for name, module in list(sys.modules.items()):
            if name.startswith("taut.common_kernels.") and hasattr(module, "device_facts"):
                undo.enter_context(patch.object(module, "device_facts", lambda _device: facts))
        yield


def _errors_are_outcomes(work: Callable[P, Outcome]) -> Callable[P, Outcome]:
    """Work on a tile that prints nothing either: Triton prints the whole program that its assembler refused."""

    @wraps(work)
    def run(*arguments: P.args, **named: P.kwargs) -> Outcome:
        from triton.runtime.errors import OutOfResources

        try:
            with redirect_stdout(io.StringIO()):
                return work(*arguments, **named)
        except OutOfResources as misfit:
            return Outcome("does not fit", why=in_a_line(misfit))
        except torch.OutOfMemoryError:
            raise BenchmarkError(
                "the GPU has too little memory: give smaller shapes with --decode and --prefill, "
                "or end the other programs on it"
            ) from None
        except Exception as failed:  # what an odd tile makes of a compiler or a kernel
            return Outcome("failed", why=in_a_line(failed))

    return run


@_errors_are_outcomes
def compile_tile(question: Tuned, table: str, facts: DeviceFacts) -> Outcome:
    """Compile all that a table's tile needs at every shape, on tensors without memory: "timed" if all of it fits."""
    kernels = kernels_of(question.provider)
    with compiling_only(facts):
        for shape in (*question.shapes, checked_shape(question)):
            task = TASKS[question.operation](shape, "meta")
            task.call(kernels, task.workspace(kernels, table))()
    return Outcome("timed")


def _leave_interruptions_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def compilers(jobs: int) -> AbstractContextManager[Any]:
    """So many processes that compile ahead, which end with the context; None of none."""
    new = multiprocessing.get_context("spawn").Pool
    return new(jobs, _leave_interruptions_to_the_parent) if jobs else nullcontext()


@dataclass
class Measurer:
    """The timer of one question."""

    question: Tuned
    base: TileTable  # today's
    facts: DeviceFacts
    folder: Path  # for the tables of the tiles
    pool: Any  # the processes that compile; None to compile where it is timed
    device: str = "cuda:0"
    time: Callable[[Sequence[Call]], float] = TIME  # microseconds of one of several calls that take turns
    counted: Callable[[], None] = lambda: None  # called for each tile

    def __call__(self, tiles: Sequence[Tile], limits: Sequence[float] | None) -> Iterator[Outcome]:
        """The outcome of each tile, in order; see `search`. The last is that after which the GPU takes no more work."""
        tables = [self._table(tile) for tile in tiles]
        fits = self._compiled(tables) if self.pool else repeat(Outcome("timed"), len(tables))
        for table, outcome in zip(tables, fits, strict=True):
            if outcome.status == "timed":
                outcome = self._checked_and_timed(table, limits)
            self.counted()
            yield outcome
            if outcome.status == "failed" and self.device != "cpu" and not _gpu_works():
                return

    def _table(self, tile: Tile) -> str:
        """A file that answers the question with this tile; each has a name of its own, since tables are remembered."""
        path = self.folder / f"{len(list(self.folder.iterdir()))}.json"
        path.write_text(self.base.answering(self.question.table_operation, self.question.facts, tile).as_json())
        return str(path)

    def _compiled(self, tables: Sequence[str]) -> Iterator[Outcome]:
        """What `compile_tile` says of each, in order, while the later ones are still compiled."""
        for answer in [self.pool.apply_async(compile_tile, (self.question, table, self.facts)) for table in tables]:
            answer.wait(SECONDS)
            late = Outcome("failed", why=f"the compiler gave no answer within {SECONDS} seconds")  # or it has crashed
            yield answer.get() if answer.ready() else late

    @_errors_are_outcomes
    def _checked_and_timed(self, table: str, limits: Sequence[float] | None) -> Outcome:
        kernels, (task, right) = kernels_of(self.question.provider), self._check
        error = relative_error(task.result(task.call(kernels, task.workspace(kernels, table))), right)
        if error > TOLERANCE:
            return Outcome("wrong", why=f"relative error {error:.2g} against the reference")
        us: list[float] = []
        for number, tasks in enumerate(self._tasks):
            workspace = tasks[0].workspace(kernels, table)  # all of them have the same lengths
            us.append(self.time([task.call(kernels, workspace) for task in tasks]))
            if limits is not None and us[-1] > limits[number]:
                return Outcome("slower", tuple(us))
        return Outcome("timed", tuple(us))

    @cached_property
    def _tasks(self) -> list[list[Task]]:
        """Sets of tensors of each shape; more of them than the L2 cache holds."""
        make, tasks = TASKS[self.question.operation], []
        for shape in self.question.shapes:
            first = make(shape, self.device)
            held = sum(t.nbytes for t in vars(first).values() if isinstance(t, torch.Tensor))
            copies = copies_past_cache(held, cache_bytes()) if self.device != "cpu" else 1
            tasks.append([first, *(make(shape, self.device) for _ in range(copies - 1))])
        return tasks

    @cached_property
    def _check(self) -> tuple[Task, Tensor]:
        """A ragged batch whose unused slots are poison, and what the reference makes of it."""
        task, reference = checked_task(self.question, self.device), kernels_of("reference")
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
    shape, paged = {**question.shapes[0], "rows": len(CHECKED_LENGTHS)}, "page" in question.shapes[0]
    shape["context"] = max(CHECKED_LENGTHS) if paged else CHECKED_TOKENS  # without a page table all rows are alike
    return shape if "decode" in question.operation else shape | {"queries": 40}


def checked_task(question: Tuned, device: str) -> Task:
    """A small batch for the check: rows of no token, of one, across pages; NaN in every slot that is not in use."""
    shape = checked_shape(question)
    task = TASKS[question.operation](shape, device)
    if task.step is None:  # keys that lie side by side are all in use
        return task
    task.step.lengths.copy_(torch.tensor(CHECKED_LENGTHS))
    pages, page = task.step.pages.table, shape["page"]
    positions = torch.arange(pages.shape[1] * page, device=device)
    slots = pages.long()[:, positions // page] * page + positions % page
    unused = slots[positions[None, :] >= task.step.lengths[:, None]]
    for cache in (tensor for name, tensor in vars(task).items() if name in ("cache", "keys", "values")):
        poison = torch.full((1,), math.nan, device=device).to(cache.dtype)
        cache.view(-1, *cache.shape[2:])[unused] = poison
    return task
