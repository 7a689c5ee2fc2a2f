"""The timer of a tuning: each tile compiled in a process of its own, its numbers checked, then timed on the GPU.

Compiling takes seconds and needs no GPU time, timing must be alone on the GPU: so other processes compile ahead,
without a launch, into Triton's cache on the disk, and this one checks and times what they have found to fit.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import math
import multiprocessing
import signal
import tempfile
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from taut.benchmarks import BenchmarkError
from taut.benchmarks.kernels import TOLERANCE
from taut.benchmarks.tasks import TASKS, Paged, Task, relative_error
from taut.benchmarks.timing import cache_bytes, copies_past_cache, microseconds
from taut.benchmarks.tuning.search import Outcome
from taut.benchmarks.tuning.writing import as_json, only
from taut.common_kernels import reference
from taut.common_kernels.providers import registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from taut.benchmarks.operations import Shape
    from taut.benchmarks.tasks import Call
    from taut.benchmarks.tuning.problems import Tuned
    from taut.common_kernels.kernels import Kernels
    from taut.common_kernels.tiles import Tile, TileTable
    from taut.common_kernels.workspace import DeviceFacts

# Modules of the kernels that an operation with a tile launches, and their names there: a provider's own, and what all
# of them share.
OWN = {
    "mla_decode.{provider}_launch": ("taut_mla_decode",),
    "paged_attention.{provider}_launch": ("taut_decode", "taut_prefill"),
}
SHARED = {"merge.triton_launch": ("taut_merge",), "schedule.triton_launch": ("taut_schedule",)}
# Modules that ask what the device is; those of Gluon ask the portable ones too.
ASKING = ("workspace", "paged_attention.triton_launch", *OWN)
# Of the batch of the check. As many rows, and room for as many tokens, as divide by 16: Triton compiles for that.
CHECKED_LENGTHS = (0, 1, 17, 640, 2500, 63, 4096, 16, 15, 0, 64, 1023, 33, 2, 3000, 128)
CHECKED_TOKENS = 1000  # of each row where keys lie side by side
SECONDS = 240  # that the compiler may take for one tile
MILLISECONDS = 5  # of calls in one graph: many tiles are timed


class MisfitError(RuntimeError):
    """A kernel needs more shared memory than a program may use."""


@dataclass
class CompileOnly:
    """Stands in for a jitted kernel: compiles what would be launched, and holds its shared memory against the limit.

    Args:
        kernel: the jitted kernel.
        shared_memory: bytes that a program may use.
    """

    kernel: Any
    shared_memory: int

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def compile_it(*arguments: Any, **named: Any) -> None:
            compiled = self.kernel.warmup(*arguments, grid=grid, **named)
            needs = compiled.metadata.shared
            if needs > self.shared_memory:
                raise MisfitError(f"needs {needs} bytes of shared memory, {self.shared_memory} are there")

        return compile_it


def kernels_of(provider: str) -> Kernels:
    """A provider's operations, whatever the device: whether it can serve was asked before."""
    return next(one for one in registry().providers if one.name == provider).kernels


@contextmanager
def compiling_only(provider: str, facts: DeviceFacts) -> Iterator[None]:
    """Within it a provider's kernels are compiled for a device of these facts, and nothing is launched."""

    def module_of(name: str) -> Any:
        return importlib.import_module(f"taut.common_kernels.{name.format(provider=provider)}")

    with ExitStack() as undo:

        def put(module: Any, name: str, value: Any) -> None:
            undo.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)

        for place, names in (OWN | SHARED).items():
            for name in names:
                kernel = getattr(module_of(place), name)
                put(module_of(place), name, CompileOnly(kernel, facts.shared_memory))
        for place in ASKING:
            put(module_of(place), "device_facts", lambda _device: facts)
        yield


@contextmanager
def without_reproducers() -> Iterator[None]:
    """Within it Triton may print what it likes: the whole program, where its assembler refused it or was interrupted.

    The table and the journal say in a line why a tile failed, and the progress is shown on the standard error.
    """
    with redirect_stdout(io.StringIO()):
        yield


@dataclass(frozen=True)
class Job:
    """What another process compiles.

    Args:
        provider: whose kernels.
        operation: as `operations` calls it.
        shapes: at which shapes.
        table: a file with only this tile.
        facts: of the device.
    """

    provider: str
    operation: str
    shapes: tuple[Shape, ...]
    table: str
    facts: DeviceFacts


def compile_tile(job: Job) -> Outcome:
    """Compile everything that a tile needs at every shape, on tensors without memory: "timed" if all of it fits."""
    try:
        kernels = kernels_of(job.provider)
        with compiling_only(job.provider, job.facts), without_reproducers():
            for shape in job.shapes:
                task = TASKS[job.operation](shape, "meta")
                task.call(kernels, task.workspace(kernels, job.table))()
    except MisfitError as error:
        return Outcome("does not fit", why=str(error))
    except Exception as error:  # whatever the compiler says of an odd tile
        return Outcome("failed", why=_in_a_line(error))
    return Outcome("timed")


