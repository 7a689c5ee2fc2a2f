"""SGLang's attention on our kernels: one backend for dense models and for MLA, for both kinds of graph metadata.

A forward makes one `Step` out of tensors that SGLang already has on the device: nothing is waited for on the host. A
layer then stores its new keys and values straight into SGLang's pool and calls one operation, which writes into the
tensor that SGLang offers for its output, or into a new one that nobody fills.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from taut.adapters.sglang import bridge, selection
from taut.adapters.sglang.service import Services, Surroundings
from taut.adapters.sglang.steps import Batch, Steps, TautMetadata, batch_of, refuse_trees
from taut.common_kernels.compiling import compile_ahead, powers
from taut.common_kernels.providers import registry

if TYPE_CHECKING:
    from torch import Tensor

    from taut.adapters.sglang.service import Service
    from taut.common_kernels.kernels import Workspace
    from taut.common_kernels.problem import Problem
    from taut.common_kernels.step import Step

log = logging.getLogger("taut.sglang")

MOST_IDLE_ROWS = 1024  # of the warm-up, whose queries and outputs must find room


class TautBackend(AttentionBackend):
    """What SGLang asks of a backend.

    Args:
        model_runner: SGLang's; its model is loaded and its pools are made.
        ahead: how many tokens ahead of the lengths that a batch gives its decode steps are; see `drafts`.

    Raises:
        ValueError: a layer cannot be served; the message holds every reason.

    Attributes:
        token_to_kv_pool: SGLang finds the pools of a forward through its backend.
        req_to_token_pool: likewise.
        forward_metadata: of the forward that is running.
        max_context_len: tokens that a request may have at most: what SGLang makes the mask of drafts by, where the host
            does not know lengths.
    """

    needs_cpu_seq_lens = False

    def __init__(self, model_runner: Any, ahead: int = 0) -> None:
        super().__init__()
        self.ahead = ahead
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.forward_metadata: TautMetadata | None = None
        self.max_context_len = int(self.req_to_token_pool.req_to_token.shape[1])
        arguments = model_runner.server_args
        reasons = selection.argument_refusals(arguments) + bridge.sparse_refusal(model_runner)
        if reasons:
            raise ValueError(selection.refusal(reasons))
        self.device = torch.device(model_runner.device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.around = Surroundings(
            device=self.device,
            dtype=model_runner.dtype,
            cache_dtype=model_runner.kv_cache_dtype,
            pool=self.token_to_kv_pool,
            mla=bool(getattr(model_runner, "use_mla_backend", False)),
            whole_prompts=getattr(arguments, "chunked_prefill_size", None) == -1,
            kernels=selection.chosen().kernels,
        )
        self.max_tokens = most_tokens(arguments)
        # Queries of each row in the steps that come again and again: decode, and verification where there are drafts.
        drafts = int(getattr(arguments, "speculative_num_draft_tokens", None) or 0)
        self.usual_queries = [1] if ahead else sorted({1, drafts or 1})
        verified = 0 if getattr(model_runner, "is_draft_worker", False) else drafts
        self._verify_mask = bridge.unread_verify_mask(
            verified, int(self.req_to_token_pool.size), self.max_context_len, self.device
        )
        self.workspaces: dict[tuple[Problem, bool], Workspace] = {}
        # By mode and rows, the last one captured last. Kept as long as we are: graphs read what these own.
        self.captured: dict[tuple[Any, int], list[TautMetadata]] = {}
        self._workspace_rows = 0
        self._sinks: dict[Any, tuple[Tensor, int | None]] = {}
        found = bridge.attention_layers(getattr(model_runner, "model", None))
        self.services = Services(found, self.around, self.usual_queries if ahead else [0, *self.usual_queries])
        translation = bridge.slot_translation(self.token_to_kv_pool)
        windowed = [service for service in self.services.values() if service.windowed_pool]
        self.steps = Steps(
            self.req_to_token_pool.req_to_token,
            int(self.req_to_token_pool.size) + 1,
            translation,
            max(
                (service.mask.left for service in windowed),
                default=int(getattr(model_runner, "sliding_window_size", 0) or 0),
            ),
        )
        for service in self.services.values():
            self._workspace(service)
        if self.around.mla:
            bridge.register_mla(mla_form)
        for kind, provider in dict.fromkeys((service.kind, service.provider) for service in self.services.values()):
            selection.announce(kind, provider)
        if self.device.type == "cuda":
            self.warm_up()

    # Metadata

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Of a forward that no graph holds."""
        if forward_batch.batch_size == 0:
            self.forward_metadata = None
            return
        metadata = self.steps.metadata(self._batch(forward_batch, in_graph=False))
        self._make_room(metadata.batch)
        self.forward_metadata = metadata
        self._prepare(metadata)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Before a graph is captured, and before it is replayed.

        A replay needs nothing that its graph does not hold. Where SGLang captures whole prompts its graph holds nothing
        of the metadata, so they are made ready here each time, in the buffers that the graph reads.
        """
        prompts = forward_batch.forward_mode.is_extend_without_speculative()
        if in_capture or prompts:
            metadata = self.steps.metadata(self._batch(forward_batch, in_graph=True))
            if in_capture:
                self._keep(forward_batch.forward_mode, metadata)
            self.forward_metadata = metadata
            if prompts:
                self._prepare(metadata)
        elif kept := self.captured.get((forward_batch.forward_mode, forward_batch.batch_size)):
            self.forward_metadata = kept[-1]

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """What a graph holds of the metadata: lengths and schedules, a launch each, out of the batch's own tensors."""
        metadata = self.steps.metadata(self._batch(forward_batch, in_graph=True))
        if self.device.type != "cuda" or torch.cuda.is_current_stream_capturing():  # not in the runs before a capture
            self._keep(forward_batch.forward_mode, metadata)
        self.forward_metadata = metadata
        self._prepare(metadata)

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
        self.forward_metadata = metadata = self.steps.metadata(batch)
        self._keep(forward_mode, metadata)
        self._prepare(metadata)

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
        self.forward_metadata = metadata = self.captured[forward_mode, bs][-1]
        metadata.batch = replace(metadata.batch, seq_lens=seq_lens[:bs])
        self._prepare(metadata)

    def _batch(self, forward_batch: Any, *, in_graph: bool) -> Batch:
        return batch_of(forward_batch, in_graph=in_graph, ahead=self.ahead)

    def shared_read_ends(self, forward_mode: Any) -> Any:
        """From 0.5.18 on: until when the scheduler must not write to `req_to_token`, which every layer reads."""
        return bridge.read_to_the_end(super().shared_read_ends(forward_mode))

    def _keep(self, forward_mode: Any, metadata: TautMetadata) -> None:
        """Keep what a graph reads as long as we are."""
        self.captured.setdefault((forward_mode, metadata.batch.rows), []).append(metadata)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int, *_: Any, **__: Any) -> None:
        """Room for whatever a graph holds, before the first is captured.

        Raises:
            ValueError: the kernels cannot be captured.
        """
        for provider in {service.provider for service in self.services.values()}:
            if not next(p for p in registry().providers if p.name == provider).graphs:
                raise ValueError(
                    f"the kernels {provider!r} cannot be captured in a CUDA graph: set TAUT_KERNELS=auto, or start "
                    "SGLang with --disable-cuda-graph"
                )
        self.steps.reserve(max_bs)
        self.max_tokens = max(self.max_tokens, max_num_tokens)
        self.workspaces.clear()
        for service in self.services.values():
            self._workspace(service)

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

    def warm_up(self) -> None:
        """Run a layer of each kind over steps without keys, so that nothing compiles while the model serves.

        Kernels are compiled for powers of two: of rows with one query each, and of the most queries of a row that the
        host promises, not for how many there are.
        """
        if self.device.type == "cuda":
            compile_ahead(self._run_idle_steps)
        self._run_idle_steps()
        self.forward_metadata = None

    def _run_idle_steps(self) -> None:
        most = min(int(self.req_to_token_pool.size), MOST_IDLE_ROWS)
        kinds = {service.problem: layer for (layer, queries), service in self.services.items() if queries == 1}
        # Rows, and the most queries of one.
        prompts = [] if self.ahead else [(1, longest) for longest in powers(self.max_tokens)] + [(most, 1)]
        for layer in kinds.values():
            contiguous = self.services[layer, 1].problem.operation == "ragged_attention"
            for rows, longest in prompts[:1] if contiguous else prompts:  # one kernel for whatever is promised
                self._run_idle(layer, rows, 0, longest)
            for rows in powers(most) if not contiguous else ():
                for queries in self.usual_queries:
                    self._run_idle(layer, rows, queries, queries)

    def _run_idle(self, layer: Any, rows: int, queries: int, longest: int) -> None:
        """One step of rows without keys through one layer.

        Args:
            layer: of SGLang's.
            rows: how many.
            queries: of each row; 0 for prompts, of one query each.
            longest: the most queries of a row that are promised.
        """
        service, tokens = self.services[layer, 1], rows * (queries or 1)
        nothing = torch.zeros(rows, dtype=torch.int64, device=self.device)
        counts = None if queries else torch.ones(rows, dtype=torch.int32, device=self.device)
        metadata = self.steps.metadata(Batch(nothing, nothing, tokens, queries, counts, longest))
        self.forward_metadata = metadata
        self._prepare(metadata)
        problem, dtype = service.problem, self.around.dtype
        query = torch.zeros(tokens, problem.q_heads, problem.head_size, dtype=dtype, device=self.device)
        key = torch.zeros(tokens, problem.kv_heads, problem.head_size, dtype=dtype, device=self.device)
        value, parts = key[..., : problem.value_size], {}
        if service.absorbed:
            parts = {"q_rope": query[..., problem.value_size :], "k_rope": key[..., problem.value_size :]}
            query, key = query[..., : problem.value_size], value
        forms = [(False, False)]  # whether keys are a chunk of a prefix, and whether the LSE is wanted
        if service.ragged:
            forms += [(False, True), (True, True)]
            value = self._beside_keys(key, problem)
        for chunk, wants_lse in forms:
            forward = SimpleNamespace(
                out_cache_loc=torch.full((tokens,), -1, dtype=torch.int64, device=self.device),
                extend_prefix_lens_cpu=None,
                attn_attend_prefix_cache=chunk,
                mha_return_lse=wants_lse,
                prefix_chunk_idx=0,
                prefix_chunk_cu_seq_lens=[metadata.step.query_starts],
                prefix_chunk_max_seq_lens=[self.max_tokens],
            )
            self._attend(query, key, value, layer, forward, not service.ragged, **parts)

    def _beside_keys(self, key: Tensor, problem: Problem) -> Tensor:
        """Values [T, Hk, V] as SGLang's projection leaves them: behind each head's key, whose rope lies elsewhere."""
        latent = next((service.problem for service in self.services.values() if service.absorbed), None)
        rope = latent.head_size - latent.value_size if latent else 0
        both = key.new_zeros(*key.shape[:2], problem.head_size - rope + problem.value_size)
        return both[..., problem.head_size - rope :]

    def _make_room(self, batch: Batch) -> None:
        """New workspaces if a batch is larger than any that was to be expected (padding under data parallelism)."""
        if batch.tokens > self.max_tokens or self.steps.max_rows > self._workspace_rows:
            self.max_tokens = max(self.max_tokens, batch.tokens)
            self.workspaces.clear()
            for service in self.services.values():
                self._workspace(service)

    def _prepare(self, metadata: TautMetadata) -> None:
        """Lengths and schedules of a step, a launch each; a graph's step keeps the workspaces that it began with."""
        self.steps.fill(metadata)
        metadata.windowed_slots = metadata.whole_starts = None
        for key, workspace in self.workspaces.items():
            if key[0].max_query == self._queries(metadata):
                metadata.prepared.setdefault(key, workspace)
        for (_, windowed), workspace in metadata.prepared.items():
            workspace.prepare(metadata.windowed if windowed and metadata.windowed else metadata.step)

    def _queries(self, metadata: TautMetadata) -> int:
        """For how many queries of a row the kernels of a step are cut: 0 for any number."""
        return metadata.batch.queries if metadata.batch.queries in self.usual_queries else 0

    def _workspace(self, service: Service) -> Workspace:
        """The workspace that a layer shares with all that ask for the same; made on first use.

        Of layers whose keys are handed over it holds no schedule, only which tile table the user named.
        """
        key = service.problem, service.windowed_pool
        if key not in self.workspaces:
            rows = self._workspace_rows = self.steps.max_rows
            bound = service.problem.max_query
            table = selection.chosen().table
            self.workspaces[key] = service.kernels.workspace(
                service.problem,
                rows,
                rows * bound if bound else max(self.max_tokens, rows),
                str(self.device),
                None if table is None else str(table),
            )
        return self.workspaces[key]

    # Layers

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
        self._say_first_step()
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
        self._say_first_step()
        return self._attend(q, k, v, layer, forward_batch, save_kv_cache, **asked)

    def _say_first_step(self) -> None:
        """Said where SGLang calls, not in `_attend`, which the warm-up calls too."""
        if self.forward_metadata is not None:
            selection.say_first_step(self.forward_metadata.batch.rows, self.forward_metadata.batch.tokens)

    def _attend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool,
        *,
        sinks: Tensor | None = None,
        q_rope: Tensor | None = None,
        k_rope: Tensor | None = None,
        **others: Any,
    ) -> Any:
        unknown = [
            f"the layer's argument {name} is not supported" for name, value in others.items() if value is not None
        ]
        if unknown:
            raise ValueError(selection.refusal(unknown))
        metadata = self.forward_metadata
        assert metadata is not None
        service = self.services[layer, self._queries(metadata)]
        if sinks is not None and (service.absorbed or service.ragged):
            raise ValueError(selection.refusal(["sinks of MLA (sinks) are not supported"]))
        if service.absorbed:
            return self._absorbed(q, k, layer, service, forward_batch, metadata, save_kv_cache, q_rope, k_rope)
        if q_rope is not None or k_rope is not None:
            raise ValueError(
                selection.refusal(["queries and keys in two parts (q_rope, k_rope) for a layer without MLA"])
            )
        if service.ragged:
            return self._unabsorbed(q, k, v, layer, service, forward_batch, metadata, save_kv_cache)
        return self._dense(q, k, v, layer, service, forward_batch, metadata, save_kv_cache, sinks)

    def _ready(self, service: Service, metadata: TautMetadata) -> tuple[Step, Workspace]:
        """A layer's step and its workspace, which is prepared now if no layer has asked for it before."""
        step = metadata.windowed if service.windowed_pool and metadata.windowed else metadata.step
        key = service.problem, service.windowed_pool
        if key not in metadata.prepared:
            workspace = self._workspace(service)
            workspace.prepare(step)
            metadata.prepared[key] = workspace
        return step, metadata.prepared[key]

    def _slots(self, layer: Any, service: Service, forward_batch: Any, metadata: TautMetadata) -> Tensor:
        """Where a layer's new tokens go."""
        slots: Tensor = forward_batch.out_cache_loc
        if not service.windowed_pool:
            return slots
        if metadata.windowed_slots is None or layer is self.services.first_windowed:
            assert self.steps.translation is not None
            metadata.windowed_slots = self.steps.translation[slots]
        return metadata.windowed_slots[: slots.shape[0]]

    def _float_sinks(self, layer: Any, sinks: Tensor | None) -> Tensor | None:
        """Sinks in float32, converted when they come and again when their weights were changed in place."""
        if sinks is None or sinks.dtype == torch.float32:
            return sinks
        version = None if sinks.is_inference() else sinks._version
        kept, of_version = self._sinks.get(layer, (None, None))
        if kept is None:
            kept = sinks.detach().float()
        elif of_version != version:
            kept.copy_(sinks)
        self._sinks[layer] = kept, version
        return kept

    def _dense(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: Any,
        service: Service,
        forward_batch: Any,
        metadata: TautMetadata,
        save_kv_cache: bool,
        sinks: Tensor | None,
    ) -> Tensor:
        problem = service.problem
        query = q.view(-1, problem.q_heads, problem.head_size)
        sinks = self._float_sinks(layer, sinks)
        if (k is None) != (v is None):
            raise ValueError(
                selection.refusal(["keys without values, or values without keys (k, v), are not supported"])
            )
        if k is not None and v is not None:
            k = k.view(-1, problem.kv_heads, problem.head_size)
            v = v.view(-1, problem.kv_heads, problem.value_size)
        out, view = self._output(q, query.shape[0], problem, forward_batch)
        key_cache, value_cache = bridge.dense_cache(self.token_to_kv_pool, layer.layer_id)
        if k is not None and v is not None and save_kv_cache:
            slots = self._slots(layer, service, forward_batch, metadata)
            service.kernels.store_kv(
                k, v, key_cache, value_cache, slots, key_scale=service.key_scale, value_scale=service.value_scale
            )
        if service.encoder:
            if k is None or v is None or any(forward_batch.extend_prefix_lens_cpu or ()):
                raise ValueError(selection.refusal(["an encoder's layer over keys that were cached before"]))
            starts, longest = metadata.step.query_starts, metadata.step.max_query
            service.kernels.ragged_attention(
                query, k, v, starts, starts, service.mask, view, scale=service.scale, max_query=longest,
                max_length=longest, sinks=sinks, workspace=self._workspace(service),
            )  # fmt: skip
            return out
        step, workspace = self._ready(service, metadata)
        service.kernels.paged_attention(
            query,
            key_cache,
            value_cache,
            step,
            service.mask,
            view,
            scale=service.scale,
            key_scale=service.key_scale,
            value_scale=service.value_scale,
            sinks=sinks,
            workspace=workspace,
        )
        return out

    def _absorbed(
        self,
        q: Tensor,
        k: Tensor | None,
        layer: Any,
        service: Service,
        forward_batch: Any,
        metadata: TautMetadata,
        save_kv_cache: bool,
        q_rope: Tensor | None,
        k_rope: Tensor | None,
    ) -> Tensor:
        """MLA over the latent cache. Queries and keys come in two parts, or joined, and are read where they lie."""
        problem = service.problem
        rank, rope = problem.value_size, problem.head_size - problem.value_size
        if q_rope is None:
            joined = q.view(-1, problem.q_heads, problem.head_size)
            q_nope, q_pe = joined[..., :rank], joined[..., rank:]
        else:
            q_nope, q_pe = q.view(-1, problem.q_heads, rank), q_rope.view(-1, problem.q_heads, rope)
        cache = bridge.mla_cache(self.token_to_kv_pool, layer.layer_id)
        if k is not None and save_kv_cache:
            if k_rope is None:
                joined = k.view(-1, problem.head_size)
                latent, pe = joined[:, :rank], joined[:, rank:]
            else:
                latent, pe = k.view(-1, rank), k_rope.view(-1, rope)
            service.kernels.store_mla_kv(latent, pe, cache, forward_batch.out_cache_loc)
        out, view = self._output(q, q_nope.shape[0], problem, forward_batch)
        step, workspace = self._ready(service, metadata)
        service.kernels.mla_decode(q_nope, q_pe, cache, step, view, scale=service.scale, workspace=workspace)
        return out

    def _unabsorbed(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: Any,
        service: Service,
        forward_batch: Any,
        metadata: TautMetadata,
        save_kv_cache: bool,
    ) -> Any:
        """MLA among keys that were projected up again; the latent vectors have been stored by SGLang.

        The keys are those of the new tokens, or of one chunk of what is cached, then seen by all queries, or of whole
        requests, cached and new. SGLang merges the chunks, and so wants the LSE.
        """
        if k is None or v is None or save_kv_cache:
            raise ValueError(selection.refusal(["unabsorbed MLA that reads or writes the cache itself"]))
        problem = service.problem
        query = q.view(-1, problem.q_heads, problem.head_size)
        key = k.view(-1, problem.kv_heads, problem.head_size)
        value = v.view(-1, problem.kv_heads, problem.value_size)
        step, mask = metadata.step, service.mask
        key_starts, longest = step.query_starts, step.max_query
        if forward_batch.attn_attend_prefix_cache:
            chunk = forward_batch.prefix_chunk_idx
            key_starts, mask = forward_batch.prefix_chunk_cu_seq_lens[chunk], replace(mask, causal=False)
            longest = int(forward_batch.prefix_chunk_max_seq_lens[chunk])
        elif getattr(forward_batch, "mha_one_shot", False) and key.shape[0] != query.shape[0]:
            key_starts, longest = self._whole_starts(metadata), step.max_length
        wants_lse = bool(getattr(forward_batch, "mha_return_lse", False))
        lse = query.new_empty(query.shape[:2], dtype=torch.float32) if wants_lse else None
        out, view = self._output(q, query.shape[0], problem, forward_batch)
        service.kernels.ragged_attention(
            query, key, value, step.query_starts, key_starts, mask, view, scale=service.scale,
            max_query=step.max_query, max_length=longest, lse=lse, workspace=self._workspace(service),
        )  # fmt: skip
        return (view, lse) if wants_lse else out

    def _whole_starts(self, metadata: TautMetadata) -> Tensor:
        """[R + 1] int32: where each request begins among all keys, cached and new; made once a step."""
        if metadata.whole_starts is None:
            lengths = metadata.step.lengths
            metadata.whole_starts = torch.zeros(lengths.shape[0] + 1, dtype=torch.int32, device=lengths.device)
            torch.cumsum(lengths, 0, dtype=torch.int32, out=metadata.whole_starts[1:])
        return metadata.whole_starts

    def _output(self, q: Tensor, tokens: int, problem: Problem, forward_batch: Any) -> tuple[Tensor, Tensor]:
        """Where a layer's output goes, as SGLang wants it, [T, Hq * V], and as our kernels do, [T, Hq, V].

        SGLang's own tensor where it offers one, else a new one, which is a place in the graph's memory where a graph is
        captured. Nobody fills it beforehand.
        """
        width = problem.q_heads * problem.value_size
        dtype = self.around.dtype
        given = bridge.take_output(forward_batch)
        if given is not None and given.numel() == tokens * width and given.dtype == dtype and given.device == q.device:
            return given, given.view(tokens, problem.q_heads, problem.value_size)
        out = q.new_empty((tokens, width), dtype=dtype)
        return out, out.view(tokens, problem.q_heads, problem.value_size)


