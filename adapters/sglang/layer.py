"""The layer's call: its new keys and values go into SGLang's pool, and one operation writes its output.

The output is the tensor that SGLang offers for it, or a new one that nobody fills.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from taut.adapters.sglang import bridge, selection

if TYPE_CHECKING:
    from torch import Tensor

    from taut.adapters.sglang.builder import Builder, TautMetadata
    from taut.adapters.sglang.service import Service
    from taut.common_kernels.problem import Problem


class Attention:
    """What the layers of a model call.

    Args:
        builder: of their steps; it has their services and workspaces.
    """

    def __init__(self, builder: Builder) -> None:
        self.builder = builder
        self.services = builder.services
        self.pool, self.dtype = builder.services.around.pool, builder.services.around.dtype
        self._sinks: dict[Any, tuple[Tensor, int | None]] = {}

    def attend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: Any,
        forward_batch: Any,
        metadata: TautMetadata,
        save_kv_cache: bool,
        *,
        sinks: Tensor | None = None,
        q_rope: Tensor | None = None,
        k_rope: Tensor | None = None,
        **others: Any,
    ) -> Any:
        """A layer's output, [T, Hq * V]; where SGLang asks for the LSE of unabsorbed MLA, [T, Hq, V] and [T, Hq].

        Args:
            q: [T, Hq * D] in any shape; without its rope part where that comes as `q_rope`.
            k: new keys; None where the layer reads those of another one.
            v: new values.
            layer: SGLang's.
            forward_batch: SGLang's.
            metadata: of this forward.
            save_kv_cache: whether new keys and values are stored.
            sinks: [Hq] scores of a key that nobody has.
            q_rope: the rope part of absorbed queries.
            k_rope: the rope part of latent keys.
            others: what we do not know; refused unless it is None.

        Raises:
            ValueError: the layer asks for what is not supported.
        """
        unknown = [
            f"the layer's argument {name} is not supported" for name, value in others.items() if value is not None
        ]
        if unknown:
            raise ValueError(selection.refusal(unknown))
        service = self.services[layer, self.builder.max_query(metadata)]
        if sinks is not None and (service.absorbed or service.ragged):
            raise ValueError(selection.refusal(["sinks of MLA (sinks) are not supported"]))
        if service.absorbed:
            return self._absorbed(q, k, layer, service, forward_batch, metadata, save_kv_cache, q_rope, k_rope)
        if q_rope is not None or k_rope is not None:
            raise ValueError(
                selection.refusal(["queries and keys in two parts (q_rope, k_rope) for a layer without MLA"])
            )
        if service.ragged:
            return self._unabsorbed(q, k, v, service, forward_batch, metadata, save_kv_cache)
        return self._dense(q, k, v, layer, service, forward_batch, metadata, save_kv_cache, sinks)

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
        key_cache, value_cache = bridge.dense_cache(self.pool, layer.layer_id)
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
                max_length=longest, sinks=sinks, workspace=self.builder.workspace(service),
            )  # fmt: skip
            return out
        step, workspace = self.builder.ready(service, metadata)
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

    def _slots(self, layer: Any, service: Service, forward_batch: Any, metadata: TautMetadata) -> Tensor:
        """Where a layer's new tokens go."""
        slots: Tensor = forward_batch.out_cache_loc
        if not service.windowed_pool:
            return slots
        if metadata.windowed_slots is None or layer is self.services.first_windowed:
            assert self.builder.steps.translation is not None
            metadata.windowed_slots = self.builder.steps.translation[slots]
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
        cache = bridge.mla_cache(self.pool, layer.layer_id)
        if k is not None and save_kv_cache:
            if k_rope is None:
                joined = k.view(-1, problem.head_size)
                latent, pe = joined[:, :rank], joined[:, rank:]
            else:
                latent, pe = k.view(-1, rank), k_rope.view(-1, rope)
            service.kernels.store_mla_kv(latent, pe, cache, forward_batch.out_cache_loc)
        out, view = self._output(q, q_nope.shape[0], problem, forward_batch)
        step, workspace = self.builder.ready(service, metadata)
        service.kernels.mla_decode(q_nope, q_pe, cache, step, view, scale=service.scale, workspace=workspace)
        return out

    def _unabsorbed(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
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
            max_query=step.max_query, max_length=longest, lse=lse, workspace=self.builder.workspace(service),
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
        given = bridge.take_output(forward_batch)
        wanted = tokens * width, self.dtype, q.device
        if given is not None and (given.numel(), given.dtype, given.device) == wanted:
            return given, given.view(tokens, problem.q_heads, problem.value_size)
        out = q.new_empty((tokens, width), dtype=self.dtype)
        return out, out.view(tokens, problem.q_heads, problem.value_size)
