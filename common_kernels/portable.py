"""The provider `triton`: one source for NVIDIA (sm_80 and later) and AMD (CDNA3 and later) GPUs.

Its kernels also run on a CPU under Triton's interpreter (TRITON_INTERPRET=1): so they are tested without a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from taut.common_kernels.kernels import NoWorkspace
from taut.common_kernels.merge.triton_launch import merge
from taut.common_kernels.mla_decode.triton_launch import mla_decode, mla_workspace
from taut.common_kernels.paged_attention.triton_launch import paged_attention, paged_workspace, ragged_attention
from taut.common_kernels.store_kv.triton_launch import store_kv, store_mla_kv

if TYPE_CHECKING:
    from taut.common_kernels.kernels import Workspace
    from taut.common_kernels.problem import Problem

__all__ = [
    "merge",
    "mla_decode",
    "paged_attention",
    "ragged_attention",
    "store_kv",
    "store_mla_kv",
    "workspace",
]


def workspace(
    problem: Problem, max_rows: int, max_tokens: int, device: str, table_path: str | None = None
) -> Workspace:
    """See `Kernels.workspace`. `table_path` names a tile table to use instead of the built-in ones."""
    if problem.operation == "mla_decode":
        return mla_workspace(problem, max_rows, max_tokens, device, table_path)
    if problem.operation == "paged_attention":
        return paged_workspace(problem, max_rows, max_tokens, device, table_path, problem.left)
    return NoWorkspace(table_path)
