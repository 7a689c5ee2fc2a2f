"""Before SGLang serves, each kind of layer runs over each kind of idle step: nothing compiles while the model serves.

Kernels are compiled for powers of two: of rows with one query each, and of the most queries of a row that the host
promises, not for how many there are.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from taut.adapters.sglang.batch import Batch
from taut.common_kernels.compiling import compile_ahead, powers

if TYPE_CHECKING:
    from torch import Tensor

    from taut.adapters.sglang.layer import Attention
    from taut.common_kernels.problem import Problem

MOST_IDLE_ROWS = 1024  # their queries and outputs must find room


def warm_up_layers(attention: Attention, max_rows: int, *, prompts: bool) -> None:
    """Run one layer of each kind over idle steps, which leave the pool as it is.

    Args:
        attention: what the layers call.
        max_rows: the most requests of a batch.
        prompts: whether steps whose rows differ in their numbers of queries will come.
    """
    services = attention.services
    kinds = {service.problem: layer for (layer, queries), service in services.items() if queries == 1}

    def run() -> None:
        for layer in kinds.values():
            _run_layer(attention, layer, min(max_rows, MOST_IDLE_ROWS), prompts=prompts)

    if services.around.device.type == "cuda":
        compile_ahead(run)
    run()


def _run_layer(attention: Attention, layer: Any, max_rows: int, *, prompts: bool) -> None:
    builder = attention.builder
    contiguous = attention.services[layer, 1].problem.operation == "ragged_attention"
    # Rows, and the most queries of one.
    promised = [(1, longest) for longest in powers(builder.max_tokens)] + [(max_rows, 1)] if prompts else []
    for rows, longest in promised[:1] if contiguous else promised:  # one kernel for whatever is promised
        _run_step(attention, layer, rows, 0, longest)
    for rows in powers(max_rows) if not contiguous else ():
        for queries in builder.usual_queries:
            _run_step(attention, layer, rows, queries, queries)


def _run_step(attention: Attention, layer: Any, rows: int, queries: int, longest: int) -> None:
    """One step of rows without keys through one layer, with tensors laid out as SGLang's models hand them over.

    Args:
        attention: what the layers call.
        layer: of SGLang's.
        rows: how many.
        queries: of each row; 0 for prompts, of one query each.
        longest: the most queries of a row that are promised.
    """
    builder, service, around = attention.builder, attention.services[layer, 1], attention.services.around
    tokens, zeros = rows * (queries or 1), torch.zeros(rows, dtype=torch.int64, device=around.device)
    counts = None if queries else torch.ones(rows, dtype=torch.int32, device=around.device)
    metadata = builder.steps.metadata(Batch(zeros, zeros, tokens, queries, counts, longest))
    builder.prepare(metadata)
    problem = service.problem
    query = torch.zeros(tokens, problem.q_heads, problem.head_size, dtype=around.dtype, device=around.device)
    key = torch.zeros(tokens, problem.kv_heads, problem.head_size, dtype=around.dtype, device=around.device)
    value, parts = key[..., : problem.value_size], {}
    if service.absorbed:
        parts = {"q_rope": query[..., problem.value_size :], "k_rope": key[..., problem.value_size :]}
        query, key = query[..., : problem.value_size], value
    forms = [(False, False)]  # whether keys are a chunk of a prefix, and whether the LSE is wanted
    if service.ragged:
        forms += [(False, True), (True, True)]
        value = _beside_keys(key, problem, attention)
    for chunk, wants_lse in forms:
        forward = SimpleNamespace(
            out_cache_loc=torch.full((tokens,), -1, dtype=torch.int64, device=around.device),
            extend_prefix_lens_cpu=None,
            attn_attend_prefix_cache=chunk,
            mha_return_lse=wants_lse,
            prefix_chunk_idx=0,
            prefix_chunk_cu_seq_lens=[metadata.step.query_starts],
            prefix_chunk_max_seq_lens=[builder.max_tokens],
        )
        attention.attend(query, key, value, layer, forward, metadata, not service.ragged, **parts)


def _beside_keys(key: Tensor, problem: Problem, attention: Attention) -> Tensor:
    """Values [T, Hk, V] as SGLang's projection leaves them: behind each head's key, whose rope lies elsewhere."""
    latent = next((service.problem for service in attention.services.values() if service.absorbed), None)
    rope = latent.head_size - latent.value_size if latent else 0
    both = key.new_zeros(*key.shape[:2], problem.head_size - rope + problem.value_size)
    return both[..., problem.head_size - rope :]
