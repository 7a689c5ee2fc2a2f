"""The steps that an engine's adapter runs idle before it serves, so that nothing compiles while it does.

Kernels are compiled for the number of rows and for the most queries of a row that the host promises, both up to the
next power of two, and some for what either is divisible by. They are not compiled for how many queries and keys there
really are. So an idle step has no keys, and one query a row wherever that will do.

| steps | rows | queries of a row | the most queries of a row that are promised |
| --- | --- | --- | --- |
| `mixed_steps` | 1, 2, 4, ... | 1 | each that is given |
| `uniform_steps` | 1, 2, 4, ... | each that is given | the same |
| `prompt_steps` | 1, and as many as there can be | 1 | 1, 2, 4, ..., and where the provider's kernels change |

The adapter runs them through its own layers, whose scales, sinks and strides kernels are compiled for as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from taut.common_kernels.compiling import compile_ahead, powers
from taut.common_kernels.step import PageTable, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


@dataclass(frozen=True)
class IdleStep:
    """A step without keys, as counts.

    Args:
        rows: how many.
        max_query: the most queries of a row that the host promises.
        queries: of each row.
    """

    rows: int
    max_query: int
    queries: int = 1

    @property
    def tokens(self) -> int:
        """Queries of all rows."""
        return self.rows * self.queries

    def step(self, page_size: int, device: torch.device) -> Step:
        """The step itself: every row has length 0 and a page table of one entry, page 0."""
        starts = torch.arange(0, self.tokens + 1, self.queries, dtype=torch.int32, device=device)
        table = torch.zeros(self.rows, 1, dtype=torch.int32, device=device)
        return Step(starts, torch.zeros_like(starts[1:]), PageTable(table, page_size), self.max_query, self.max_query)

    def no_slots(self, device: torch.device) -> torch.Tensor:
        """Where its new keys are stored, [T] int64: nowhere."""
        return torch.full((self.tokens,), -1, dtype=torch.int64, device=device)


def mixed_steps(max_rows: int, promised: Iterable[int]) -> list[IdleStep]:
    """Steps whose rows may differ in their numbers of queries, where kernels are compiled for the number of rows.

    Args:
        max_rows: the most rows of a step.
        promised: every number that the host promises as the most queries of a row.
    """
    return [IdleStep(rows, most) for rows in powers(max_rows) for most in sorted(set(promised))]


def uniform_steps(max_rows: int, queries: Iterable[int]) -> list[IdleStep]:
    """Steps whose rows all have the same number of queries: decode, and the verification of drafts.

    Args:
        max_rows: the most rows of a step.
        queries: every such number.
    """
    return [IdleStep(rows, count, count) for rows in powers(max_rows) for count in sorted(set(queries))]


def prompt_steps(max_rows: int, max_tokens: int, query_limits: Iterable[int]) -> list[IdleStep]:
    """Steps of prompts: one row under each promise, and as many rows as there can be.

    Args:
        max_rows: the most rows of a step.
        max_tokens: the most queries of a row.
        query_limits: see `KernelProvider`.
    """
    promised = sorted({*powers(max_tokens), *query_limits})
    return [*(IdleStep(1, most) for most in promised), IdleStep(max_rows, 1)]


def warm_up(run: Callable[[], None], device: torch.device) -> None:
    """Call `run`, which runs idle steps; on a GPU their kernels are compiled side by side before it launches any."""
    if device.type == "cuda":
        compile_ahead(run)
    run()