def _leave_interruptions_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Session:
    """What the timers of all questions share; a context, whose end ends its processes and takes its files away.

    Args:
        base: today's table.
        facts: of the device.
        device: "cuda:0".
        jobs: processes that compile; 0 to compile where it is timed.
        time: microseconds of one of several calls that take turns.
    """

    def __init__(
        self,
        base: TileTable,
        facts: DeviceFacts,
        device: str,
        jobs: int,
        time: Callable[[Sequence[Call]], float] | None = None,
    ) -> None:
        self.base, self.facts, self.device, self.jobs = base, facts, device, jobs
        self.time = time or (lambda calls: microseconds(calls, milliseconds=MILLISECONDS))
        self._undo = ExitStack()

    def __enter__(self) -> Callable[[Tuned], Measurer]:
        self.folder = Path(self._undo.enter_context(tempfile.TemporaryDirectory()))
        return lambda question: Measurer(question, self)

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    @cached_property
    def pool(self) -> Any:
        """The processes that compile, begun when they are first needed."""
        context = multiprocessing.get_context("spawn")
        return self._undo.enter_context(context.Pool(self.jobs, _leave_interruptions_to_the_parent))

    def compiled(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        """What `compile_tile` says of each, in order, while the later ones are still compiled."""
        if not self.jobs:
            yield from (Outcome("timed") for _ in jobs)
            return
        for answer in [self.pool.apply_async(compile_tile, (job,)) for job in jobs]:
            yield self._answer(answer)

    def _answer(self, answer: Any) -> Outcome:
        try:
            return cast("Outcome", answer.get(SECONDS))
        except multiprocessing.TimeoutError:  # or a compiler that ended its process
            return Outcome("failed", why=f"the compiler gave no answer within {SECONDS} seconds")


class Measurer:
    """The timer of one question.

    Args:
        question: what is tuned.
        session: where.
    """

    def __init__(self, question: Tuned, session: Session) -> None:
        self.question, self.session = question, session
        self.kernels = kernels_of(question.provider)
        self._rows: dict[int, list[Task]] = {}
        self._check: tuple[Task, Tensor] | None = None
        self._broken = ""

    def __call__(self, tiles: Sequence[Tile], limits: Sequence[float] | None) -> Iterator[Outcome]:
        """The outcome of each tile, in order; see `search`."""
        tables = [self._table(tile) for tile in tiles]
        one, shapes = self.question, (*self.question.shapes, checked_shape(self.question))
        jobs = [Job(one.provider, one.operation, shapes, table, self.session.facts) for table in tables]
        for table, fits in zip(tables, self.session.compiled(jobs), strict=True):
            yield self._measure(table, limits) if fits.status == "timed" else fits

    def _table(self, tile: Tile) -> str:
        """A file that answers the question with this tile; each has a name of its own, since tables are remembered."""
        text = as_json(only(self.session.base, self.question.table_operation, tile))
        path = self.session.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
        path.write_text(text)
        return str(path)

    def _measure(self, table: str, limits: Sequence[float] | None) -> Outcome:
        from triton.runtime.errors import OutOfResources

        if self._broken:
            raise BenchmarkError(
                f"the GPU takes no more work from this process after a tile that failed ({self._broken}): "
                "run the same command again, it goes on after that tile"
            )
        try:
            with without_reproducers():
                return self._checked_and_timed(table, limits)
        except OutOfResources as misfit:
            return Outcome("does not fit", why=_in_a_line(misfit))
        except torch.OutOfMemoryError:
            raise BenchmarkError(
                f"the GPU has too little memory for {self.question.name}: give smaller shapes "
                "with --decode and --prefill, or end the other programs on it"
            ) from None
        except Exception as failed:  # what an odd tile makes of a kernel
            self._broken = self._still_works()
            return Outcome("failed", why=_in_a_line(failed))

    def _checked_and_timed(self, table: str, limits: Sequence[float] | None) -> Outcome:
        error = self._error(table)
        if error > TOLERANCE:
            return Outcome("wrong", why=f"relative error {error:.2g} against the reference")
        us: list[float] = []
        for number in range(len(self.question.shapes)):
            us.append(self.session.time(self._calls(number, table)))
            if limits is not None and us[-1] > limits[number]:
                return Outcome("slower", tuple(us))
        return Outcome("timed", tuple(us))

    def _still_works(self) -> str:
        """Why the device takes no more work from this process; "" if it does."""
        try:
            if self.session.device != "cpu":
                torch.cuda.synchronize()
        except RuntimeError as error:
            return _in_a_line(error)
        return ""

    def _calls(self, number: int, table: str) -> list[Call]:
        """One call for each set of tensors of a shape; more sets than the L2 cache holds."""
        if number not in self._rows:
            shape = self.question.shapes[number]
            make = TASKS[self.question.operation]
            first = make(shape, self.session.device)
            held = sum(t.nbytes for t in vars(first).values() if isinstance(t, torch.Tensor))
            copies = copies_past_cache(held, cache_bytes()) if self.session.device != "cpu" else 1
            self._rows[number] = [first, *(make(shape, self.session.device) for _ in range(copies - 1))]
        tasks = self._rows[number]
        workspace = tasks[0].workspace(self.kernels, table)  # all of them have the same lengths
        return [task.call(self.kernels, workspace) for task in tasks]

    def _error(self, table: str) -> float:
        """The relative error on a ragged batch whose unused slots are poison."""
        if self._check is None:
            task = checked_task(self.question, self.session.device)
            kernels = cast("Kernels", reference)
            self._check = task, task.result(task.call(kernels, task.workspace(kernels)))
        task, right = self._check
        return relative_error(task.result(task.call(self.kernels, task.workspace(self.kernels, table))), right)


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


def _in_a_line(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 200 else text[:197] + "..."
