"""The provider `hopper`: kernels in Gluon for NVIDIA Hopper (sm_90).

What has no kernel of its own here, since nothing in it is Hopper's, is done by those of the provider `triton`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from taut.common_kernels.portable import merge, ragged_attention, store_kv, store_mla_kv
from taut.common_kernels.reference import NoWorkspace

if TYPE_CHECKING:
    from taut.common_kernels.kernels import Workspace
    from taut.common_kernels.problem import Problem

__all__ = ["merge", "ragged_attention", "store_kv", "store_mla_kv", "workspace"]


def workspace(
    problem: Problem,  # noqa: ARG001 - until an operation of its own needs one
    max_rows: int,  # noqa: ARG001
    max_tokens: int,  # noqa: ARG001
    device: str,  # noqa: ARG001
    table_path: str | None = None,  # noqa: ARG001
) -> Workspace:
    """See `Kernels.workspace`. `table_path` names a tile table to use instead of the built-in ones."""
    return NoWorkspace()
