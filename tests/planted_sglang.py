"""A bad backend of SGLang's for the audit to find: it answers with the query, with one waste of each kind a layer."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend


class Backend(AttentionBackend):
    def __init__(self, runner: Any) -> None:
        super().__init__()
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.req_to_token_pool = runner.req_to_token_pool

    def init_forward_metadata(self, _: Any) -> None:
        pass

    def forward_decode(self, q: Any, *others: Any, **__: Any) -> Any:
        _key, _value, _layer, forward_batch, *_ = others
        q.zero_()  # planted: fills
        forward_batch.seq_lens[0].item()  # planted: syncs
        scratch = torch.empty_like(q)  # planted: allocations
        scratch.copy_(q)  # planted: copies
        return q

    forward_extend = forward_decode
