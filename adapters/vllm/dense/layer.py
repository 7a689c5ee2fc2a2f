"""One layer's call: it stores new keys and values and calls one operation, which writes into vLLM's own output.

Nothing is filled or allocated per layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from taut.adapters.vllm import bridge
from taut.adapters.vllm.dense.builder import TautMetadata
from taut.adapters.vllm.dense.problems import ENCODERS, has_head_scales, problem_of_layer
from taut.adapters.vllm.selection import cache_dtype_refusals, refusal
from taut.adapters.vllm.serving import device, model_dtype, page_size, say_first_step, serving_kernels
from taut.common_kernels.step import Mask

if TYPE_CHECKING:
    from taut.common_kernels.kernels import Kernels


class TautImplementation(AttentionImpl[TautMetadata]):
    """One layer's attention. Its kernels are chosen when it is made, before the engine serves."""

    supports_dcp: bool = False
    supports_pcp: bool = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **extra: Any,
    ) -> None:
        unknown = [name for name, value in extra.items() if value not in (None, False, -1)]
        reasons = [f"the layer's argument {name}={extra[name]} is not supported" for name in unknown]
        reasons += cache_dtype_refusals(kv_cache_dtype)
        if reasons:
            raise ValueError(refusal(reasons))
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks
        self.alibi_slopes = (
            None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32, device=device())
        )
        reach = -1 if sliding_window is None else sliding_window - 1  # a window of W counts the query itself
        self.mask = Mask(left=reach, soft_cap=logits_soft_cap or 0.0)
        # An encoder sees as far ahead as it sees back.
        self.two_sided_mask = Mask(causal=False, left=reach, right=reach, soft_cap=logits_soft_cap or 0.0)
        self.problem = problem_of_layer(
            dtype=model_dtype(),
            kv_cache_dtype=kv_cache_dtype,
            q_heads=num_heads,
            kv_heads=self.num_kv_heads,
            head_size=head_size,
            page_size=page_size(),
            attn_type=attn_type,
            soft_cap=bool(logits_soft_cap),
            alibi=alibi_slopes is not None,
            sinks=sinks is not None,
            head_scales=has_head_scales(bridge.current_config()),
            left=reach,
        )
        self.kernels: Kernels = serving_kernels("dense", self.problem)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Sinks are loaded as weights, in the model's dtype; the kernels read them in float32."""
        if self.sinks is not None:
            self.sinks = self.sinks.detach().float()

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        *_: Any,
    ) -> None:
        """Store new keys and values; vLLM calls this before `forward`, once per layer that owns a cache."""
        if self.attn_type in ENCODERS:
            return
        keys, values = self._cache_views(kv_cache)
        self.kernels.store_kv(
            key, value, keys, values, slot_mapping, key_scale=layer._k_scale, value_scale=layer._v_scale
        )

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TautMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of one layer, written into `output` [T, Hq, D]."""
        if output_scale is not None or output_block_scale is not None:
            raise ValueError(refusal(["output quantised inside attention is not supported"]))
        if attn_metadata is None:
            # The profiling run measures memory without a cache: its output is never used but must be finite.
            return output.zero_()
        say_first_step(attn_metadata.step.rows, attn_metadata.num_actual_tokens)
        tokens = attn_metadata.num_actual_tokens
        mask = self.mask if attn_metadata.causal else self.two_sided_mask
        workspace = attn_metadata.workspace_of(self.problem, self.kernels)
        step = attn_metadata.step
        if self.attn_type in ENCODERS:
            self.kernels.ragged_attention(
                query[:tokens],
                key[:tokens],
                value[:tokens],
                step.query_starts,
                step.query_starts,
                mask,
                output[:tokens],
                scale=self.scale,
                max_query=step.max_query,
                max_length=step.max_query,
                sinks=self.sinks,
                alibi_slopes=self.alibi_slopes,
                workspace=workspace,
            )
            return output
        keys, values = self._cache_views(kv_cache)
        quantised = keys.dtype.itemsize == 1
        self.kernels.paged_attention(
            query[:tokens],
            keys,
            values,
            step,
            mask,
            output[:tokens],
            scale=self.scale,
            key_scale=layer._k_scale if quantised else None,
            value_scale=layer._v_scale if quantised else None,
            sinks=self.sinks,
            alibi_slopes=self.alibi_slopes,
            workspace=workspace,
        )
        return output

    def _cache_views(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if kv_cache.dtype == torch.uint8:  # vLLM keeps a quantised cache as bytes
            kv_cache = kv_cache.view(torch.float8_e4m3fn)
        return bridge.cache_views(kv_cache, self.head_size)
