"""What SGLang asks of a backend: one for dense models and for MLA, for both kinds of graph metadata.

A forward makes one `Step` out of tensors that SGLang already has on the device: nothing is waited for on the host. A
layer then stores its new keys and values straight into SGLang's pool and calls one operation, which writes into the
tensor that SGLang offers for its output, or into a new one that nobody fills.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from taut.adapters.sglang import bridge, selection
from taut.adapters.sglang.batch import Batch, batch_of, refuse_trees
from taut.adapters.sglang.builder import Builder, Steps, TautMetadata
from taut.adapters.sglang.forms import mla_form
from taut.adapters.sglang.layer import Attention
from taut.adapters.sglang.service import Services, Surroundings
from taut.adapters.sglang.warm_up import warm_up_layers

if TYPE_CHECKING:
    from torch import Tensor


class TautBackend(AttentionBackend):
    """The backend of a model.

    Args:
        model_runner: SGLang's; its model is loaded and its pools are made.
        ahead: how many tokens ahead of the lengths that a batch gives its decode steps are; see `drafts`.

    Raises:
        ValueError: a layer cannot be served; the message holds every reason.

    Attributes:
        req_to_token_pool: SGLang finds the pools of a forward through its backend.
        forward_metadata: of the forward that is running.
        max_context_len: tokens that a request may have at most: what SGLang makes the mask of drafts by, where the host
            does not know lengths.
        services: how each layer is served.
        delegates: who does its work: to `taut audit` their lines are the backend's own.
    """

    needs_cpu_seq_lens = False

    def __init__(self, model_runner: Any, ahead: int = 0) -> None:
        super().__init__()
        self.ahead = ahead
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.forward_metadata: TautMetadata | None = None
        table = self.req_to_token_pool.req_to_token
        self.max_context_len = int(table.shape[1])
        arguments = model_runner.server_args
        reasons = selection.argument_refusals(arguments) + bridge.sparse_refusal(model_runner)
        if reasons:
            raise ValueError(selection.refusal(reasons))
        around = surroundings(model_runner)
        self.device = around.device
        # Queries of each row in the steps that come again and again: decode, and verification where there are drafts.
        drafts = int(getattr(arguments, "speculative_num_draft_tokens", None) or 0)
        usual_queries = [1] if ahead else sorted({1, drafts or 1})
        verified = 0 if getattr(model_runner, "is_draft_worker", False) else drafts
        max_rows = int(self.req_to_token_pool.size)
        self._verify_mask = bridge.unread_verify_mask(verified, max_rows, self.max_context_len, self.device)
        found = bridge.attention_layers(getattr(model_runner, "model", None))
        # No step ahead has any number of queries.
        self.services = Services(found, around, usual_queries if ahead else [0, *usual_queries])
        window = self.services.widest_window(default=int(getattr(model_runner, "sliding_window_size", 0) or 0))
        steps = Steps(table, max_rows + 1, bridge.slot_translation(around.pool), window)
        self.builder = Builder(steps, self.services, usual_queries, most_tokens(arguments))
        self.attention = Attention(self.builder)
        self.delegates = self.builder, self.attention
        if around.mla:
            bridge.register_mla(mla_form)
        self.services.announce()
        if self.device.type == "cuda":
            self.warm_up()

    @property
    def token_to_kv_pool(self) -> Any:
        """SGLang's pool of keys and values. SGLang exchanges it while drafts run over another model's keys."""
        return self.attention.pool

    @token_to_kv_pool.setter
    def token_to_kv_pool(self, pool: Any) -> None:
        self.attention.pool = pool

    def warm_up(self) -> None:
        """Run a layer of each kind over steps without keys, so that nothing compiles while the model serves."""
        warm_up_layers(self.attention, int(self.req_to_token_pool.size), prompts=not self.ahead)

    # The step

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Of a forward that no graph holds."""
        if forward_batch.batch_size == 0:
            self.forward_metadata = None
            return
        self.forward_metadata = self.builder.build(self._batch(forward_batch, in_graph=False))

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Before a graph is captured, and before it is replayed.

        A replay needs nothing that its graph does not hold. Where SGLang captures whole prompts its graph holds nothing
        of the metadata, so they are made ready here each time, in the buffers that the graph reads.
        """
        prompts = forward_batch.forward_mode.is_extend_without_speculative()
        if in_capture or prompts:
            metadata = self.builder.steps.metadata(self._batch(forward_batch, in_graph=True))
            if in_capture:
                self.builder.keep(forward_batch.forward_mode, metadata)
            self.forward_metadata = metadata
            if prompts:
                self.builder.prepare(metadata)
        elif kept := self.builder.captured.get((forward_batch.forward_mode, forward_batch.batch_size)):
            self.forward_metadata = kept[-1]

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """What a graph holds of the metadata: lengths and schedules, a launch each, out of the batch's own tensors."""
        metadata = self.builder.steps.metadata(self._batch(forward_batch, in_graph=True))
        if self.device.type != "cuda" or torch.cuda.is_current_stream_capturing():  # not in the runs before a capture
            self.builder.keep(forward_batch.forward_mode, metadata)
        self.forward_metadata = metadata
        self.builder.prepare(metadata)

    def init_forward_metadata_capture_cuda_graph(
        self,
        bs: int,
        num_tokens: int,
        req_pool_indices: Tensor,
        seq_lens: Tensor,
        encoder_lens: Tensor | None,
        forward_mode: Any,
        spec_info: Any,
        *_: Any,
    ) -> None:
        """Releases before 0.5.13: before a graph is captured."""
        refuse_trees(spec_info)
        queries = num_tokens // bs
        batch = Batch(
            req_pool_indices[:bs],
            seq_lens[:bs],
            num_tokens,
            queries,
            None,
            queries,
            queries if forward_mode.is_target_verify() else self.ahead,
        )
        self.forward_metadata = metadata = self.builder.steps.metadata(batch)
        self.builder.keep(forward_mode, metadata)
        self.builder.prepare(metadata)

    def init_forward_metadata_replay_cuda_graph(
        self,
        bs: int,
        req_pool_indices: Tensor,
        seq_lens: Tensor,
        seq_lens_sum: int,
        encoder_lens: Tensor | None,
        forward_mode: Any,
        spec_info: Any,
        *_: Any,
        **__: Any,
    ) -> None:
        """Releases before 0.5.13: before a graph is replayed; its tensors lie where they lay when it was captured."""
        self.forward_metadata = metadata = self.builder.captured[forward_mode, bs][-1]
        metadata.batch = replace(metadata.batch, seq_lens=seq_lens[:bs])
        self.builder.prepare(metadata)

    def _batch(self, forward_batch: Any, *, in_graph: bool) -> Batch:
        return batch_of(forward_batch, in_graph=in_graph, ahead=self.ahead)

    def shared_read_ends(self, forward_mode: Any) -> Any:
        """From 0.5.18 on: until when the scheduler must not write to `req_to_token`, which every layer reads."""
        return bridge.read_to_the_end(super().shared_read_ends(forward_mode))

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int, *_: Any, **__: Any) -> None:
        """Room for whatever a graph holds, before the first is captured.

        Raises:
            ValueError: the kernels cannot be captured.
        """
        for service in self.services.values():
            if not service.provider.graphs:
                raise ValueError(
                    f"the kernels {service.provider.name!r} cannot be captured in a CUDA graph: set TAUT_KERNELS=auto, "
                    "or start SGLang with --disable-cuda-graph"
                )
        self.builder.reserve(max_bs, max_num_tokens)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """The length of a padded request: one token, in the slot that SGLang keeps for nobody."""
        return 1

    @property
    def verify_mask(self) -> Any:
        """Of drafts, from 0.5.17 on: one that is not read and so not filled."""
        return self._verify_mask

    def get_verify_buffers_to_fill_after_draft(self) -> list[Any]:
        """Releases before 0.5.17: no mask and no positions are wanted of the draft."""
        return [None, None]

    def update_verify_buffers_to_fill_after_draft(self, spec_info: Any, cuda_graph_bs: int | None) -> None:
        """Nothing depends on what the draft fills in."""

    # The layer

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **asked: Any,
    ) -> Any:
        """One new token of each request."""
        return self._attend(q, k, v, layer, forward_batch, save_kv_cache, **asked)

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **asked: Any,
    ) -> Any:
        """Prompts and their chunks, mixed batches, verification and what a draft takes in."""
        return self._attend(q, k, v, layer, forward_batch, save_kv_cache, **asked)

    def _attend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool,
        **asked: Any,
    ) -> Any:
        metadata = self.forward_metadata
        assert metadata is not None
        selection.say_first_step(metadata.batch.rows, metadata.batch.tokens)
        return self.attention.attend(q, k, v, layer, forward_batch, metadata, save_kv_cache, **asked)


def surroundings(model_runner: Any) -> Surroundings:
    """What the layers of a model share."""
    device = torch.device(model_runner.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return Surroundings(
        device=device,
        dtype=model_runner.dtype,
        cache_dtype=model_runner.kv_cache_dtype,
        pool=model_runner.token_to_kv_pool,
        mla=bool(getattr(model_runner, "use_mla_backend", False)),
        whole_prompts=getattr(model_runner.server_args, "chunked_prefill_size", None) == -1,
        kernels=selection.chosen().kernels,
    )


def most_tokens(arguments: Any) -> int:
    """The most tokens that a forward is to be expected to have; a longer one is made room for when it comes."""
    chunk = getattr(arguments, "chunked_prefill_size", None) or 0
    return max(chunk, 8192) if chunk > 0 else int(getattr(arguments, "max_prefill_tokens", None) or 16384)
