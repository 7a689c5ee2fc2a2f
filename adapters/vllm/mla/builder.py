"""One step of vLLM's for the layers of a cache group: a schedule for rows that decode, our prefill for the others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonDecodeMetadata,
    MLACommonMetadataBuilder,
    QueryLenSupport,
)

from taut.adapters.vllm import bridge
from taut.adapters.vllm.mla.layer import CAUSAL, WHOLE
from taut.adapters.vllm.mla.prefill import Prefill
from taut.adapters.vllm.mla.problems import decode_problem
from taut.adapters.vllm.serving import graph_support, provider_of, table_path
from taut.common_kernels.step import PageTable, Step
from taut.common_kernels.warm_up import IdleStep, mixed_steps, warm_up

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionCGSupport

    from taut.adapters.vllm.mla.layer import TautMLAImplementation
    from taut.common_kernels.kernels import Workspace


@dataclass
class DecodeMetadata(MLACommonDecodeMetadata):
    """The rows of a step that decode.

    Args:
        step: rows, lengths and pages.
        workspace: what the kernels of this group's layers need, prepared for this step.
    """

    step: Step
    workspace: Workspace


class TautMLAMetadataBuilder(MLACommonMetadataBuilder[Any]):
    """vLLM's own split into decoding and prefilling rows, with a schedule for the first and our prefill for the second.

    Rows of several query tokens (speculative verification) decode as well, each with its own number of them.
    """

    query_len_support: ClassVar[QueryLenSupport] = QueryLenSupport.VARLEN

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Whole graphs for decode and uniform verification batches where the kernels can be captured; else none."""
        model = vllm_config.model_config
        problem = decode_problem(
            dtype=model.dtype,
            kv_cache_dtype=vllm_config.cache_config.cache_dtype,
            q_heads=model.get_num_attention_heads(vllm_config.parallel_config),
            head_size=kv_cache_spec.head_size,
            rank=model.hf_text_config.kv_lora_rank,
            page_size=kv_cache_spec.block_size,
        )
        return graph_support(problem)

    @staticmethod
    def determine_prefill_query_data_type(vllm_config: Any, model_dtype: torch.dtype) -> torch.dtype:  # noqa: ARG004
        """Queries of a prefill keep the model's dtype."""
        return model_dtype

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # The layers of a group share the shape of their cache: one schedule and one scratch serve them all.
        self.layer = bridge.layers(vllm_config, layer_names)[0]
        implementation: TautMLAImplementation = self.layer.impl
        bridge.prefill_through(self, Prefill(implementation))
        self.page_size = kv_cache_spec.block_size
        problem = replace(implementation.problem, page_size=self.page_size, max_query=self.reorder_batch_threshold)
        rows = vllm_config.scheduler_config.max_num_seqs
        self.workspace = implementation.kernels.workspace(
            problem, rows, rows * self.reorder_batch_threshold, str(device), table_path()
        )
        # A draft's steps may be captured with the making of their schedules, if that can be captured; the lengths of a
        # rank's share are not kept on the device between them.
        graphs = provider_of(implementation.problem).graphs
        self.supports_draft_decode_metadata_update = graphs and self.dcp_world_size == 1
        if device.type == "cuda":
            self.warm_up()

    def warm_up(self) -> None:
        """Run decode and prefill over idle steps, so that nothing compiles while the model serves."""
        warm_up(self._run_idle_steps, self.device)

    def _run_idle_steps(self) -> None:
        for idle in mixed_steps(self.vllm_config.scheduler_config.max_num_seqs, [self.reorder_batch_threshold]):
            self._decode_idle(idle)
        self._prefill_idle(IdleStep(rows=1, max_query=16, queries=16))

    def _decode_idle(self, idle: IdleStep) -> None:
        """Decode rows without keys, laid out like vLLM's in what kernels are compiled for; one query stands for all."""
        implementation, problem = self.layer.impl, self.layer.impl.problem
        rank, heads = problem.value_size, problem.q_heads
        dtype, cache_dtype = getattr(torch, problem.dtype), getattr(torch, problem.cache_dtype)
        step = idle.step(self.page_size, self.device)
        decode = self._build_decode(
            block_table_tensor=step.pages.table,
            seq_lens_device=step.lengths,
            max_seq_len=step.max_length,
            query_start_loc_device=step.query_starts,
            dcp_tot_seq_lens_device=None,
        )
        cache = torch.zeros(1, self.page_size, problem.head_size, dtype=cache_dtype, device=self.device)
        new = torch.zeros(idle.tokens, problem.head_size, dtype=dtype, device=self.device)
        latent, rope, nowhere = new[:, :rank], new[:, None, rank:], idle.no_slots(self.device)
        implementation.do_kv_cache_update(
            latent, rope, cache, nowhere, implementation.kv_cache_dtype, self.layer._k_scale
        )
        query = torch.zeros(1, heads, problem.head_size, dtype=dtype, device=self.device).expand(idle.tokens, -1, -1)
        pair = query[..., :rank], query[..., rank:]
        metadata = SimpleNamespace(num_reqs=idle.rows, num_actual_tokens=idle.tokens, decode=decode)
        implementation.forward_mqa(pair if self.dcp_world_size == 1 else query, cache, metadata, self.layer)

    def _prefill_idle(self, idle: IdleStep) -> None:
        """Prefill rows, whole and in two parts."""
        tokens, longest, layer = idle.tokens, idle.max_query, self.layer.impl
        dtype = self.model_config.dtype
        query = torch.zeros(tokens, layer.num_heads, layer.qk_head_dim, dtype=dtype, device=self.device)
        both = query.new_zeros(tokens, layer.num_heads, layer.qk_nope_head_dim + layer.v_head_dim)
        value = both[..., layer.qk_nope_head_dim :]
        parts = torch.empty(2, *value.shape, dtype=dtype, device=self.device)
        lses = torch.empty(2, tokens, layer.num_heads, device=self.device)
        starts = idle.step(self.page_size, self.device).query_starts
        layer.attend(query, query, value, starts, starts, CAUSAL, parts[0], None, longest, longest)
        layer.attend(query, query, value, starts, starts, CAUSAL, parts[0], lses[0], longest, longest)
        layer.attend(query, query, value, starts, starts, WHOLE, parts[1], lses[1], longest, longest)
        layer.prefill_kernels.merge(parts, lses, parts[0], lses[0])
        layer.prefill_kernels.merge(parts, lses, parts[0])

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """See `AttentionMetadataBuilder.build`; the chunks of a prefill's context are named once for all layers."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if metadata.prefill is not None:
            metadata.prefill.context_chunks = bridge.context_chunks(metadata.prefill)
            bridge.merge_all_rows(metadata.prefill)
        return metadata

    def _build_decode(
        self,
        *,
        block_table_tensor: torch.Tensor,
        seq_lens_device: torch.Tensor,
        max_seq_len: int,
        query_start_loc_device: torch.Tensor,
        dcp_tot_seq_lens_device: torch.Tensor | None,
        **_: Any,
    ) -> DecodeMetadata:
        """The step of the decoding rows, out of tensors that vLLM has on the device; its schedule is one launch."""
        step = Step(
            query_starts=query_start_loc_device,
            lengths=seq_lens_device,
            pages=PageTable(block_table_tensor, self.page_size),
            max_query=self.reorder_batch_threshold,
            max_length=max_seq_len,
        )
        self.workspace.prepare(step)
        return DecodeMetadata(block_table_tensor, seq_lens_device, dcp_tot_seq_lens_device, step, self.workspace)

    def update_draft_decode_metadata(self, metadata: Any) -> None:
        """Make the schedule of a draft's next step, from the lengths that its last one has left on the device."""
        metadata.decode.workspace.prepare(metadata.decode.step)
