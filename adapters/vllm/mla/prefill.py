"""Our prefill in a form in which vLLM's own code calls it: under context parallelism, and in models of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from taut.adapters.vllm.mla.layer import CAUSAL, WHOLE

if TYPE_CHECKING:
    from taut.adapters.vllm.mla.layer import TautMLAImplementation
    from taut.common_kernels.step import Mask


class Prefill:
    """What vLLM calls of a prefill backend.

    Args:
        layer: one of those that it prefills for.
    """

    def __init__(self, layer: TautMLAImplementation) -> None:
        self.layer = layer
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
        return self._attend(q, k, v, starts, starts, CAUSAL, out, return_softmax_lse, longest, longest)

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
        ours = self.metadata.context_chunks[chunk_idx if chunk is None else chunk.index]
        return self._attend(
            q, k, v, ours.query_starts, ours.key_starts, WHOLE, out, True, ours.max_query, ours.max_length
        )

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_starts: torch.Tensor,
        key_starts: torch.Tensor,
        mask: Mask,
        out: torch.Tensor | None,
        wants_lse: bool,
        max_query: int,
        max_length: int,
    ) -> Any:
        tokens, heads = query.shape[:2]
        if out is None:
            out = query.new_empty(tokens, heads, value.shape[2])
        lse = query.new_empty(heads, tokens, dtype=torch.float32) if wants_lse else None
        transposed = None if lse is None else lse.t()
        self.layer.attend(query, key, value, query_starts, key_starts, mask, out, transposed, max_query, max_length)
        return out if lse is None else (out, lse)
