"""One step of vLLM's for the layers of a cache group: its metadata, and the builder that makes them.

The builder makes one `Step` per engine step out of tensors that vLLM already has on the device: nothing is copied,
computed or waited for on the host.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, CommonAttentionMetadata

from taut.adapters.vllm import bridge
from taut.adapters.vllm.dense.problems import problem_of_layer
from taut.adapters.vllm.selection import refusal
from taut.adapters.vllm.serving import graph_support, provider_of, table_path
from taut.common_kernels.step import PageTable, Step
from taut.common_kernels.warm_up import IdleStep, mixed_steps, warm_up

if TYPE_CHECKING:
    from taut.common_kernels.kernels import Kernels, Workspace
    from taut.common_kernels.problem import Problem


def cache_shape(pages: int, page_size: int, kv_heads: int, head_size: int) -> tuple[int, ...]:
    """[N, Hk, P, 2 D]: values lie behind their keys, as in what releases from 0.29 on hand over by themselves."""
    return pages, kv_heads, page_size, 2 * head_size


@dataclass
class TautMetadata:
    """One step for the layers of one cache group. Mutable, since vLLM's wrappers set attributes of their own.

    Args:
        step: rows, lengths and pages.
        causal: whether a query is blind to what follows it.
        num_actual_tokens: queries of the step, padding of a captured graph included.
        workspaces: what the kernels of this group's layers need, by problem; prepared for this step.
        slot_mapping: [T] int64, where new tokens go.
    """

    step: Step
    causal: bool
    num_actual_tokens: int
    workspaces: dict[Problem, Workspace]
    slot_mapping: torch.Tensor

    def workspace_of(self, problem: Problem, kernels: Kernels) -> Workspace:
        """What a layer's kernels need; made now for a layer that did not exist when the builder asked for them."""
        if not self.causal:  # the schedule of a mask that is causal ends where a row's last query does
            problem = replace(problem, features=problem.features | {"non_causal"})
        if problem not in self.workspaces:
            made = kernels.workspace(
                problem, self.step.rows, self.num_actual_tokens, str(self.slot_mapping.device), table_path()
            )
            made.prepare(self.step)
            self.workspaces = self.workspaces | {problem: made}
        return self.workspaces[problem]


class TautMetadataBuilder(AttentionMetadataBuilder[TautMetadata]):
    """Makes a `Step` of vLLM's batch, without a host-device synchronisation."""

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Whole graphs for decode and uniform verification batches where the kernels can be captured; else none."""
        problem = problem_of_layer(
            dtype=vllm_config.model_config.dtype,
            kv_cache_dtype=vllm_config.cache_config.cache_dtype,
            q_heads=kv_cache_spec.num_kv_heads,
            kv_heads=kv_cache_spec.num_kv_heads,
            head_size=kv_cache_spec.head_size,
            page_size=kv_cache_spec.block_size,
        )
        return graph_support(problem)

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        value_size = getattr(kv_cache_spec, "head_size_v", None) or kv_cache_spec.head_size
        if value_size != kv_cache_spec.head_size:
            raise ValueError(refusal([f"values of size {value_size} beside keys of size {kv_cache_spec.head_size}"]))
        self.page_size = kv_cache_spec.block_size
        scheduler = vllm_config.scheduler_config
        # One layer of each kind: its kernels are the others' too.
        self.kinds = {layer.impl.problem: layer for layer in bridge.layers(vllm_config, layer_names)}
        self.workspaces = {
            problem: layer.impl.kernels.workspace(
                problem, scheduler.max_num_seqs, scheduler.max_num_batched_tokens, str(device), table_path()
            )
            for problem, layer in self.kinds.items()
        }
        # A draft's steps may be captured with the making of their schedules, if that can be captured.
        self.supports_draft_decode_metadata_update = all(provider_of(problem).graphs for problem in self.kinds)
        if device.type == "cuda":
            self.warm_up()

    def warm_up(self) -> None:
        """Run every kind of layer over every kind of step, so that nothing compiles while the model serves."""
        warm_up(self._run_idle_steps, self.device)

    def _run_idle_steps(self) -> None:
        scheduler, speculative = self.vllm_config.scheduler_config, self.vllm_config.speculative_config
        verified = 1 + ((speculative and speculative.num_speculative_tokens) or 0)
        limits = {limit for problem in self.kinds for limit in provider_of(problem).query_limits}
        promised = {1, min(2, verified), verified, scheduler.max_num_batched_tokens} | limits
        for idle in mixed_steps(scheduler.max_num_seqs, promised):
            self._run_idle(idle)

    def _run_idle(self, idle: IdleStep) -> None:
        """One idle step through one layer of each kind, over a cache of one page, laid out as vLLM's is."""
        step, nowhere = idle.step(self.page_size, self.device), idle.no_slots(self.device)
        for workspace in self.workspaces.values():
            workspace.prepare(step)
        for problem, layer in self.kinds.items():
            dtype, cache_dtype = getattr(torch, problem.dtype), getattr(torch, problem.cache_dtype)
            metadata = TautMetadata(step, "causal" in problem.features, idle.tokens, self.workspaces, nowhere)
            query = torch.zeros(idle.tokens, problem.q_heads, problem.head_size, dtype=dtype, device=self.device)
            key = torch.zeros(idle.tokens, problem.kv_heads, problem.head_size, dtype=dtype, device=self.device)
            shape = cache_shape(1, self.page_size, problem.kv_heads, problem.head_size)
            cache = torch.zeros(shape, dtype=cache_dtype, device=self.device)
            layer.impl.do_kv_cache_update(layer, key, key, cache, nowhere)
            layer.impl.forward(layer, query, key, key, cache, metadata, torch.empty_like(query))

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> TautMetadata:
        """See `AttentionMetadataBuilder.build`; `common_prefix_len` is always 0 for backends without cascades."""
        common = common_attn_metadata
        if isinstance(common.causal, torch.Tensor):
            raise ValueError(refusal(["a mask that is causal for some rows only is not supported"]))
        if not common.causal and any("causal" in problem.features for problem in self.kinds):
            raise ValueError(refusal(["attention of decoders to what follows is not supported"]))
        step = Step(
            query_starts=common.query_start_loc,
            lengths=common.seq_lens,
            pages=PageTable(common.block_table_tensor, self.page_size),
            max_query=common.max_query_len,
            max_length=common.max_seq_len,
        )
        for workspace in self.workspaces.values():
            workspace.prepare(step)
        return TautMetadata(step, common.causal, common.num_actual_tokens, self.workspaces, common.slot_mapping)

    def update_draft_decode_metadata(self, metadata: TautMetadata) -> None:
        """Make the schedule of a draft's next step, from the lengths that its last one has left on the device."""
        for workspace in metadata.workspaces.values():
            workspace.prepare(metadata.step)
