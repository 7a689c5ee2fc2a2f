"""`paged_attention` and `ragged_attention` in plain torch: the oracle, and the kernel of machines without a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from taut.common_kernels.attend import attend, compute_dtype, grouped_scores, no_work, visible_keys
from taut.common_kernels.paging import dequantised

if TYPE_CHECKING:
    from torch import Tensor

    from taut.common_kernels.kernels import Workspace
    from taut.common_kernels.step import Mask, Step


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    step: Step,
    mask: Mask,
    out: Tensor,
    *,
    scale: float,
    lse: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    workspace: Workspace | None = None,  # noqa: ARG001 - the reference needs none
) -> None:
    """See `Kernels.paged_attention`. Row by row; only the keys that a row's queries see are read."""
    starts, lengths = step.query_starts.tolist(), step.lengths.tolist()
    dtype = compute_dtype(query)
    for row, length in enumerate(lengths):
        rows = slice(starts[row], starts[row + 1])
        queries = rows.stop - rows.start
        if not queries:
            continue
        first, end = visible_keys(mask, queries, length)
        page, place = step.pages.row_slots(row, first, end)
        keys = dequantised(key_cache[page, place], key_scale, dtype)  # [n, Hk, D]
        values = dequantised(value_cache[page, place], value_scale, dtype)  # [n, Hk, V]
        attend(
            grouped_scores(query[rows], keys, scale),
            values,
            queries=queries,
            first_key=first,
            length=length,
            mask=mask,
            out=out[rows],
            lse=None if lse is None else lse[rows],
            sinks=sinks,
            alibi_slopes=alibi_slopes,
        )
    no_work(starts, out, lse)


def ragged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    mask: Mask,
    out: Tensor,
    *,
    scale: float,
    max_query: int,  # noqa: ARG001 - a bound for kernels that size a grid
    max_length: int,  # noqa: ARG001
    lse: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    workspace: Workspace | None = None,  # noqa: ARG001
) -> None:
    """See `Kernels.ragged_attention`."""
    starts, key_bounds = query_starts.tolist(), key_starts.tolist()
    dtype = compute_dtype(query)
    for row in range(len(starts) - 1):
        rows = slice(starts[row], starts[row + 1])
        queries = rows.stop - rows.start
        if not queries:
            continue
        length = key_bounds[row + 1] - key_bounds[row]
        first, end = visible_keys(mask, queries, length)
        seen = slice(key_bounds[row] + first, key_bounds[row] + end)
        attend(
            grouped_scores(query[rows], key[seen].to(dtype), scale),
            value[seen].to(dtype),
            queries=queries,
            first_key=first,
            length=length,
            mask=mask,
            out=out[rows],
            lse=None if lse is None else lse[rows],
            sinks=sinks,
            alibi_slopes=alibi_slopes,
        )
    no_work(starts, out, lse)
