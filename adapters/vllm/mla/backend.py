"""What vLLM asks of a backend for latent attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from vllm.model_executor.layers.attention.mla_attention import MLACommonBackend
from vllm.v1.attention.backend import MultipleOf

from taut.adapters.vllm import bridge
from taut.adapters.vllm.backend import MemberBackend
from taut.adapters.vllm.mla.builder import TautMLAMetadataBuilder
from taut.adapters.vllm.mla.layer import TautMLAImplementation
from taut.adapters.vllm.mla.problems import decode_problem, prefill_problem
from taut.adapters.vllm.selection import CACHE_DTYPES
from taut.adapters.vllm.serving import device, page_size

if TYPE_CHECKING:
    from taut.common_kernels.problem import Problem

# A page that is one tile of keys: the fewest page numbers to read, and the simplest addresses.
GPU_PAGE = 64


class TautMLABackend(MemberBackend, MLACommonBackend):
    """What vLLM asks of a backend for latent attention."""

    kind: ClassVar[str] = "MLA"
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", *CACHE_DTYPES]

    @staticmethod
    def get_impl_cls() -> type[TautMLAImplementation]:
        """The implementation."""
        return TautMLAImplementation

    @staticmethod
    def get_builder_cls() -> type[TautMLAMetadataBuilder]:
        """The metadata builder."""
        return TautMLAMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(*_: Any) -> list[int | MultipleOf]:
        """Pages of whole tiles of 16 tokens: smaller ones would spill with many heads."""
        return [MultipleOf(16)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Pages that are one tile of keys, on a GPU, unless the user has named a size."""
        return default_block_size if device().type == "cpu" else max(default_block_size, GPU_PAGE)

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """Pages outermost, where layers share one allocation: every kernel reads the strides."""
        return (1, 0, 2, 3) if include_num_layers_dimension else (0, 1, 2)

    @classmethod
    def problems_asked(cls, asked: dict[str, Any]) -> list[Problem]:
        """Decode and prefill of the layer that vLLM asks about; what is not asked is the model's."""
        config = bridge.current_config()
        model = getattr(config, "model_config", None)
        text = getattr(model, "hf_text_config", None)
        head_size = asked["head_size"]
        rank = getattr(text, "kv_lora_rank", None) or head_size - 64
        heads = model.get_num_attention_heads(config.parallel_config) if config is not None and model is not None else 1
        decode = decode_problem(
            dtype=asked["dtype"],
            kv_cache_dtype=asked.get("kv_cache_dtype"),
            q_heads=heads,
            head_size=head_size,
            rank=rank,
            page_size=asked.get("block_size") or page_size(),
        )
        nope, value_size = getattr(text, "qk_nope_head_dim", None), getattr(text, "v_head_dim", None)
        if nope is None or value_size is None:
            return [decode]
        key_size = nope + head_size - rank
        return [decode, prefill_problem(dtype=asked["dtype"], heads=heads, key_size=key_size, value_size=value_size)]
