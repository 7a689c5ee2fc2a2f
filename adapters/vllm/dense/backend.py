"""What vLLM asks of a backend for dense attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from vllm.v1.attention.backend import AttentionType

from taut.adapters.vllm import bridge
from taut.adapters.vllm.backend import MemberBackend
from taut.adapters.vllm.dense.builder import TautMetadataBuilder, cache_shape
from taut.adapters.vllm.dense.layer import TautImplementation
from taut.adapters.vllm.dense.problems import ENCODERS, problem_of_layer, problem_of_model
from taut.adapters.vllm.serving import page_size

if TYPE_CHECKING:
    from taut.common_kernels.problem import Problem


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
        """See `cache_shape`."""
        return cache_shape(num_blocks, block_size, num_kv_heads, head_size)

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
