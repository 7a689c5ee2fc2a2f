"""The ledger: every touch of vLLM's internals and every difference between its releases that this adapter meets.

Each entry says what it is, since and until which release, how it is told apart (by a probe, never by comparing
versions), why we need it, and when it can go. The functions below are the only places where those touches happen; the
other modules of this adapter import from vLLM only what vLLM documents for backends: `AttentionBackend`,
`AttentionImpl`, `AttentionMetadataBuilder`, `CommonAttentionMetadata`, `AttentionType`, `AttentionBackendEnum` and
`register_backend`, each in the same place from 0.20.2 to 0.33.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import vllm
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from taut.common_kernels.paging import packed_cache_views

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor


@dataclass(frozen=True)
class Touch:
    """One entry of the ledger.

    Args:
        what: the internal or the difference.
        since: the first release that has it.
        until: the last release that has it; "" while it lasts.
        detected: the probe.
        why: what we need it for.
        ends: when the entry can go.
    """

    what: str
    since: str
    until: str
    detected: str
    why: str
    ends: str


LEDGER = (
    Touch(
        what="a registered override is resolved from its path whenever the engine asks for it",
        since="0.20.2",
        until="",
        detected="AttentionBackendEnum.get_path returns what register_backend was given",
        why="the class is chosen when the engine asks, with the model's configuration at hand",
        ends="when vLLM lets a plugin decide per model",
    ),
    Touch(
        what="a CPU ignores --attention-backend and takes CPU_ATTN, and asks no backend to validate a configuration",
        since="0.20.2",
        until="",
        detected="the platform's get_attn_backend_cls takes CPU_ATTN.get_path() whatever was selected",
        why="CPU_ATTN is overridden even when only CUSTOM was asked for, and gives the stock class unless it was",
        ends="when the CPU platform honours the selected backend",
    ),
    Touch(
        what="get_current_vllm_config_or_none: the configuration of the model that is being built",
        since="0.20.2",
        until="",
        detected="hasattr(vllm.config, name)",
        why="a CPU asks for no validation, so what the model needs is read there",
        ends="with the entry above",
    ),
    Touch(
        what="the shape of the cache is the backend's: get_kv_cache_shape, get_kv_cache_stride_order",
        since="0.20.2",
        until="0.28.0",
        detected="harmless where vLLM no longer calls them",
        why="we declare the packed [N, Hk, P, 2 D] that later releases hand over as a view",
        ends="when 0.28 leaves the range",
    ),
    Touch(
        what="get_supported_kernel_block_sizes gets the cache's specification",
        since="0.31.0",
        until="",
        detected="accepted and ignored as *_",
        why="one signature serves all releases",
        ends="when 0.30 leaves the range",
    ),
    Touch(
        what="get_layers_from_vllm_config: the layers of a builder's group",
        since="0.20.2",
        until="",
        detected="importable from vllm.config",
        why="the builder sizes a workspace for the problems that its layers' implementations have",
        ends="when the builder is given its layers",
    ),
)


def engine_version() -> str:
    """vLLM's release, as it says itself."""
    return str(vllm.__version__)


def override(members: Iterable[str], module: str) -> list[str]:
    """Let `module.NAME` answer whenever vLLM asks for the backend NAME; those that this release lacks are left out.

    Returns:
        the names that this release has.
    """
    present = [name for name in members if name in AttentionBackendEnum.__members__]
    for name in present:
        register_backend(AttentionBackendEnum[name], f"{module}.{name}")
    return present


def stock_class(member: str) -> type[Any]:
    """vLLM's own backend class for a member, whatever overrides it."""
    from vllm.utils.import_utils import resolve_obj_by_qualname

    return resolve_obj_by_qualname(AttentionBackendEnum[member].value)  # type: ignore[no-any-return]


def current_config() -> Any | None:
    """The `VllmConfig` of the model that is being built, or None outside of that."""
    from vllm.config import get_current_vllm_config_or_none

    return get_current_vllm_config_or_none()


def implementations(vllm_config: Any, layer_names: list[str]) -> list[Any]:
    """The attention implementations of a builder's layers."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase, layer_names)
    return [layer.impl for layer in layers.values()]


def cache_views(kv_cache: Tensor, value_size: int) -> tuple[Tensor, Tensor]:
    """Keys [N, P, Hk, D] and values [N, P, Hk, V] of vLLM's cache [N, Hk, P, D + V], of whatever strides."""
    return packed_cache_views(kv_cache, value_size)
