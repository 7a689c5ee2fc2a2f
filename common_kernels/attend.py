"""Softmax attention of one row in plain torch: what every reference operation shares.

Written to be read: scores, mask, softmax, weighted sum, in the order of the formula. Computed in float32, or in float64
if the queries are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from taut.common_kernels.step import Mask

SCORES_AT_ONCE = 1 << 25  # bounds the scores held in memory: 128 MiB in float32


def visible_keys(mask: Mask, queries: int, length: int) -> tuple[int, int]:
    """The range of positions that at least one of the last `queries` positions of a row sees: start, end."""
    start = max(0, length - queries - mask.left) if mask.left >= 0 else 0
    return min(start, length), length


def attend(
    scores_of: Callable[[int, int], Tensor],
    values: Tensor,
    *,
    queries: int,
    first_key: int,
    length: int,
    mask: Mask,
    out: Tensor,
    lse: Tensor | None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> None:
    """Attention of one row's queries over its visible keys.

    Args:
        scores_of: from a range i, j of queries to their scaled scores [Hq, j - i, n], float32 or float64.
        values: [n, Hk, V] of the scores' dtype.
        queries: m, the queries of this row.
        first_key: the position of the first of the n keys.
        length: the row's length; its last query stands at position `length - 1`.
        mask: causal, window, soft cap.
        out: [m, Hq, V], written whole.
        lse: [m, Hq] float32, written if given.
        sinks: [Hq].
        alibi_slopes: [Hq].
    """
    n, kv_heads, value_size = values.shape
    q_heads = out.shape[1]
    if n == 0:
        out.zero_()
        if lse is not None:
            lse.fill_(-torch.inf)
        return
    grouped_values = values.transpose(0, 1)  # [Hk, n, V]
    key_positions = first_key + torch.arange(n, device=values.device)  # [n]
    at_once = max(1, SCORES_AT_ONCE // (q_heads * n))
    for i in range(0, queries, at_once):
        j = min(queries, i + at_once)
        scores = scores_of(i, j)  # [Hq, j - i, n]
        if mask.soft_cap:
            scores = mask.soft_cap * torch.tanh(scores / mask.soft_cap)
        query_positions = length - queries + torch.arange(i, j, device=values.device)  # [j - i]
        distance = key_positions[None, :] - query_positions[:, None]  # [j - i, n]
        if alibi_slopes is not None:
            scores = scores + alibi_slopes.to(scores)[:, None, None] * distance
        seen = torch.ones_like(distance, dtype=torch.bool)
        if mask.causal:
            seen &= distance <= 0
        if mask.left >= 0:
            seen &= distance >= -mask.left
        if mask.right >= 0:
            seen &= distance <= mask.right
        scores = scores.masked_fill(~seen, -torch.inf)
        total = torch.logsumexp(scores, dim=-1)  # [Hq, j - i]
        blind = total == -torch.inf
        if sinks is not None:
            total = torch.logaddexp(total, sinks.to(total)[:, None]).masked_fill(blind, -torch.inf)
        weights = torch.exp(scores - total.masked_fill(blind, 0.0)[..., None])  # [Hq, j - i, n], rows of 0 where blind
        group = q_heads // kv_heads
        mixed = weights.reshape(kv_heads, group * (j - i), n) @ grouped_values  # [Hk, G * (j - i), V]
        out[i:j] = mixed.view(q_heads, j - i, value_size).transpose(0, 1).to(out.dtype)
        if lse is not None:
            lse[i:j] = total.transpose(0, 1)


def grouped_scores(query: Tensor, keys: Tensor, scale: float) -> Callable[[int, int], Tensor]:
    """Scaled scores of grouped heads, as `attend` asks for them.

    Args:
        query: [m, Hq, D].
        keys: [n, Hk, D].
        scale: of the scores.
    """
    q_heads, kv_heads = query.shape[1], keys.shape[1]
    keys_by_head = keys.permute(1, 2, 0)  # [Hk, D, n]

    def scores_of(i: int, j: int) -> Tensor:
        grouped = query[i:j].to(keys.dtype).transpose(0, 1)  # [Hq, j - i, D]
        grouped = grouped.reshape(kv_heads, q_heads // kv_heads * (j - i), -1)  # [Hk, G * (j - i), D]
        return (grouped @ keys_by_head).view(q_heads, j - i, -1) * scale

    return scores_of


def compute_dtype(query: Tensor) -> torch.dtype:
    """The dtype in which a reference computes: float32, or float64 for float64 queries."""
    return torch.promote_types(query.dtype, torch.float32)


def no_work(starts: list[int], out: Tensor, lse: Tensor | None) -> None:
    """Zeros and -inf for the queries past the last row: the padding of a batch."""
    out[starts[-1] :] = 0
    if lse is not None:
        lse[starts[-1] :] = -torch.inf
