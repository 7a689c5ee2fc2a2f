"""One engine step as data: where the keys are, how long every row is, and what the softmax needs.

The names of dimensions, used in every shape comment of this package:

    T tokens (queries of all rows, packed)    R rows (requests)      N pages in the cache     P tokens in a page
    Hq query heads    Hk key-value heads      D head size of keys    V head size of values
    C the latent rank of MLA                  E its rope part
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# A row with more queries than this is prefilled: the built-in providers for GPUs have kernels of their own for that.
DECODE_QUERIES = 16


@dataclass(frozen=True)
class PageTable:
    """Where the tokens of each row lie in the cache: `slot = table[row(r), position // page] * page + position % page`.

    One addressing serves both engines. vLLM: `row(r) = r` in its block table. SGLang: `row(r) = req_pool_indices[r]` in
    its `req_to_token`, with pages of one token, so that no list of indices is ever built.

    Args:
        table: [*, >= pages of the longest row] int32, page numbers; entries past a row's length are never read.
        page_size: tokens in a page.
        rows: [R] int32 or int64, which row of `table` belongs to row r; None where they are the same.
    """

    table: Tensor
    page_size: int
    rows: Tensor | None = None

    def row_slots(self, row: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Page and place in the page of the positions start <= position < end of one row: two [end - start] int64.

        Both are needed because the cache is a strided view: a page need not follow its neighbour in memory.
        """
        import torch

        positions = torch.arange(start, end, device=self.table.device)
        table_row = self.table[row if self.rows is None else self.rows[row]]
        return table_row[positions // self.page_size].long(), positions % self.page_size


@dataclass(frozen=True)
class Step:
    """One step of an engine, the same for all layers that share a cache.

    Args:
        query_starts: [R + 1] int32 on the device; the queries of row r are `query_starts[r] : query_starts[r + 1]`.
        lengths: [R] int32 on the device; cached tokens of each row, the new ones included; 0 for a row without work.
        pages: where they lie.
        max_query: host bound on the queries of one row.
        max_length: host bound on `lengths`; no result may depend on it, since a captured graph outlives it.
    """

    query_starts: Tensor
    lengths: Tensor
    pages: PageTable
    max_query: int
    max_length: int

    @property
    def rows(self) -> int:
        """How many rows (requests) the step has, padded ones included."""
        return int(self.lengths.shape[0])


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees, and what is done to its scores.

    The last query of a row stands at the row's last position: query i of m in a row of length n stands at
    position `p = n - m + i`. It sees key j when `j < n`, and `j <= p` if causal, and `p - left <= j` if `left >= 0`,
    and `j <= p + right` if `right >= 0`.

    Args:
        causal: whether a query is blind to what follows it.
        left: how far back a query sees, itself not counted (a sliding window of W tokens has left = W - 1); -1 for all.
        right: how far ahead it sees when not causal; -1 for all.
        soft_cap: scores become `soft_cap * tanh(score / soft_cap)`; 0 for none.
    """

    causal: bool = True
    left: int = -1
    right: int = -1
    soft_cap: float = 0.0
