"""`mla_decode` in plain torch: the oracle, and the kernel of machines without a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from taut.common_kernels.attend import attend, compute_dtype, grouped_scores, no_work, visible_keys
from taut.common_kernels.paging import dequantised
from taut.common_kernels.step import Mask

if TYPE_CHECKING:
    from torch import Tensor

    from taut.common_kernels.kernels import Workspace
    from taut.common_kernels.step import Step


def mla_decode(
    q_nope: Tensor,
    q_pe: Tensor,
    cache: Tensor,
    step: Step,
    out: Tensor,
    *,
    scale: float,
    causal: bool = True,
    lse: Tensor | None = None,
    cache_scale: Tensor | None = None,
    workspace: Workspace | None = None,  # noqa: ARG001 - the reference needs none
) -> None:
    """See `Kernels.mla_decode`. Multi-query attention over one latent head, which is key and value at once."""
    starts, lengths = step.query_starts.tolist(), step.lengths.tolist()
    dtype, rank = compute_dtype(q_nope), q_nope.shape[-1]
    mask = Mask(causal=causal)
    for row, length in enumerate(lengths):
        rows = slice(starts[row], starts[row + 1])
        queries = rows.stop - rows.start
        if not queries:
            continue
        first, end = visible_keys(mask, queries, length)
        page, place = step.pages.row_slots(row, first, end)
        cached = dequantised(cache[page, place], cache_scale, dtype)[:, None]  # [n, 1, C + E]: one head
        latent, rope = cached[..., :rank], cached[..., rank:]
        nope_scores, rope_scores = grouped_scores(q_nope[rows], latent, scale), grouped_scores(q_pe[rows], rope, scale)
        attend(
            lambda i, j, a=nope_scores, b=rope_scores: a(i, j) + b(i, j),  # type: ignore[misc]
            latent,
            queries=queries,
            first_key=first,
            length=length,
            mask=mask,
            out=out[rows],
            lse=None if lse is None else lse[rows],
        )
    no_work(starts, out, lse)
