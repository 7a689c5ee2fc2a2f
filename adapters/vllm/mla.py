"""vLLM's multi-head latent attention (MLA) on our kernels: the backend, the metadata builder and the implementation.

vLLM splits a step into rows that decode and rows that prefill, and hands each part over on its own:

* Decode (`forward_mqa`) reads the cached latent vectors through one schedule a step. It takes the two parts of the
  query as vLLM has them, and its result takes the place of the first: nothing is concatenated, filled or allocated.
* Prefill (`forward_mha`) multiplies keys and values out and writes into vLLM's own output. What earlier steps have
  cached is gathered in the chunks that vLLM has planned on the host; each is attended to by itself and merged.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonBackend,
    MLACommonDecodeMetadata,
    MLACommonImpl,
    MLACommonMetadataBuilder,
    QueryLenSupport,
)
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType, MultipleOf

from taut.adapters.vllm import bridge
from taut.adapters.vllm.selection import refusal, selection
from taut.adapters.vllm.shared import (
    CACHE_DTYPES,
    MemberBackend,
    cache_dtype_refusal,
    class_for,
    device,
    model_dtype,
    page_size,
    say_first_step,
    serving_kernels,
    table_path,
)
from taut.common_kernels.compiling import compile_ahead, powers
from taut.common_kernels.problem import Problem
from taut.common_kernels.providers import registry
from taut.common_kernels.step import Mask, PageTable, Step
from taut.common_kernels.targets import target_of

if TYPE_CHECKING:
    from taut.common_kernels.kernels import Kernels, Workspace

CAUSAL, WHOLE = Mask(causal=True), Mask(causal=False)
# A page that is one tile of keys: the fewest page numbers to read, and the simplest addresses.
GPU_PAGE = 64


def decode_problem(
    *, dtype: torch.dtype, kv_cache_dtype: str | None, q_heads: int, head_size: int, rank: int, page_size: int
) -> Problem:
    """What the decode of a layer asks of our kernels; `head_size` is that of a cached token, `rank` of its latent."""
    name = str(dtype).removeprefix("torch.")
    return Problem(
        operation="mla_decode",
        target=target_of(device()),
        dtype=name,
        cache_dtype=CACHE_DTYPES.get(kv_cache_dtype or "auto", name),
        q_heads=q_heads,
        kv_heads=1,
        head_size=head_size,
        value_size=rank,
        page_size=page_size,
        features=frozenset({"causal"}),
    )


def prefill_problem(*, dtype: torch.dtype, heads: int, key_size: int, value_size: int) -> Problem:
    """What the prefill of a layer asks of our kernels: keys and values multiplied out, one of each per query head."""
    name = str(dtype).removeprefix("torch.")
    return Problem(
        operation="ragged_attention",
        target=target_of(device()),
        dtype=name,
        cache_dtype=name,
        q_heads=heads,
        kv_heads=heads,
        head_size=key_size,
        value_size=value_size,
        page_size=0,
        features=frozenset({"causal", "non_causal", "lse"}),
    )


@dataclass
class DecodeMetadata(MLACommonDecodeMetadata):
    """The rows of a step that decode.

    Args:
        step: rows, lengths and pages.
        workspace: what the kernels of this group's layers need, prepared for this step.
    """

    step: Step
    workspace: Workspace


class Prefill:
    """Our prefill in the form of one of vLLM's, for what calls those: context parallelism, and models of their own.

    Args:
        kernels: who computes.
        workspace: what they need for it.
        scale: of the scores.
    """

    def __init__(self, kernels: Kernels, workspace: Workspace, scale: float) -> None:
        self.kernels = kernels
        self.workspace = workspace
        self.scale = scale
        self.metadata: Any = None

    @staticmethod
    def get_name() -> str:
        """No member of vLLM's list of prefill backends."""
        return "TAUT"

    def prepare_metadata(self, prefill_metadata: Any) -> None:
        """Take the prefilling rows of a step; nothing is computed."""
        self.metadata = prefill_metadata

    def run_prefill_new_tokens(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        return_softmax_lse: bool,
        out: torch.Tensor | None = None,
        **_: Any,
    ) -> Any:
        """New tokens against each other: q [T, Hq, D], k [T, Hq, D], v [T, Hq, V].

        Returns:
            [T, Hq, V], which is `out` if that is given; with `return_softmax_lse` also the LSE, [Hq, T] float32.
        """
        starts, longest = self.metadata.query_start_loc, self.metadata.max_query_len
        return self._attend(q, k, v, starts, longest, starts, longest, CAUSAL, return_softmax_lse, out)

    def run_prefill_context_chunk(
        self,
        chunk: Any = None,
        *,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        chunk_idx: int = 0,
        out: torch.Tensor | None = None,
    ) -> Any:
        """New tokens against a chunk of what is cached: output [T, Hq, V] and LSE [Hq, T] float32.

        Args:
            chunk: the chunk itself, where vLLM gives that.
            q: [T, Hq, D].
            k: [K, Hq, D].
            v: [K, Hq, V].
            chunk_idx: its number, where vLLM gives that.
            out: [T, Hq, V]; None to have one made.
        """
        part = self.metadata.parts[chunk_idx if chunk is None else chunk.index]
        return self._attend(
            q, k, v, part.query_starts, part.max_query, part.key_starts, part.max_length, WHOLE, True, out
        )

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_starts: torch.Tensor,
        max_query: int,
        key_starts: torch.Tensor,
        max_length: int,
        mask: Mask,
        return_lse: bool,
        out: torch.Tensor | None,
    ) -> Any:
        tokens, heads = query.shape[:2]
        if out is None:
            out = query.new_empty(tokens, heads, value.shape[2])
        lse = query.new_empty(heads, tokens, dtype=torch.float32) if return_lse else None
        self.kernels.ragged_attention(
            query,
            key,
            value,
            query_starts,
            key_starts,
            mask,
            out,
            scale=self.scale,
            max_query=max_query,
            max_length=max_length,
            lse=None if lse is None else lse.t(),
            workspace=self.workspace,
        )
        return out if lse is None else (out, lse)


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
        provider = registry().choose(problem, selection().kernels).provider
        return AttentionCGSupport.UNIFORM_BATCH if provider.graphs else AttentionCGSupport.NEVER

    @staticmethod
    def determine_prefill_query_data_type(vllm_config: Any, model_dtype: torch.dtype) -> torch.dtype:  # noqa: ARG004
        """Queries of a prefill keep the model's dtype."""
        return model_dtype

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # The layers of a group share the shape of their cache: one schedule and one scratch serve them all.
        self.layer = bridge.layers(vllm_config, layer_names)[0]
        implementation: TautMLAImplementation = self.layer.impl
        prefill = Prefill(implementation.prefill_kernels, implementation.prefill_workspace, implementation.scale)
        bridge.prefill_through(self, prefill)
        self.page_size = kv_cache_spec.block_size
        problem = replace(implementation.problem, page_size=self.page_size, max_query=self.reorder_batch_threshold)
        rows = vllm_config.scheduler_config.max_num_seqs
        self.workspace = implementation.kernels.workspace(
            problem, rows, rows * self.reorder_batch_threshold, str(device), table_path()
        )
        # A draft's steps may be captured with the making of their schedules, if that can be captured; the lengths of a
        # rank's share are not kept on the device between them.
        graphs = registry().choose(implementation.problem, selection().kernels).provider.graphs
        self.supports_draft_decode_metadata_update = graphs and self.dcp_world_size == 1
        if device.type == "cuda":
            compile_ahead(self.warm_up)
            self.warm_up()

    def warm_up(self) -> None:
        """Run decode and prefill over idle steps, so that nothing compiles while the model serves.

        Decode runs over 1, 2, 4, ... rows without keys: kernels are compiled for the number of rows.
        """
        for rows in powers(self.vllm_config.scheduler_config.max_num_seqs):
            self._decode_idle(rows)
        self._prefill_idle()

    def _decode_idle(self, rows: int) -> None:
        """Decode rows without keys, laid out like vLLM's in what kernels are compiled for; one query stands for all."""
        implementation, problem = self.layer.impl, self.layer.impl.problem
        rank, heads = problem.value_size, problem.q_heads
        dtype, cache_dtype = getattr(torch, problem.dtype), getattr(torch, problem.cache_dtype)
        starts = torch.arange(rows + 1, dtype=torch.int32, device=self.device)
        decode = self._build_decode(
            block_table_tensor=torch.zeros(rows, 1, dtype=torch.int32, device=self.device),
            seq_lens_device=torch.zeros_like(starts[1:]),
            max_seq_len=1,
            query_start_loc_device=starts,
            dcp_tot_seq_lens_device=None,
        )
        cache = torch.zeros(1, self.page_size, problem.head_size, dtype=cache_dtype, device=self.device)
        new = torch.zeros(rows, problem.head_size, dtype=dtype, device=self.device)
        nowhere = torch.full((rows,), -1, dtype=torch.int64, device=self.device)
        implementation.do_kv_cache_update(
            new[:, :rank], new[:, None, rank:], cache, nowhere, implementation.kv_cache_dtype, self.layer._k_scale
        )
        queries = torch.zeros(1, heads, problem.head_size, dtype=dtype, device=self.device).expand(rows, -1, -1)
        pair = queries[..., :rank], queries[..., rank:]
        metadata = SimpleNamespace(num_reqs=rows, num_actual_tokens=rows, decode=decode)
        implementation.forward_mqa(pair if self.dcp_world_size == 1 else queries, cache, metadata, self.layer)

    def _prefill_idle(self) -> None:
        """Prefill one row, whole and in two parts."""
        tokens, layer = 16, self.layer.impl
        dtype = self.model_config.dtype
        query = torch.zeros(tokens, layer.num_heads, layer.qk_head_dim, dtype=dtype, device=self.device)
        both = query.new_zeros(tokens, layer.num_heads, layer.qk_nope_head_dim + layer.v_head_dim)
        value = both[..., layer.qk_nope_head_dim :]
        parts = torch.empty(2, *value.shape, dtype=dtype, device=self.device)
        lses = torch.empty(2, tokens, layer.num_heads, device=self.device)
        starts = torch.tensor([0, tokens], dtype=torch.int32, device=self.device)
        layer._attend(query, query, value, starts, starts, CAUSAL, parts[0], None, tokens, tokens)
        layer._attend(query, query, value, starts, starts, CAUSAL, parts[0], lses[0], tokens, tokens)
        layer._attend(query, query, value, starts, starts, WHOLE, parts[1], lses[1], tokens, tokens)
        layer.prefill_kernels.merge(parts, lses, parts[0], lses[0])
        layer.prefill_kernels.merge(parts, lses, parts[0])

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """See `AttentionMetadataBuilder.build`; the chunks of a prefill's context are named once for all layers."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if metadata.prefill is not None:
            metadata.prefill.parts = bridge.context_chunks(metadata.prefill)
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


class TautMLAImplementation(MLACommonImpl[Any]):
    """One layer's attention. Its kernels are chosen when it is made, before the engine serves."""

    can_return_lse_for_decode: bool = True
    lse_base_on_e: bool = True
    supports_dcp: bool = True

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None,
        attn_type: str,
        kv_sharing_target_layer_name: str | None,
        **mla: Any,
    ) -> None:
        unserved = {
            "ALiBi": alibi_slopes,
            "a sliding window": sliding_window,
            "a soft cap": logits_soft_cap,
            "sharing of a cache between layers": kv_sharing_target_layer_name,
            "a sparse indexer": mla.get("indexer"),
            f"attention of the type {attn_type}": attn_type != AttentionType.DECODER,
        }
        reasons = [f"{what} is not supported in latent attention" for what, asked in unserved.items() if asked]
        wrong_cache = cache_dtype_refusal(kv_cache_dtype)
        if reasons or wrong_cache:
            raise ValueError(refusal(reasons + ([wrong_cache] if wrong_cache else [])))
        context_parallel = self.dcp_world_size  # vLLM's own constructor forgets it until the first step
        super().__init__(
            num_heads,
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            **mla,
        )
        self.supports_quant_query_input = False  # a quantised cache is read with queries of the model's dtype
        dtype = model_dtype()
        decode = decode_problem(
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            q_heads=num_heads * context_parallel,
            head_size=head_size,
            rank=self.kv_lora_rank,
            page_size=page_size(),
        )
        if self.need_to_return_lse_for_decode:
            decode = replace(decode, features=decode.features | {"lse"})
        self.problem = decode
        self.kernels: Kernels = serving_kernels("MLA", decode)
        prefill = prefill_problem(dtype=dtype, heads=num_heads, key_size=self.qk_head_dim, value_size=self.v_head_dim)
        self.prefill_kernels: Kernels = serving_kernels("MLA", prefill)
        self.prefill_workspace = self.prefill_kernels.workspace(prefill, 0, 0, str(device()), table_path())

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """No: vLLM then quantises the output by itself."""
        return False

    def do_kv_cache_update(
        self,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache_dtype: str,
        k_scale: torch.Tensor,
        *_: Any,
    ) -> None:
        """Store new latent [T, C] and rope vectors [T, 1, E] in the cache [N, P, C + E], in one launch."""
        if kv_cache.numel() == 0:  # the profiling run has none
            return
        self.kernels.store_mla_kv(
            kv_c_normed, k_pe.squeeze(1), _as_numbers(kv_cache), slot_mapping.flatten(), cache_scale=k_scale
        )

    def forward_mha(
        self,
        q: torch.Tensor,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: Any,
        k_scale: torch.Tensor,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
    ) -> None:
        """Prefilling rows, keys and values multiplied out, written into `output`.

        Args:
            q: [T, Hq, D].
            kv_c_normed: [T, C], new latent vectors.
            k_pe: [T, 1, E], new rope vectors.
            kv_c_and_k_pe_cache: [N, P, C + E].
            attn_metadata: of this step.
            k_scale: of a quantised cache.
            output: [T, Hq * V], written whole.
            output_scale: never given, see `fused_output_quant_supported`.
        """
        if output_scale is not None:
            raise ValueError(refusal(["output quantised inside attention is not supported"]))
        say_first_step(attn_metadata.num_reqs, attn_metadata.num_actual_tokens)
        prefill = attn_metadata.prefill
        chunks = prefill.parts
        if chunks and self.dcp_world_size > 1:  # vLLM gathers from all ranks, and attends through `Prefill`
            super().forward_mha(q, kv_c_normed, k_pe, kv_c_and_k_pe_cache, attn_metadata, k_scale, output)
            return
        out = output.view(-1, self.num_heads, self.v_head_dim)
        starts, longest, rank = prefill.query_start_loc, prefill.max_query_len, self.kv_lora_rank
        key, value = self._multiplied_out(kv_c_normed, k_pe)
        if not chunks:
            self._attend(q, key, value, starts, starts, CAUSAL, out, None, longest, longest)
            return
        # Two parts at a time: what has been attended to so far, and the next chunk.
        parts = q.new_empty(2, *out.shape)
        lses = q.new_empty(2, *out.shape[:2], dtype=torch.float32)
        self._attend(q, key, value, starts, starts, CAUSAL, parts[0], lses[0], longest, longest)
        del key, value  # large: the keys of a chunk take the memory of those before
        for chunk in chunks:
            last = chunk is chunks[-1]
            rows = slice(None) if last else chunk.tokens
            if last and len(range(*chunk.tokens.indices(len(out)))) < len(out):
                lses[1].fill_(-torch.inf)  # a part of this LSE is not read: rows without a share in this chunk
            gathered = bridge.gather_context(kv_c_and_k_pe_cache, chunk, self.kv_cache_dtype, k_scale)
            key, value = self._multiplied_out(gathered[:, :rank], gathered[:, None, rank:])
            self._attend(
                q[chunk.tokens],
                key,
                value,
                chunk.query_starts,
                chunk.key_starts,
                WHOLE,
                parts[1, chunk.tokens],
                lses[1, chunk.tokens],
                chunk.max_query,
                chunk.max_length,
            )
            del key, value
            self.prefill_kernels.merge(
                parts[:, rows],
                lses[:, rows],
                out if last else parts[0, rows],
                None if last else lses[0, rows],
            )

    def forward_mqa(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: Any,
        layer: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Decoding rows in the absorbed form.

        Args:
            q: [T, Hq, C] and [T, Hq, E], the first of which is written over: vLLM made it for this call. Under decode
                context parallelism one tensor that holds both, of the heads of all ranks.
            kv_c_and_k_pe_cache: [N, P, C + E].
            attn_metadata: of this step.
            layer: it holds the scale of a quantised cache.

        Returns:
            [T, Hq, C]; and under decode context parallelism the natural log-sum-exp, [T, Hq] float32, else None.
        """
        say_first_step(attn_metadata.num_reqs, attn_metadata.num_actual_tokens)
        if isinstance(q, tuple):
            q_nope, q_pe = q
            out = q_nope
        else:
            q_nope, q_pe = q[..., : self.kv_lora_rank], q[..., self.kv_lora_rank :]
            out = q_nope.new_empty(q_nope.shape)
        lse = q_nope.new_empty(q_nope.shape[:2], dtype=torch.float32) if self.need_to_return_lse_for_decode else None
        decode = attn_metadata.decode
        quantised = kv_c_and_k_pe_cache.dtype.itemsize == 1
        self.kernels.mla_decode(
            q_nope,
            q_pe,
            _as_numbers(kv_c_and_k_pe_cache),
            decode.step,
            out,
            scale=self.scale,
            lse=lse,
            cache_scale=layer._k_scale if quantised else None,
            workspace=decode.workspace,
        )
        return out, lse

    def _multiplied_out(self, latent: torch.Tensor, rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [K, Hq, D] and values [K, Hq, V] of latent [K, C] and rope vectors [K, 1, E]."""
        both = self.kv_b_proj(latent)[0].view(-1, self.num_heads, self.qk_nope_head_dim + self.v_head_dim)
        nope, value = both[..., : self.qk_nope_head_dim], both[..., self.qk_nope_head_dim :]
        return self._concat_k_nope_k_pe(nope, rope), value

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_starts: torch.Tensor,
        key_starts: torch.Tensor,
        mask: Mask,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        max_query: int,
        max_length: int,
    ) -> None:
        self.prefill_kernels.ragged_attention(
            query,
            key,
            value,
            query_starts,
            key_starts,
            mask,
            out,
            scale=self.scale,
            max_query=max_query,
            max_length=max_length,
            lse=lse,
            workspace=self.prefill_workspace,
        )


