"""SGLang's batches as steps of ours: one page table for all of them, `req_to_token` itself.

SGLang keeps a row of token slots for every request, and a batch names its rows. So the page table is that table, with
pages of one token and the batch's `req_pool_indices` for its rows: no list of indices is ever built. SGLang counts
lengths in 64 bits and our kernels in 32, and of rows with different numbers of new tokens it knows the numbers and we
need where they begin: two small buffers are filled once a step, on the device, in one launch each.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from taut.adapters.sglang import bridge
from taut.common_kernels.step import PageTable, Step
from taut.common_kernels.windowed_pages import windowed_step

if TYPE_CHECKING:
    from torch import Tensor

    from taut.common_kernels.kernels import Workspace
    from taut.common_kernels.problem import Problem


@dataclass(frozen=True)
class Batch:
    """A batch of SGLang's, of whichever kind, as far as the host knows it.

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


@dataclass
class TautMetadata:
    """One forward of SGLang's, for all layers.

    Args:
        batch: what the host knows of it.
        step: rows, lengths and pages.
        windowed: the step of layers whose keys lie in the windowed part of a hybrid pool; None where there is none.
        windowed_slots: [T] where the new tokens of such layers go.
        prepared: workspaces that are ready for this step, by problem and by whether its keys are windowed.
        whole_starts: [R + 1] int32: where each request begins when all its keys lie side by side.
    """

    batch: Batch
    step: Step
    windowed: Step | None = None
    windowed_slots: Tensor | None = None
    prepared: dict[tuple[Problem, bool], Workspace] = field(default_factory=dict)
    whole_starts: Tensor | None = None

    # Gemma 3 writes a mask for images into the metadata of whatever backend serves.
    mask_indptr: Any = None

    @property
    def custom_mask(self) -> None:
        """None: every mask of ours is causal, or an encoder's."""
        return

    @custom_mask.setter
    def custom_mask(self, mask: Any) -> None:
        if mask is not None:
            raise ValueError("taut attention cannot serve this batch: a mask of its own (custom_mask) is not supported")


class Steps:
    """Makes steps, and owns the buffers that their lengths and starts lie in.

    One batch at a time: the buffers hold the step that was filled last, as the stream's order has it.

    Args:
        table: [requests, context] int32, SGLang's `req_to_token`.
        max_rows: the most requests of a batch; more are made room for.
        translation: [slots] from a slot of a hybrid pool to that of its windowed layers; None for other pools.
        window: how far back those layers see, the token itself not counted.
    """

    def __init__(self, table: Tensor, max_rows: int, translation: Tensor | None = None, window: int = 0) -> None:
        self.table = table
        self.translation = translation
        self.window = window
        self.max_rows = 0
        self.reserve(max_rows)

    def reserve(self, max_rows: int) -> None:
        """Make room for batches of so many requests; steps made before keep the buffers they have."""
        if max_rows <= self.max_rows:
            return
        device = self.table.device
        self.max_rows = max_rows
        self._lengths = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._starts = torch.zeros(max_rows + 1, dtype=torch.int32, device=device)
        self._even_starts: dict[int, Tensor] = {}
        self.even_starts(1)

    def even_starts(self, queries: int) -> Tensor:
        """[max_rows + 1] int32: where rows begin that have the same number of queries; made once for each number."""
        if queries not in self._even_starts:
            self._even_starts[queries] = (
                torch.arange(self.max_rows + 1, dtype=torch.int32, device=self.table.device) * queries
            )
        return self._even_starts[queries]

    def metadata(self, batch: Batch) -> TautMetadata:
        """The metadata of a batch: views only; `fill` must follow, or be replayed, before a layer reads it."""
        self.reserve(batch.rows)
        starts = self.even_starts(batch.queries) if batch.queries else self._starts
        step = Step(
            query_starts=starts[: batch.rows + 1],
            lengths=self._lengths[: batch.rows],
            pages=PageTable(self.table, 1, batch.request_rows),
            max_query=batch.max_query,
            max_length=int(self.table.shape[1]),
        )
        return TautMetadata(batch, step)

    def fill(self, metadata: TautMetadata) -> None:
        """Fill the buffers of a step on the device; safe to capture in a graph."""
        batch, step = metadata.batch, metadata.step
        torch.add(batch.seq_lens, batch.uncounted, out=step.lengths)
        if batch.counts is not None:
            torch.cumsum(batch.counts, 0, dtype=torch.int32, out=step.query_starts[1:])
        if self.translation is not None:  # filled again, it lies where it lay: a graph may read it
            metadata.windowed = windowed_step(step, self.translation, self.window, metadata.windowed)
