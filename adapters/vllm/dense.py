"""vLLM's dense attention (MHA, GQA, MQA) on our kernels: the backend, the metadata builder and the implementation.

The builder makes one `Step` per engine step out of tensors that vLLM already has on the device: nothing is copied,
computed or waited for on the host. A layer then stores its new keys and values and calls one operation, which writes
into vLLM's own output. Nothing is filled or allocated per layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)

from taut.adapters.vllm import bridge
from taut.adapters.vllm.selection import refusal, selection
from taut.adapters.vllm.shared import (
    CACHE_DTYPES,
    MemberBackend,
    cache_dtype_refusal,
    class_for,
    device,
    model_dtype,
    page_size,
    say_first_step,
    serving_kernels,
    table_path,
)
from taut.common_kernels.compiling import compile_ahead, powers
from taut.common_kernels.model import problems_of_model
from taut.common_kernels.problem import Problem
from taut.common_kernels.providers import registry
from taut.common_kernels.step import Mask, PageTable, Step
from taut.common_kernels.targets import target_of

if TYPE_CHECKING:
    from taut.common_kernels.kernels import Kernels, Workspace

# Their keys lie side by side, not in a cache.
ENCODERS = (AttentionType.ENCODER, AttentionType.ENCODER_ONLY)
# A row with more queries than so many is prefilled by kernels of its own, whatever the provider: between one and this
# many, a provider may launch what it likes.
FEW_QUERIES = 16


def problem_of_layer(
    *,
    target: str,
    dtype: torch.dtype,
    kv_cache_dtype: str | None,
    q_heads: int,
    kv_heads: int,
    head_size: int,
    page_size: int,
    attn_type: str = AttentionType.DECODER,
    windowed: bool = False,
    soft_cap: bool = False,
    alibi: bool = False,
    sinks: bool = False,
    head_scales: bool = False,
    left: int = -1,
) -> Problem:
    """What a layer of vLLM asks of our kernels."""
    name = str(dtype).removeprefix("torch.")
    encoder = attn_type in ENCODERS
    wanted = {
        "causal" if attn_type == AttentionType.DECODER else "non_causal": True,
        "window": windowed or left >= 0,
        "soft_cap": soft_cap,
        "alibi": alibi,
        "sinks": sinks,
        "head_scales": head_scales,
    }
    return Problem(
        operation="ragged_attention" if encoder else "paged_attention",
        target=target,
        dtype=name,
        cache_dtype=name if encoder else CACHE_DTYPES.get(kv_cache_dtype or "auto", name),
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_size=head_size,
        value_size=head_size,
        page_size=0 if encoder else page_size,
        features=frozenset(feature for feature, needed in wanted.items() if needed),
        left=-1 if encoder else left,
    )


def problem_of_model(config: Any | None, head_size: int) -> Problem | None:
    """What the model that is being built asks of a layer with heads of this size; None where it cannot be told."""
    model = getattr(config, "model_config", None)
    if config is None or model is None:
        return None
    try:
        problems = problems_of_model(
            model.hf_config.to_dict(), target="any", tensor_parallel=config.parallel_config.tensor_parallel_size
        )
    except ValueError:  # a configuration that says it otherwise; a layer says it all when it is made
        return None
    attention = [problem for problem in problems if problem.operation in ("paged_attention", "ragged_attention")]
    return next((problem for problem in attention if problem.head_size == head_size), None)


def has_head_scales(config: Any | None) -> bool:
    """Whether a model's quantised cache has a scale for each key-value head."""
    scheme = getattr(getattr(config, "quant_config", None), "kv_cache_scheme", None) or {}
    return bool(scheme.get("strategy") == "attn_head")


@dataclass
class TautMetadata:
    """One step for the layers of one cache group. Mutable, since vLLM's wrappers set attributes of their own.

    Args:
        step: rows, lengths and pages.
        causal: whether a query is blind to what follows it.
        num_actual_tokens: queries of the step, padding of a captured graph included.
        workspaces: what the kernels of this group's layers need, by problem; prepared for this step.
        slot_mapping: [T] int64, where new tokens go.
    """

    step: Step
    causal: bool
    num_actual_tokens: int
    workspaces: dict[Problem, Workspace]
    slot_mapping: torch.Tensor

    def workspace_of(self, layer: TautImplementation) -> Workspace:
        """What a layer's kernels need; made now for a layer that did not exist when the builder asked for them."""
        problem = layer.problem
        if not self.causal:  # the schedule of a mask that is causal ends where a row's last query does
            problem = replace(problem, features=problem.features | {"non_causal"})
        if problem not in self.workspaces:
            made = layer.kernels.workspace(
                problem, self.step.rows, self.num_actual_tokens, str(self.slot_mapping.device), table_path()
            )
            made.prepare(self.step)
            self.workspaces = self.workspaces | {problem: made}
        return self.workspaces[problem]


