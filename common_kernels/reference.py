"""The provider `reference`: every operation in plain torch, on any device. The oracle of all others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from taut.common_kernels.kernels import NoWorkspace
from taut.common_kernels.merge.reference import merge
from taut.common_kernels.mla_decode.reference import mla_decode
from taut.common_kernels.paged_attention.reference import paged_attention, ragged_attention
from taut.common_kernels.store_kv.reference import store_kv, store_mla_kv

if TYPE_CHECKING:
    from taut.common_kernels.problem import Problem

__all__ = [
    "NoWorkspace",
    "merge",
    "mla_decode",
    "paged_attention",
    "ragged_attention",
    "store_kv",
    "store_mla_kv",
    "workspace",
]


def workspace(
    problem: Problem,  # noqa: ARG001
    max_rows: int,  # noqa: ARG001
    max_tokens: int,  # noqa: ARG001
    device: str,  # noqa: ARG001
    table_path: str | None = None,  # noqa: ARG001
) -> NoWorkspace:
    """See `Kernels.workspace`."""
    return NoWorkspace()
