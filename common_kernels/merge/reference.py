"""`merge` in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from taut.common_kernels.attend import compute_dtype

if TYPE_CHECKING:
    from torch import Tensor


def merge(parts: Tensor, part_lses: Tensor, out: Tensor, lse: Tensor | None = None) -> None:
    """See `Kernels.merge`."""
    total = torch.logsumexp(part_lses, dim=0)  # [T, Hq]
    empty_parts = part_lses == -torch.inf  # [S, T, Hq]
    weights = torch.exp(part_lses - total.masked_fill(total == -torch.inf, 0.0))  # 0 for empty parts
    numbers = parts.to(compute_dtype(parts)).masked_fill(empty_parts[..., None], 0.0)  # [S, T, Hq, V]
    out.copy_((weights[..., None] * numbers).sum(0))
    if lse is not None:
        lse.copy_(total)