class TautMetadataBuilder(AttentionMetadataBuilder[TautMetadata]):
    """Makes a `Step` of vLLM's batch, without a host-device synchronisation."""

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Whole graphs for decode and uniform verification batches where the kernels can be captured; else none."""
        problem = problem_of_layer(
            target=target_of(device()),
            dtype=vllm_config.model_config.dtype,
            kv_cache_dtype=vllm_config.cache_config.cache_dtype,
            q_heads=kv_cache_spec.num_kv_heads,
            kv_heads=kv_cache_spec.num_kv_heads,
            head_size=kv_cache_spec.head_size,
            page_size=kv_cache_spec.block_size,
        )
        provider = registry().choose(problem, selection().kernels).provider
        return AttentionCGSupport.UNIFORM_BATCH if provider.graphs else AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        value_size = getattr(kv_cache_spec, "head_size_v", None) or kv_cache_spec.head_size
        if value_size != kv_cache_spec.head_size:
            raise ValueError(refusal([f"values of size {value_size} beside keys of size {kv_cache_spec.head_size}"]))
        self.page_size = kv_cache_spec.block_size
        scheduler = vllm_config.scheduler_config
        # One layer of each kind: its kernels are the others' too.
        self.kinds = {layer.impl.problem: layer for layer in bridge.layers(vllm_config, layer_names)}
        self.workspaces = {
            problem: layer.impl.kernels.workspace(
                problem, scheduler.max_num_seqs, scheduler.max_num_batched_tokens, str(device), table_path()
            )
            for problem, layer in self.kinds.items()
        }
        # A draft's steps may be captured with the making of their schedules, if that can be captured.
        self.supports_draft_decode_metadata_update = all(
            registry().choose(problem, selection().kernels).provider.graphs for problem in self.kinds
        )
        if device.type == "cuda":
            compile_ahead(self.warm_up)
            self.warm_up()

    def warm_up(self) -> None:
        """Run every kind of layer over every kind of step, so that nothing compiles while the model serves.

        The steps have 1, 2, 4, ... rows, of one query each and without keys: kernels are compiled for the number of
        rows, and for the most queries of a row that the host promises, not for how many there are. The cache is one
        page of no content, laid out like vLLM's in what kernels are compiled for.
        """
        scheduler, speculative = self.vllm_config.scheduler_config, self.vllm_config.speculative_config
        verified = 1 + ((speculative and speculative.num_speculative_tokens) or 0)
        promised = sorted({1, min(2, verified), verified, FEW_QUERIES, scheduler.max_num_batched_tokens})
        for rows in powers(scheduler.max_num_seqs):
            for max_query in promised:
                self._run_idle(rows, max_query)

    def _run_idle(self, rows: int, max_query: int) -> None:
        """One step of rows without keys through one layer of each kind."""
        starts = torch.arange(rows + 1, dtype=torch.int32, device=self.device)
        pages = torch.zeros(rows, 1, dtype=torch.int32, device=self.device)
        step = Step(starts, torch.zeros_like(starts[1:]), PageTable(pages, self.page_size), max_query, max_query)
        for workspace in self.workspaces.values():
            workspace.prepare(step)
        nowhere = torch.full((rows,), -1, dtype=torch.int64, device=self.device)
        for problem, layer in self.kinds.items():
            dtype, cache_dtype = getattr(torch, problem.dtype), getattr(torch, problem.cache_dtype)
            causal = "causal" in problem.features
            metadata = TautMetadata(step, causal, rows, self.workspaces, nowhere)
            query = torch.zeros(rows, problem.q_heads, problem.head_size, dtype=dtype, device=self.device)
            key = torch.zeros(rows, problem.kv_heads, problem.head_size, dtype=dtype, device=self.device)
            shape = TautBackend.get_kv_cache_shape(1, self.page_size, problem.kv_heads, problem.head_size)
            cache = torch.zeros(shape, dtype=cache_dtype, device=self.device)
            layer.impl.do_kv_cache_update(layer, key, key, cache, nowhere)
            layer.impl.forward(layer, query, key, key, cache, metadata, torch.empty_like(query))

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> TautMetadata:
        """See `AttentionMetadataBuilder.build`; `common_prefix_len` is always 0 for backends without cascades."""
        common = common_attn_metadata
        if isinstance(common.causal, torch.Tensor):
            raise ValueError(refusal(["a mask that is causal for some rows only is not supported"]))
        if not common.causal and any("causal" in problem.features for problem in self.kinds):
            raise ValueError(refusal(["attention of decoders to what follows is not supported"]))
        step = Step(
            query_starts=common.query_start_loc,
            lengths=common.seq_lens,
            pages=PageTable(common.block_table_tensor, self.page_size),
            max_query=common.max_query_len,
            max_length=common.max_seq_len,
        )
        for workspace in self.workspaces.values():
            workspace.prepare(step)
        return TautMetadata(step, common.causal, common.num_actual_tokens, self.workspaces, common.slot_mapping)

    def update_draft_decode_metadata(self, metadata: TautMetadata) -> None:
        """Make the schedule of a draft's next step, from the lengths that its last one has left on the device."""
        for workspace in metadata.workspaces.values():
            workspace.prepare(metadata.step)


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
        wrong_cache = cache_dtype_refusal(kv_cache_dtype)
        if unknown or wrong_cache:
            reasons = [f"the layer's argument {name}={extra[name]} is not supported" for name in unknown]
            raise ValueError(refusal(reasons + ([wrong_cache] if wrong_cache else [])))
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks
        here = device()
        self.alibi_slopes = (
            None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32, device=here)
        )
        reach = -1 if sliding_window is None else sliding_window - 1  # a window of W counts the query itself
        self.mask = Mask(left=reach, soft_cap=logits_soft_cap or 0.0)
        # An encoder sees as far ahead as it sees back.
        self.two_sided_mask = Mask(causal=False, left=reach, right=reach, soft_cap=logits_soft_cap or 0.0)
        self.problem = problem_of_layer(
            target=target_of(here),
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
        workspace = attn_metadata.workspace_of(self)
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


class TautBackend(MemberBackend):
    """What vLLM asks of a backend for dense attention."""

    kind: ClassVar[str] = "dense"

    @staticmethod
    def get_impl_cls() -> type[TautImplementation]:
        """The implementation."""
        return TautImplementation

    @staticmethod
    def get_builder_cls() -> type[TautMetadataBuilder]:
        """The metadata builder."""
        return TautMetadataBuilder

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, *_: Any, **__: Any
    ) -> tuple[int, ...]:
        """[N, Hk, P, 2 D], as releases from 0.29 on hand it over by themselves."""
        return num_blocks, num_kv_heads, block_size, 2 * head_size

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """In memory as in the shape above; the layers, where they share an allocation, lie within a page."""
        return (1, 0, 2, 3, 4) if include_num_layers_dimension else (0, 1, 2, 3)

    @classmethod
    def get_required_kv_cache_layout(cls) -> str | None:
        """What vLLM calls the order above, until 0.28: heads before tokens."""
        return "HND"

    @classmethod
    def supports_sink(cls) -> bool:
        """Attention sinks: yes."""
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Sliding windows: yes."""
        return True

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """All of them: decoders, encoders, cross attention."""
        return attn_type in (AttentionType.DECODER, AttentionType.ENCODER_DECODER, *ENCODERS)

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        """A scale for each key-value head: yes, where the kernels have it."""
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Where vLLM's transfers know a cache that packs keys and values together."""
        return bridge.connectors_know_packed_caches()

    @classmethod
    def problems_asked(cls, asked: dict[str, Any]) -> list[Problem]:
        """The layer that vLLM asks about; of what vLLM does not tell, what the model's configuration says."""
        told = problem_of_model(bridge.current_config(), asked["head_size"])
        problem = problem_of_layer(
            target=target_of(device()),
            dtype=asked["dtype"],
            kv_cache_dtype=asked.get("kv_cache_dtype"),
            q_heads=told.q_heads if told else 1,
            kv_heads=told.kv_heads if told else 1,
            head_size=asked["head_size"],
            page_size=asked.get("block_size") or page_size(),
            attn_type=asked.get("attn_type", AttentionType.DECODER),
            windowed=bool(asked.get("has_sliding_window")),
            soft_cap=told is not None and "soft_cap" in told.features,
            alibi=told is not None and "alibi" in told.features,
            sinks=bool(asked.get("has_sink")),
            head_scales=bool(asked.get("use_per_head_quant_scales")),
        )
        return [problem]


def backend_for(member: str) -> type[TautBackend]:
    """The class that stands for a member of vLLM's `AttentionBackendEnum`; always the same one."""
    return class_for(TautBackend, member)
