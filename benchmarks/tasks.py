"""An operation at one shape with its tensors, on any device, as calls that can be timed: ours, and by `peers` others'.

A task makes a provider's workspace and prepares it once; a call of it is then one layer's work, which writes the
output. Random numbers everywhere, pages shuffled, outputs poisoned.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from taut.benchmarks.operations import LATENT, ROPE, Shape
from taut.common_kernels.problem import Problem
from taut.common_kernels.step import Mask, PageTable, Step
from taut.common_kernels.targets import target_of

if TYPE_CHECKING:
    from torch import Tensor

    from taut.common_kernels.kernels import Kernels, Workspace

Call = Callable[[], "Tensor"]


class Task(ABC):
    """What all tasks share.

    Args:
        shape: numbers by name, as in `operations`.
        device: "cuda:0", "cpu".

    Attributes:
        dtype: of everything but a quantised cache.
        problem: what a provider is asked for.
        step: of the operations that have one.
        out: what a call writes.
    """

    dtype = torch.bfloat16
    problem: Problem
    step: Step | None = None
    out: Tensor

    def __init__(self, shape: Shape, device: str) -> None:
        self.shape = shape
        self.device = device
        self.target = target_of(torch.device(device))
        self.cache_dtype = torch.float8_e4m3fn if shape.get("float8") else self.dtype

    def workspace(self, kernels: Kernels, table_path: str | None = None) -> Workspace | None:
        """What a provider's calls need, prepared; one serves all tasks of a shape. None where they need none."""
        if self.step is None:
            return None
        tokens = self.step.rows * self.step.max_query
        workspace = kernels.workspace(self.problem, self.step.rows, tokens, self.device, table_path)
        workspace.prepare(self.step)
        return workspace

    def call(self, kernels: Kernels, workspace: Workspace | None = None) -> Call:
        """A provider's work of one layer, which writes `out` and returns it."""

        def run() -> Tensor:
            self._run(kernels, workspace)
            return self.out

        return run

    @abstractmethod
    def _run(self, kernels: Kernels, workspace: Workspace | None) -> None: ...

    def result(self, call: Call) -> Tensor:
        """What a call computes, in a tensor of its own; what stood in the output before is poison."""
        self.out.fill_(math.nan)
        return call().clone()

    @property
    def dtypes(self) -> tuple[str, str]:
        """The names of `dtype` and of the cache's."""
        return str(self.dtype).removeprefix("torch."), str(self.cache_dtype).removeprefix("torch.")

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers."""
        return (torch.randn(*shape, device=self.device) * scale).to(self.dtype)

    def poisoned(self, *shape: int) -> Tensor:
        """An output before the call."""
        return torch.full(shape, math.nan, dtype=self.dtype, device=self.device)

    def _step(self, rows: int, context: int, queries: int, page: int) -> Step:
        pages = math.ceil(context / page)
        table = torch.randperm(rows * pages, device=self.device).view(rows, pages).int()
        lengths = torch.full((rows,), context, device=self.device, dtype=torch.int32)
        starts = torch.arange(rows + 1, device=self.device, dtype=torch.int32) * queries
        return Step(starts, lengths, PageTable(table, page), queries, context)


class MlaDecode(Task):
    """Query [T, heads, 576], its two parts as views; cache [pages, page, 576]; output [T, heads, 512]."""

    step: Step
    scale = 1 / math.sqrt(192)  # of the unabsorbed heads, 128 + 64

    def __init__(self, shape: Shape, device: str) -> None:
        super().__init__(shape, device)
        heads, rows, context, queries, page = (shape[n] for n in ("heads", "rows", "context", "queries", "page"))
        self.step = self._step(rows, context, queries, page)
        self.cache = self.random(rows * math.ceil(context / page), page, LATENT + ROPE, scale=0.5).to(self.cache_dtype)
        self.query = self.random(rows * queries, heads, LATENT + ROPE)
        self.out = self.poisoned(rows * queries, heads, LATENT)
        self.problem = Problem(
            "mla_decode", self.target, *self.dtypes, heads, 1, LATENT + ROPE, LATENT, page, queries,
            frozenset({"causal"}),
        )  # fmt: skip

    def _run(self, kernels: Kernels, workspace: Workspace | None) -> None:
        kernels.mla_decode(
            self.query[..., :LATENT], self.query[..., LATENT:], self.cache, self.step, self.out, scale=self.scale,
            workspace=workspace,
        )  # fmt: skip


class Paged(Task):
    """Query [T, Hq, D]; keys and values [pages, page, Hk, *]; output [T, Hq, V]."""

    step: Step

    def __init__(self, shape: Shape, device: str) -> None:
        super().__init__(shape, device)
        rows, context, queries, page = (shape[n] for n in ("rows", "context", "queries", "page"))
        q_heads, kv_heads, size, value = (shape[n] for n in ("q_heads", "kv_heads", "key", "value"))
        self.step = self._step(rows, context, queries, page)
        pages = rows * math.ceil(context / page)
        self.keys = self.random(pages, page, kv_heads, size).to(self.cache_dtype)
        self.values = self.random(pages, page, kv_heads, value).to(self.cache_dtype)
        self.query = self.random(rows * queries, q_heads, size)
        self.out = self.poisoned(rows * queries, q_heads, value)
        self.scale = size**-0.5
        self.problem = Problem(
            "paged_attention", self.target, *self.dtypes, q_heads, kv_heads, size, value, page, queries,
            frozenset({"causal"}),
        )  # fmt: skip

    def _run(self, kernels: Kernels, workspace: Workspace | None) -> None:
        kernels.paged_attention(
            self.query, self.keys, self.values, self.step, Mask(), self.out, scale=self.scale, workspace=workspace
        )


class Ragged(Task):
    """Query [T, Hq, D]; keys [K, Hk, D] and values [K, Hk, V], row after row; output [T, Hq, V]."""

    def __init__(self, shape: Shape, device: str) -> None:
        super().__init__(shape, device)
        rows, context, queries = (shape[n] for n in ("rows", "context", "queries"))
        q_heads, kv_heads, size, value = (shape[n] for n in ("q_heads", "kv_heads", "key", "value"))
        counted = torch.arange(rows + 1, device=device, dtype=torch.int32)
        self.query_starts, self.key_starts = counted * queries, counted * context
        self.keys = self.random(rows * context, kv_heads, size)
        self.values = self.random(rows * context, kv_heads, value)
        self.query = self.random(rows * queries, q_heads, size)
        self.out = self.poisoned(rows * queries, q_heads, value)
        self.scale = size**-0.5
        self.problem = Problem(
            "ragged_attention", self.target, *self.dtypes, q_heads, kv_heads, size, value, 0, queries,
            frozenset({"causal"}),
        )  # fmt: skip

    def workspace(self, kernels: Kernels, table_path: str | None = None) -> Workspace:
        """It has no schedule, but names the tile table."""
        rows, tokens = self.shape["rows"], len(self.query)
        return kernels.workspace(self.problem, rows, tokens, self.device, table_path)

    def _run(self, kernels: Kernels, workspace: Workspace | None) -> None:
        kernels.ragged_attention(
            self.query, self.keys, self.values, self.query_starts, self.key_starts, Mask(), self.out,
            scale=self.scale, max_query=self.shape["queries"], max_length=self.shape["context"], workspace=workspace,
        )  # fmt: skip


class Store(Task):
    """Keys [T, Hk, D] and values [T, Hk, V] into random slots of a cache four times as large."""

    def __init__(self, shape: Shape, device: str) -> None:
        super().__init__(shape, device)
        tokens, page = shape["tokens"], shape["page"]
        self.first, self.second = self._new()
        pages = math.ceil(4 * tokens / page)
        self.first_cache, self.second_cache = (
            torch.zeros(pages, page, *new.shape[1:], device=device).to(self.cache_dtype)
            for new in (self.first, self.second)
        )
        self.out = self.first_cache
        self.slots = torch.randperm(pages * page, device=device)[:tokens]
        self.one = torch.ones(1, device=device)
        self.scales = {"key_scale": self.one, "value_scale": self.one} if shape["float8"] else {}
        self.problem = self._problem()

    def _new(self) -> tuple[Tensor, Tensor]:
        s = self.shape
        return self.random(s["tokens"], s["kv_heads"], s["key"]), self.random(s["tokens"], s["kv_heads"], s["value"])

    def _problem(self) -> Problem:
        s = self.shape
        return Problem(
            "store_kv",
            self.target,
            *self.dtypes,
            s["kv_heads"],
            s["kv_heads"],
            s["key"],
            s["value"],
            s["page"],
        )

    def result(self, call: Call) -> Tensor:
        """What the slots hold after a call: [T, elements of the first and of the second], float32."""
        caches = (self.first_cache, self.second_cache)
        for cache in caches:
            cache.zero_()
        call()
        return torch.cat([cache.flatten(0, 1)[self.slots].flatten(1).float() for cache in caches], dim=1)

    def _run(self, kernels: Kernels, workspace: Workspace | None) -> None:
        kernels.store_kv(self.first, self.second, self.first_cache, self.second_cache, self.slots, **self.scales)


class StoreMla(Store):
    """Latent [T, 512] and rope [T, 64] into one cache [pages, page, 576]."""

    def __init__(self, shape: Shape, device: str) -> None:
        super().__init__(shape, device)
        pages, page = self.first_cache.shape[:2]
        self.cache = torch.zeros(pages, page, LATENT + ROPE, device=device).to(self.cache_dtype)
        self.first_cache, self.second_cache = self.cache[..., :LATENT], self.cache[..., LATENT:]
        self.out = self.cache

    def _new(self) -> tuple[Tensor, Tensor]:
        return self.random(self.shape["tokens"], LATENT), self.random(self.shape["tokens"], ROPE)

    def _problem(self) -> Problem:
        page = self.shape["page"]
        return Problem("store_mla_kv", self.target, *self.dtypes, 1, 1, LATENT + ROPE, LATENT, page)

    def _run(self, kernels: Kernels, workspace: Workspace | None) -> None:
        scale = {"cache_scale": self.one} if self.shape["float8"] else {}
        kernels.store_mla_kv(self.first, self.second, self.cache, self.slots, **scale)


class Merge(Task):
    """Parts [S, T, H, V] with their LSEs [S, T, H] into [T, H, V]."""

    def __init__(self, shape: Shape, device: str) -> None:
        super().__init__(shape, device)
        parts, tokens, heads, value = (shape[n] for n in ("parts", "tokens", "heads", "value"))
        self.parts = self.random(parts, tokens, heads, value)
        self.lses = torch.randn(parts, tokens, heads, device=device)
        self.out = self.poisoned(tokens, heads, value)
        self.problem = Problem(
            "merge", self.target, *self.dtypes, heads, heads, value, value, 0, features=frozenset({"lse"})
        )

    def _run(self, kernels: Kernels, workspace: Workspace | None) -> None:
        kernels.merge(self.parts, self.lses, self.out)


class Schedule(MlaDecode):
    """The work list of a step of `mla_decode`, which all its layers share."""

    def __init__(self, shape: Shape, device: str) -> None:
        super().__init__({**shape, "queries": 1, "page": 64, "float8": 0}, device)

    def _run(self, kernels: Kernels, workspace: Workspace | None) -> None:
        assert workspace is not None, "the schedule is what a workspace holds"
        workspace.prepare(self.step)


TASKS: dict[str, type[Task]] = {
    "mla_decode": MlaDecode,
    "paged_decode": Paged,
    "paged_extend": Paged,
    "ragged_prefill": Ragged,
    "store_kv": Store,
    "store_mla_kv": StoreMla,
    "merge": Merge,
    "schedule": Schedule,
}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|; infinite where something is no number."""
    error = float((actual.double() - expected.double()).norm() / expected.double().norm())
    return error if math.isfinite(error) else math.inf