def most_tokens(arguments: Any) -> int:
    """The most tokens that a forward is to be expected to have; a longer one is made room for when it comes."""
    chunk = getattr(arguments, "chunked_prefill_size", None) or 0
    return max(chunk, 8192) if chunk > 0 else int(getattr(arguments, "max_prefill_tokens", None) or 16384)


def mla_form(layer: Any, forward_batch: Any) -> Any:
    """Which form of MLA serves a batch: SGLang asks in every layer.

    Absorbed, a pair of a query and a key costs Hq * (2 C + E) products; unabsorbed Hq * (D + V), but every cached key
    is projected up first, for Hq * C * (D - E + V). So prompts are unabsorbed where nothing of them is cached, and
    where enough new tokens share the projection of what is; decode, verification and captured prefills are absorbed.
    """
    prompts = forward_batch.forward_mode.is_extend_without_speculative()
    if bridge.prefill_is_captured() or not prompts or forward_batch.extend_prefix_lens_cpu is None:
        return bridge.absorbed_form(layer, forward_batch)
    form = _form_of_prompts(layer, forward_batch)
    selection.say(f"prompts are served in SGLang's form {form.name}", logging.DEBUG)
    return form


def _form_of_prompts(layer: Any, forward_batch: Any) -> Any:
    forms = bridge.mla_forms()
    new, old = forward_batch.extend_seq_lens_cpu, forward_batch.extend_prefix_lens_cpu
    cached = sum(old)
    if not cached:
        return forms.MHA
    if layer.disable_chunked_prefix_cache:
        return bridge.absorbed_form(layer, forward_batch)
    rank, rope, value = layer.kv_lora_rank, layer.qk_rope_head_dim, layer.v_head_dim
    nope = layer.qk_nope_head_dim
    saved = (2 * rank + rope) - (nope + rope + value)
    pairs = sum(queries * keys for queries, keys in zip(new, old, strict=False))
    if pairs * saved <= cached * rank * (nope + value):
        return bridge.absorbed_form(layer, forward_batch)
    # In one shot SGLang counts the keys by lengths that the host may not know.
    if forward_batch.seq_lens_cpu is not None and cached + sum(new) <= forward_batch.get_max_chunk_capacity():
        return forms.MHA_ONE_SHOT
    # SGLang's kernel that merges chunks is for GPUs.
    return forms.MHA_CHUNKED_KV if forward_batch.seq_lens.is_cuda else bridge.absorbed_form(layer, forward_batch)
