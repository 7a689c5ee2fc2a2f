"""Before SGLang serves, each kind of layer runs over each kind of idle step: nothing compiles while the model serves.

The steps come from `common_kernels.warm_up`; here they become metadata of ours and calls of SGLang's layers.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from taut.adapters.sglang.batch import Batch
from taut.common_kernels.warm_up import IdleStep, prompt_steps, uniform_steps, warm_up

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

    warm_up(run, services.around.device)


def _run_layer(attention: Attention, layer: Any, max_rows: int, *, prompts: bool) -> None:
    builder, services = attention.builder, attention.services
    if services[layer, 1].problem.operation == "ragged_attention":
        steps_of_prompts, uniform = [IdleStep(1, 1)], []  # one kernel for whatever is promised
    else:
        limits = services[layer, 0].provider.query_limits if prompts else ()
        steps_of_prompts = prompt_steps(max_rows, builder.max_tokens, limits)
        uniform = uniform_steps(max_rows, builder.usual_queries)
    for step in steps_of_prompts if prompts else ():
        _run_step(attention, layer, step, uniform=False)
    for step in uniform:
        _run_step(attention, layer, step, uniform=True)


def _run_step(attention: Attention, layer: Any, step: IdleStep, *, uniform: bool) -> None:
    """One idle step through one layer, with tensors laid out as SGLang's models hand them over.

    Args:
        attention: what the layers call.
        layer: of SGLang's.
        step: which.
        uniform: whether the host knows that all rows have the same number of queries.
    """
    builder, service, around = attention.builder, attention.services[layer, 1], attention.services.around
    zeros = torch.zeros(step.rows, dtype=torch.int64, device=around.device)
    counts = None if uniform else torch.ones(step.rows, dtype=torch.int32, device=around.device)
    queries = step.queries if uniform else 0
    metadata = builder.steps.metadata(Batch(zeros, zeros, step.tokens, queries, counts, step.max_query))
    builder.prepare(metadata)
    problem = service.problem
    query = torch.zeros(step.tokens, problem.q_heads, problem.head_size, dtype=around.dtype, device=around.device)
    key = torch.zeros(step.tokens, problem.kv_heads, problem.head_size, dtype=around.dtype, device=around.device)
    value, ropes = key[..., : problem.value_size], {}
    if service.absorbed:
        ropes = {"q_rope": query[..., problem.value_size :], "k_rope": key[..., problem.value_size :]}
        query, key = query[..., : problem.value_size], value
    forms = [(False, False)]  # whether keys are a chunk of a prefix, and whether the LSE is wanted
    if service.ragged:
        forms += [(False, True), (True, True)]
        value = _beside_keys(key, problem, attention)
    for chunk, wants_lse in forms:
        forward = SimpleNamespace(
            out_cache_loc=step.no_slots(around.device),
            extend_prefix_lens_cpu=None,
            attn_attend_prefix_cache=chunk,
            mha_return_lse=wants_lse,
            prefix_chunk_idx=0,
            prefix_chunk_cu_seq_lens=[metadata.step.query_starts],
            prefix_chunk_max_seq_lens=[builder.max_tokens],
        )
        attention.attend(query, key, value, layer, forward, metadata, not service.ragged, **ropes)


def _beside_keys(key: Tensor, problem: Problem, attention: Attention) -> Tensor:
    """Values [T, Hk, V] as SGLang's projection leaves them: behind each head's key, whose rope lies elsewhere."""
    latent = next((service.problem for service in attention.services.values() if service.absorbed), None)
    rope = latent.head_size - latent.value_size if latent else 0
    both = key.new_zeros(*key.shape[:2], problem.head_size - rope + problem.value_size)
    return both[..., problem.head_size - rope :]
