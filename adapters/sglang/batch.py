"""A batch of SGLang's, of whichever kind, as far as the host knows it: what a step is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from taut.adapters.sglang import bridge

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Requests that SGLang computes together.

    Args:
        request_rows: [R] which row of `req_to_token` belongs to each request.
        seq_lens: [R] tokens of each request; without the new ones where `uncounted` is not 0.
        tokens: T, padding included.
        queries: new tokens of every request where all have the same number; 0 where they differ.
        counts: [R] new tokens of each request where they differ; None where they do not.
        max_query: host bound on the new tokens of one request.
        uncounted: new tokens of each request that `seq_lens` leaves out.
    """

    request_rows: Tensor
    seq_lens: Tensor
    tokens: int
    queries: int = 1
    counts: Tensor | None = None
    max_query: int = 1
    uncounted: int = 0

    @property
    def rows(self) -> int:
        """R, padded requests of a captured graph included."""
        return int(self.seq_lens.shape[0])


def batch_of(forward_batch: Any, *, in_graph: bool, ahead: int = 0) -> Batch:
    """A `ForwardBatch` of SGLang's.

    Args:
        forward_batch: of any mode but idle.
        in_graph: whether it is about to be captured or replayed: then nothing but shapes may be asked of it.
        ahead: tokens that each request has got in a decode step beyond what the batch counts.

    Raises:
        ValueError: it verifies a tree of drafts.
    """
    mode, rows = forward_batch.forward_mode, forward_batch.batch_size
    request_rows, seq_lens = forward_batch.req_pool_indices[:rows], forward_batch.seq_lens[:rows]
    if mode.is_decode_or_idle():
        return Batch(request_rows, seq_lens, rows, uncounted=ahead)
    tokens = int(forward_batch.input_ids.shape[0])
    if mode.is_target_verify():
        refuse_trees(forward_batch.spec_info)
        queries = int(getattr(forward_batch.spec_info, "draft_token_num", None) or tokens // rows)
        return Batch(request_rows, seq_lens, tokens, queries, None, queries, queries)
    if in_graph and is_draft_extend(mode):
        return Batch(request_rows, seq_lens, tokens, tokens // rows, None, tokens // rows)
    counts_on_host = None if in_graph else forward_batch.extend_seq_lens_cpu
    longest = max(counts_on_host[:rows], default=0) if counts_on_host is not None else tokens
    return Batch(request_rows, seq_lens, tokens, 0, forward_batch.extend_seq_lens[:rows], int(longest))


def refuse_trees(drafts: Any) -> None:
    """Let pass what verifies a chain of drafts; the mask of a tree is not one of ours.

    `argument_refusals` says so before SGLang serves: this is for who builds batches without its arguments.

    Raises:
        ValueError: the drafts are a tree.
    """
    if bridge.is_tree(drafts):
        raise ValueError(
            "taut attention cannot serve this batch: it verifies a tree of drafts, and a mask of its own (custom_mask) "
            "is not supported, only chains: --speculative-eagle-topk 1"
        )


def is_draft_extend(mode: Any) -> bool:
    """Whether a draft model takes in what was accepted, in either of SGLang's ways."""
    return any(
        ask()
        for ask in (getattr(mode, name, None) for name in ("is_draft_extend", "is_draft_extend_v2"))
        if ask is not None
    )