def _as_numbers(cache: torch.Tensor) -> torch.Tensor:
    """A cache that vLLM keeps as bytes, as the e4m3 numbers that they are."""
    return cache.view(torch.float8_e4m3fn) if cache.dtype == torch.uint8 else cache


class TautMLABackend(MemberBackend, MLACommonBackend):
    """What vLLM asks of a backend for latent attention."""

    kind: ClassVar[str] = "MLA"
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", *CACHE_DTYPES]

    @staticmethod
    def get_impl_cls() -> type[TautMLAImplementation]:
        """The implementation."""
        return TautMLAImplementation

    @staticmethod
    def get_builder_cls() -> type[TautMLAMetadataBuilder]:
        """The metadata builder."""
        return TautMLAMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(*_: Any) -> list[int | MultipleOf]:
        """Pages of whole tiles of 16 tokens: smaller ones would spill with many heads."""
        return [MultipleOf(16)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Pages that are one tile of keys, on a GPU, unless the user has named a size."""
        return default_block_size if device().type == "cpu" else max(default_block_size, GPU_PAGE)

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """Pages outermost, where layers share one allocation: every kernel reads the strides."""
        return (1, 0, 2, 3) if include_num_layers_dimension else (0, 1, 2)

    @classmethod
    def problems_asked(cls, asked: dict[str, Any]) -> list[Problem]:
        """Decode and prefill of the layer that vLLM asks about; what is not asked is the model's."""
        config = bridge.current_config()
        model = getattr(config, "model_config", None)
        text = getattr(model, "hf_text_config", None)
        head_size = asked["head_size"]
        rank = getattr(text, "kv_lora_rank", None) or head_size - 64
        heads = model.get_num_attention_heads(config.parallel_config) if config is not None and model is not None else 1
        decode = decode_problem(
            dtype=asked["dtype"],
            kv_cache_dtype=asked.get("kv_cache_dtype"),
            q_heads=heads,
            head_size=head_size,
            rank=rank,
            page_size=asked.get("block_size") or page_size(),
        )
        nope, value_size = getattr(text, "qk_nope_head_dim", None), getattr(text, "v_head_dim", None)
        if nope is None or value_size is None:
            return [decode]
        key_size = nope + head_size - rank
        return [decode, prefill_problem(dtype=asked["dtype"], heads=heads, key_size=key_size, value_size=value_size)]


def backend_for(member: str) -> type[TautMLABackend]:
    """The class that stands for a member of vLLM's `AttentionBackendEnum`; always the same one."""
    return class_for(TautMLABackend, member)
