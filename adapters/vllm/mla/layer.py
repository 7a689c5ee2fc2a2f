"""One layer's call, for rows that decode and for rows that prefill.

* Decode (`forward_mqa`) reads the cached latent vectors through one schedule a step. It takes the two parts of the
  query as vLLM has them, and its result takes the place of the first: nothing is concatenated, filled or allocated.
* Prefill (`forward_mha`) multiplies keys and values out and writes into vLLM's own output. What earlier steps have
  cached is gathered in the chunks that vLLM has planned on the host; each is attended to by itself and merged.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.attention.mla_attention import MLACommonImpl
from vllm.v1.attention.backend import AttentionType

from taut.adapters.vllm import bridge
from taut.adapters.vllm.mla.problems import decode_problem, prefill_problem
from taut.adapters.vllm.selection import cache_dtype_refusals, refusal
from taut.adapters.vllm.serving import device, model_dtype, page_size, say_first_step, serving_kernels, table_path
from taut.common_kernels.step import Mask

if TYPE_CHECKING:
    from taut.common_kernels.kernels import Kernels

CAUSAL, WHOLE = Mask(causal=True), Mask(causal=False)


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
        reasons += cache_dtype_refusals(kv_cache_dtype)
        if reasons:
            raise ValueError(refusal(reasons))
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
        chunks = prefill.context_chunks
        if chunks and self.dcp_world_size > 1:  # vLLM gathers from all ranks, and attends through `Prefill`
            super().forward_mha(q, kv_c_normed, k_pe, kv_c_and_k_pe_cache, attn_metadata, k_scale, output)
            return
        out = output.view(-1, self.num_heads, self.v_head_dim)
        starts, longest, rank = prefill.query_start_loc, prefill.max_query_len, self.kv_lora_rank
        key, value = self._multiplied_out(kv_c_normed, k_pe)
        if not chunks:
            self.attend(q, key, value, starts, starts, CAUSAL, out, None, longest, longest)
            return
        # Two parts at a time: what has been attended to so far, and the next chunk.
        parts = q.new_empty(2, *out.shape)
        lses = q.new_empty(2, *out.shape[:2], dtype=torch.float32)
        self.attend(q, key, value, starts, starts, CAUSAL, parts[0], lses[0], longest, longest)
        del key, value  # large: the keys of a chunk take the memory of those before
        for chunk in chunks:
            last = chunk is chunks[-1]
            rows = slice(None) if last else chunk.tokens
            if last and len(range(*chunk.tokens.indices(len(out)))) < len(out):
                lses[1].fill_(-torch.inf)  # a part of this LSE is not read: rows without a share in this chunk
            gathered = bridge.gather_context(kv_c_and_k_pe_cache, chunk, self.kv_cache_dtype, k_scale)
            key, value = self._multiplied_out(gathered[:, :rank], gathered[:, None, rank:])
            self.attend(
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

    def attend(
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
        """Attention among keys that are multiplied out.

        Args:
            query: [T, Hq, D].
            key: [K, Hq, D].
            value: [K, Hq, V].
            query_starts: [R + 1] int32.
            key_starts: [R + 1] int32.
            mask: `CAUSAL` among new tokens, `WHOLE` over what was cached before them.
            out: [T, Hq, V], written whole.
            lse: [T, Hq] float32, written if given.
            max_query: the most queries of a row.
            max_length: the most keys of a row.
        """
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
