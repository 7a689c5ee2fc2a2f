"""What a backend of vLLM's leaves in rows that have no work, with which captured graphs pad their batches."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from taut.audit.records import Padding

ROWS = 3
# What stands in memory that nobody has written: no result of ones comes near it, and bfloat16 holds it as it is.
POISON = 12288.0
MAKES_MEMORY = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})


def try_padding(builder: Any, layer: Any, batch: Any) -> Padding:
    """Run one layer over a decode batch with rows of length 0 behind it, all fresh memory poisoned.

    Args:
        builder: of the metadata.
        layer: of attention, dense or latent.
        batch: the `CommonAttentionMetadata` of a step that has run.
    """
    tokens, latent = int(batch.num_actual_tokens), hasattr(layer, "kv_lora_rank")
    if latent and layer.kv_cache.element_size() == 1:  # what vLLM makes of the query then, differs by release
        return Padding(ROWS, None, "rows without work are not tried where a latent cache is quantised")
    try:
        metadata = builder.build(0, padded(batch, ROWS))
        attend = _attend_latent if latent else _attend_dense
        dtype = builder.vllm_config.model_config.dtype
        with _Poisoned():
            idle = attend(layer, metadata, tokens + ROWS, dtype)[tokens:].float()
    except Exception as error:  # whatever a backend makes of it
        return Padding(ROWS, None, f"rows without work could not be tried: {type(error).__name__}: {error}")
    if bool((idle == POISON).all()):
        return Padding(ROWS, None, "rows without work keep what their memory held before")
    finite = bool(torch.isfinite(idle).all())
    return Padding(
        ROWS, finite, "rows without work get finite numbers" if finite else "rows without work get NaN or inf"
    )


def padded(batch: Any, rows: int) -> Any:
    """A batch with rows behind it that have neither queries nor keys, as vLLM pads one for a captured graph.

    Args:
        batch: a `CommonAttentionMetadata` of a decode step.
        rows: how many.
    """
    requests = int(batch.num_reqs)
    changed: dict[str, Any] = {"num_reqs": requests + rows, "num_actual_tokens": int(batch.num_actual_tokens) + rows}
    for item in dataclasses.fields(batch):
        value = getattr(batch, item.name)
        if not item.init or not isinstance(value, torch.Tensor) or value.dim() == 0:
            continue
        if item.name.startswith("query_start_loc"):
            changed[item.name] = torch.cat([value, value[-1:].expand(rows)])
        elif item.name == "slot_mapping":
            changed[item.name] = torch.cat([value, value.new_full((rows,), -1)])
        elif value.shape[0] == requests:
            changed[item.name] = torch.cat([value, value.new_zeros(rows, *value.shape[1:])])
    return dataclasses.replace(batch, **changed)


def _attend_dense(layer: Any, metadata: Any, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """What a layer writes for queries of ones: [T, Hq, D]."""
    device = layer.kv_cache.device
    query = torch.ones(tokens, layer.num_heads, layer.head_size, dtype=dtype, device=device)
    key = torch.ones(tokens, layer.num_kv_heads, layer.head_size, dtype=dtype, device=device)
    output = torch.empty_like(query)
    layer.impl.forward(layer, query, key, key, layer.kv_cache, metadata, output)
    return output


def _attend_latent(layer: Any, metadata: Any, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """What a layer returns for absorbed queries of ones, [T, Hq, C]; those of idle rows are poisoned, too.

    A backend may write its result over the query.
    """
    device, heads = layer.kv_cache.device, layer.num_heads
    nope = torch.ones(tokens, heads, layer.kv_lora_rank, dtype=dtype, device=device)
    rope = torch.ones(tokens, heads, layer.qk_rope_head_dim, dtype=dtype, device=device)
    nope[-ROWS:] = POISON
    output: torch.Tensor = layer.impl.forward_mqa((nope, rope), layer.kv_cache, metadata, layer)[0]
    return output


class _Poisoned(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fills what is allocated without being written."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, function: Any, _types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        result = function(*arguments, **(named or {}))
        made = function.namespace == "aten" and function._schema.name.rpartition("::")[2] in MAKES_MEMORY
        if made and isinstance(result, torch.Tensor) and result.is_floating_point():
            result.fill_(POISON)
        return result
