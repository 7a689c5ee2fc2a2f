"""What was measured, as data: written as JSON, read back with every key checked, and compared.

Two kinds of files: `kernels` (rows of operations beside their peers) and `engines` (loads through whole engines). The
JSON Schema of both is printed by `taut bench schema`; docs/bench.md tells of every key.
"""

from __future__ import annotations

import json
import math
import os
from statistics import geometric_mean
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from taut.benchmarks import BenchmarkError
from taut.benchmarks.operations import describe, floor_us

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA: Literal[1] = 1  # it rises when a key goes or changes its meaning
OURS = "taut"  # and "taut NAME" where several of our providers were measured


def is_ours(name: str) -> bool:
    """Whether a column of a result is this project's."""
    return name == OURS or name.startswith(f"{OURS} ")


class Data(BaseModel):
    """What all parts of a result have in common: they do not change, and have no other keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class About(Data):
    """What the numbers depend on.

    Args:
        gpu: its name; "CPU" where there is none.
        target: "sm_90".
        date: of the measurement, ISO.
        packages: releases of what was installed, by distribution.
    """

    gpu: str
    target: str
    date: str
    packages: dict[str, str]


class Ceilings(Data):
    """What the device was measured to do in the same process.

    Args:
        bytes_per_second: of a large copy, bytes read plus bytes written.
        flops_per_second: of a large bfloat16 matrix product.
    """

    bytes_per_second: float = Field(gt=0)
    flops_per_second: float = Field(gt=0)


class Row(Data):
    """One operation at one shape.

    Args:
        operation: its name in `operations`.
        shape: numbers by name.
        bytes: that must move; 0 where the operation has no such floor.
        flops: multiplications and additions that the mathematics needs.
        us: median microseconds of one call, ours and each peer's.
        errors: relative error of each against `against`.
        against: whose numbers the errors are held against; "" where nobody's could be.
        left_out: peers that could not be measured here, and why.
    """

    operation: str
    shape: dict[str, int]
    bytes: int
    flops: int
    us: dict[str, float]
    errors: dict[str, float] = {}
    against: str = ""
    left_out: dict[str, str] = {}

    @property
    def name(self) -> str:
        """The operation and its shape, in words."""
        return f"{self.operation} {describe(self.shape)}"

    def ours(self) -> float | None:
        """Our time, the best where several of our providers were measured."""
        return min((us for name, us in self.us.items() if is_ours(name)), default=None)

    def peers(self) -> dict[str, float]:
        """The times of all others."""
        return {name: us for name, us in self.us.items() if not is_ours(name)}


class KernelResults(Data):
    """A run of `taut bench kernels`."""

    kind: Literal["kernels"] = "kernels"
    schema_: Literal[1] = Field(default=SCHEMA, alias="schema")
    about: About
    ceilings: Ceilings
    rows: list[Row]

    def floor(self, row: Row) -> float | None:
        """The least time of a row on this device, in microseconds."""
        return floor_us(row.bytes, row.flops, self.ceilings.bytes_per_second, self.ceilings.flops_per_second)

    def speed_ups(self) -> dict[str, float]:
        """For each peer how many times faster ours is, the geometric mean over the rows that both have."""
        ratios: dict[str, list[float]] = {}
        for row in self.rows:
            if (ours := row.ours()) is not None:
                for peer, us in row.peers().items():
                    ratios.setdefault(peer, []).append(us / ours)
        return {peer: geometric_mean(numbers) for peer, numbers in ratios.items()}


class Spread(Data):
    """A quantity over all requests of a run, in milliseconds."""

    p50: float
    p99: float


class EngineRun(Data):
    """One run of a load; times to the first token and between tokens are None where they were not taken.

    Args:
        seconds: from the first request to the last token.
        warm_up: whether it is the first of its process, which holds compilation and does not count.
        first_token_ms: from the start of the run to each request's first token.
        between_tokens_ms: between one token of a request and its next.
    """

    seconds: float
    warm_up: bool = False
    first_token_ms: Spread | None = None
    between_tokens_ms: Spread | None = None


class Load(Data):
    """Requests that begin together, and the runs of them."""

    requests: int
    tokens_in: int
    tokens_out: int
    runs: list[EngineRun] = Field(min_length=1)

    @property
    def name(self) -> str:
        """As the command takes it: requests x tokens in / tokens out."""
        return f"{self.requests}x{self.tokens_in}/{self.tokens_out}"

    @property
    def counted(self) -> EngineRun:
        """The median run by its seconds, of those that are no warm-up if there are any."""
        counting = [run for run in self.runs if not run.warm_up]
        runs = sorted(counting or self.runs, key=lambda run: run.seconds)
        return runs[(len(runs) - 1) // 2]

    @property
    def tokens_per_second(self) -> float:
        """Tokens generated over the seconds of the run that counts."""
        return self.requests * self.tokens_out / self.counted.seconds


class EngineRow(Data):
    """A backend of an engine.

    Args:
        engine: "vllm", "sglang".
        model: a built-in shape, or the name of the model's folder.
        backend: the engine's name of it, "stock" for its own choice, or "taut".
        options: further arguments that the engine got.
        loads: what it served.
        kv_cache: what the engine said of its cache: backends are alike only where it is.
        serves: the lines by which its processes said that taut serves.
    """

    engine: str
    model: str
    backend: str
    options: dict[str, Any] = {}
    loads: list[Load]
    kv_cache: list[str] = []
    serves: list[str] = []


class EngineResults(Data):
    """A run of `taut bench engines`."""

    kind: Literal["engines"] = "engines"
    schema_: Literal[1] = Field(default=SCHEMA, alias="schema")
    about: About
    rows: list[EngineRow]


Results = KernelResults | EngineResults
_READER: TypeAdapter[Results] = TypeAdapter(Annotated[Results, Field(discriminator="kind")])


def json_schema() -> dict[str, Any]:
    """The JSON Schema of both kinds of files."""
    return _READER.json_schema()


def as_json(results: Results) -> str:
    """The file's content."""
    return json.dumps(results.model_dump(mode="json", by_alias=True), indent=1) + "\n"


