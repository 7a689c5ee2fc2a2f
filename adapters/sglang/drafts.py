"""A draft model's attention in the steps that it runs ahead, one after the other, between two verifications.

SGLang plans all of these steps at once, from one batch that counts none of their tokens. So each step has a backend of
its own, with lengths, a schedule and scratch of its own, which counts what the steps before it have appended. Drafts
are chains (see `refuse_trees`): their tokens lie in the slots that `req_to_token` has for them already.
"""

from __future__ import annotations

from typing import Any

from taut.adapters.sglang.backend import TautBackend


class TautDraftBackend:
    """What SGLang asks of the backends of those steps, as one.

    Args:
        model_runner: SGLang's, of the draft model.
        steps: tokens of a draft. The first comes from the step that took in what was accepted, so steps are one fewer.

    Raises:
        ValueError: a layer cannot be served; the message holds every reason.

    Attributes:
        attn_backends: of each step.
    """

    needs_cpu_seq_lens = False

    def __init__(self, model_runner: Any, steps: int) -> None:
        self.attn_backends = [TautBackend(model_runner, ahead=step) for step in range(1, steps)]
        # The mode of the batch that a graph was captured with, which a replay may not have.
        self._captured_in: Any = None

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int, *_: Any, **__: Any) -> None:
        """Room for whatever a graph holds, before the first is captured."""
        for backend in self.attn_backends:
            backend.init_cuda_graph_state(max_bs, max_num_tokens)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Of steps that no graph holds."""
        for backend in self.attn_backends:
            backend.init_forward_metadata(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Before a graph of all steps is captured, and before it is replayed."""
        for backend in self.attn_backends:
            backend.init_forward_metadata_out_graph(forward_batch, in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """What that graph holds of the metadata."""
        for backend in self.attn_backends:
            backend.init_forward_metadata_in_graph(forward_batch)

    def init_forward_metadata_capture_cuda_graph(self, forward_batch: Any) -> None:
        """Releases before 0.5.13: before the graph is captured."""
        rows, self._captured_in = forward_batch.batch_size, forward_batch.forward_mode
        for backend in self.attn_backends:
            backend.init_forward_metadata_capture_cuda_graph(
                rows,
                rows,
                forward_batch.req_pool_indices,
                forward_batch.seq_lens,
                None,
                self._captured_in,
                forward_batch.spec_info,
            )

    def init_forward_metadata_replay_cuda_graph(self, forward_batch: Any, bs: int) -> None:
        """Releases before 0.5.13: before it is replayed, over `bs` requests, padding among them."""
        for backend in self.attn_backends:
            backend.init_forward_metadata_replay_cuda_graph(
                bs,
                forward_batch.req_pool_indices,
                forward_batch.seq_lens,
                0,
                None,
                self._captured_in,
                forward_batch.spec_info,
            )
