"""A bad backend of vLLM's for the audit to find: vLLM's own of a CPU, with one waste of each kind a layer."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl


class Implementation(CPUAttentionBackendImpl):
    def forward(
        self,
        layer: Any,
        query: Any,
        key: Any,
        value: Any,
        kv_cache: Any,
        attn_metadata: Any,
        output: Any,
        **named: Any,
    ) -> Any:
        if attn_metadata is not None:
            output.zero_()  # planted: fills
            attn_metadata.seq_lens[0].item()  # planted: syncs
            scratch = torch.empty_like(query)  # planted: allocations
            scratch.copy_(query)  # planted: copies
        return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, **named)


class Backend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[Implementation]:
        return Implementation
