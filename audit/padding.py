"""What a backend of vLLM's leaves in rows that have no work, with which captured graphs pad their batches."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from taut.audit.records import Padding

ROWS = 3
POISON = 12345.0  # what stood in the output before


def try_padding(builder: Any, layer: Any, batch: Any) -> Padding:
    """Run one layer over a decode batch with rows of length 0 behind it, into a poisoned output.

    Args:
        builder: of the metadata.
        layer: whose attention is dense.
        batch: the `CommonAttentionMetadata` of a step that has run.
    """
    if not hasattr(layer, "num_kv_heads") or hasattr(layer, "kv_lora_rank"):
        return Padding(ROWS, None, "rows without work are tried with dense attention alone")
    dtype = builder.vllm_config.model_config.dtype
    tokens, device = int(batch.num_actual_tokens), layer.kv_cache.device
    try:
        metadata = builder.build(0, padded(batch, ROWS))
        shape = (tokens + ROWS, layer.num_heads, layer.head_size)
        query = torch.ones(shape, dtype=dtype, device=device)
        key = torch.ones(shape[0], layer.num_kv_heads, layer.head_size, dtype=dtype, device=device)
        output = torch.full_like(query, POISON)
        layer.impl.forward(layer, query, key, key, layer.kv_cache, metadata, output)
    except Exception as error:  # whatever a backend makes of it
        return Padding(ROWS, None, f"rows without work could not be tried: {type(error).__name__}: {error}")
    idle = output[tokens:].float()
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