def read(path: Path) -> Results:
    """Read a file of results.

    Raises:
        FileNotFoundError: there is none.
        BenchmarkError: it is not one.
    """
    try:
        return _READER.validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise BenchmarkError(
            f"{path} holds no results of `taut bench`: {place}: {first['msg']}. "
            "`taut bench schema` prints what such a file holds"
        ) from None


def write(results: Results, path: Path) -> None:
    """Write a file of results, whole or not at all."""
    write_whole(path, as_json(results))


def write_whole(path: Path, text: str) -> None:
    """Write a text beside its place, and move it there when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


class Compared(Data):
    """One number of two files, side by side.

    Args:
        what: the row.
        unit: "us" (less is better) or "tokens/s" (more is better).
        before: of the first file.
        after: of the second.
    """

    what: str
    unit: Literal["us", "tokens/s"]
    before: float
    after: float

    @property
    def faster(self) -> float:
        """How many times faster the second is; below 1 it is slower."""
        return self.before / self.after if self.unit == "us" else self.after / self.before


def compare(before: Results, after: Results) -> list[Compared]:
    """Ours in two files of one kind and of one GPU, row by row; what only one of them has is left out.

    Raises:
        BenchmarkError: they were measured on different GPUs, are of different kinds, or have no row in common.
    """
    if before.about.gpu != after.about.gpu:
        raise BenchmarkError(
            f"the first was measured on {before.about.gpu}, the second on {after.about.gpu}: times of different GPUs "
            "say nothing of the software. Measure both on one GPU; `taut bench show` prints each by itself"
        )
    if isinstance(before, KernelResults) and isinstance(after, KernelResults):
        pairs = _compare_kernels(before, after)
    elif isinstance(before, EngineResults) and isinstance(after, EngineResults):
        pairs = _compare_engines(before, after)
    else:
        raise BenchmarkError(f"the first holds {before.kind}, the second {after.kind}: compare files of one kind")
    if not pairs:
        raise BenchmarkError("the two files have no row in common: measure the same grid in both")
    return pairs


def _compare_kernels(before: KernelResults, after: KernelResults) -> list[Compared]:
    earlier = {row.name: row.ours() for row in before.rows}
    pairs = []
    for row in after.rows:
        first, second = earlier.get(row.name), row.ours()
        if first is not None and second is not None:
            pairs.append(Compared(what=row.name, unit="us", before=first, after=second))
    return pairs


def _compare_engines(before: EngineResults, after: EngineResults) -> list[Compared]:
    def speeds(results: EngineResults) -> dict[str, float]:
        return {
            f"{row.engine} {row.model} {row.backend} {load.name}": load.tokens_per_second
            for row in results.rows
            for load in row.loads
        }

    earlier, later = speeds(before), speeds(after)
    return [
        Compared(what=what, unit="tokens/s", before=earlier[what], after=speed)
        for what, speed in later.items()
        if what in earlier
    ]


def percentile(numbers: list[float], share: float) -> float:
    """The smallest number that at least this share of them does not exceed (nearest rank); share from 0 to 1."""
    return sorted(numbers)[max(0, math.ceil(share * len(numbers)) - 1)]


def spread(seconds: list[float]) -> Spread | None:
    """p50 and p99 of times in seconds; None of none."""
    if not seconds:
        return None
    return Spread(p50=1e3 * percentile(seconds, 0.5), p99=1e3 * percentile(seconds, 0.99))
