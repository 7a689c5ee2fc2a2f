"""`merge` in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from taut.common_kernels.attend import compute_dtype

if TYPE_CHECKING:
    from torch import Tensor


def merge(partials: Tensor, partial_lses: Tensor, out: Tensor, lse: Tensor | None = None) -> None:
    """See `Kernels.merge`."""
    total = torch.logsumexp(partial_lses, dim=0)  # [T, Hq]
    empty = partial_lses == -torch.inf  # [S, T, Hq]
    weights = torch.exp(partial_lses - total.masked_fill(total == -torch.inf, 0.0))  # 0 for empty ones
    numbers = partials.to(compute_dtype(partials)).masked_fill(empty[..., None], 0.0)  # [S, T, Hq, V]
    out.copy_((weights[..., None] * numbers).sum(0))
    if lse is not None:
        lse.copy_(total)
