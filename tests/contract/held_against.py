"""Run with a release of vLLM on the path: holds our classes against it and prints what does not fit, one line each.

Nothing compiled of vLLM is needed: its classes are imported, its layers are made and run with the reference kernels.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import vllm
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec

from taut.adapters.engine import Selection
from taut.adapters.vllm import bridge, members, selection
from taut.adapters.vllm.dense.builder import TautMetadataBuilder
from taut.adapters.vllm.dense.layer import TautImplementation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HEADS, KV_HEADS, SIZE, PAGE = 4, 2, 32, 16
problems: list[str] = []


def expect(holds: object, says: str) -> None:
    if not holds:
        problems.append(says)


def numbers(release: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", release)[:2]))


def the_ledger() -> None:
    """Every probe finds what its entry says of this release."""
    here = numbers(vllm.__version__)
    for touch in bridge.LEDGER:
        within = numbers(touch.since) <= here and (not touch.until or here <= numbers(touch.until))
        wanted, found = "here" if within else "not here", touch.verdict()
        expect(found == wanted, f"ledger: {found}, not {wanted}: {touch.what} ({touch.detected})")
    expect(not bridge.failures(), f"needed: {bridge.failures()}")


def accepts(ours: Callable[..., Any], base: Callable[..., Any]) -> str:
    """Why `ours` cannot be called wherever `base` can; "" when it can."""
    own, its = inspect.signature(ours).parameters, inspect.signature(base).parameters
    takes_any_name = any(p.kind is p.VAR_KEYWORD for p in own.values())
    takes_any_number = any(p.kind is p.VAR_POSITIONAL for p in own.values())
    places = [p for p in own.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for place, (name, parameter) in enumerate(its.items()):
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            if place < len(places) and places[place].name != name and not takes_any_name:
                return f"place {place} is {places[place].name}, not {name}"
            if place >= len(places) and not takes_any_number and not takes_any_name:
                return f"does not take {name}"
        elif name not in own and not takes_any_name:
            return f"does not take {name} by name"
    for name, parameter in own.items():
        required = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        if required and parameter.kind is not parameter.VAR_POSITIONAL and name not in its:
            return f"wants {name}, which vLLM does not give"
    return ""


def the_signatures(ours: type, base: type, *, made: bool = True) -> None:
    """What we define of a base class can be called as the base's is, and made so; nothing abstract is left."""
    expect(not getattr(ours, "__abstractmethods__", ()), f"{ours.__name__} lacks {set(ours.__abstractmethods__)}")
    own = {name for c in ours.__mro__ if not issubclass(base, c) for name in vars(c) if not name.startswith("__")}
    for name in sorted(own | ({"__init__"} if made else set())):
        mine, its = getattr(ours, name, None), getattr(base, name, None)
        if callable(mine) and callable(its) and not inspect.isclass(mine):
            why = accepts(mine, its)
            expect(not why, f"{ours.__name__}.{name}: {why}")


def the_calls(source: Callable[..., Any] | ModuleType, method: str, ours: Callable[..., Any]) -> None:
    """Every call of `.method(` in the source of a function or module of vLLM's fits our method."""
    code = inspect.getsource(source if isinstance(source, ModuleType) else inspect.unwrap(source))
    tree = ast.parse(textwrap.dedent(code))
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method
    ]
    expect(calls, f"{source.__name__} does not call {method}")
    for call in calls:
        names = {keyword.arg: None for keyword in call.keywords if keyword.arg}
        try:
            inspect.signature(ours).bind(None, *[None] * len(call.args), **names)
        except TypeError as error:
            problems.append(f"{source.__name__} calls {method}: {error}")


def what_is_read(config: VllmConfig) -> None:
    """Every attribute of vLLM's objects that the adapter reads without looking whether it is there."""
    from vllm.config import KVTransferConfig, ModelConfig, SpeculativeConfig

    objects = (
        (config, "model_config parallel_config attention_config kv_transfer_config cache_config scheduler_config"),
        (config, "speculative_config quant_config additional_config"),
        (config.parallel_config, "decode_context_parallel_size prefill_context_parallel_size tensor_parallel_size"),
        (config.scheduler_config, "max_num_seqs max_num_batched_tokens"),
        (config.cache_config, "cache_dtype block_size"),
        (config.attention_config, "backend"),
    )
    for owner, names in objects:
        for name in names.split():
            expect(hasattr(owner, name), f"{type(owner).__name__} has no {name}")
    classes = {
        ModelConfig: ("is_mm_prefix_lm", "architectures", "hf_config", "dtype"),
        SpeculativeConfig: ("num_speculative_tokens",),
        KVTransferConfig: ("is_kv_transfer_instance",),
        FullAttentionSpec: ("block_size", "num_kv_heads", "head_size"),
    }
    for kind, wanted in classes.items():
        known = set(dir(kind)) | {name for c in kind.__mro__ for name in getattr(c, "__annotations__", ())}
        expect(known.issuperset(wanted), f"{kind.__name__} has no {set(wanted) - known}")


@contextmanager
def a_step(config: VllmConfig, layers: list[str], metadata: Any, slots: torch.Tensor) -> Iterator[None]:
    """vLLM's context of a forward pass."""
    options: dict[str, Any] = {"num_tokens": slots.shape[0]}
    if "slot_mapping" in inspect.signature(inspect.unwrap(set_forward_context)).parameters:
        options["slot_mapping"] = dict.fromkeys(layers, slots)
    with set_forward_context(dict.fromkeys(layers, metadata), config, **options):
        yield


def the_layers(config: VllmConfig) -> None:
    """A layer of vLLM's own is made with our implementation, stores and attends; a sharing layer reads the same."""
    torch.manual_seed(0)
    first = Attention(HEADS, SIZE, SIZE**-0.5, KV_HEADS, cache_config=config.cache_config, prefix="layers.0.attn")
    second = Attention(
        HEADS, SIZE, SIZE**-0.5, KV_HEADS, prefix="layers.1.attn", kv_sharing_target_layer_name="layers.0.attn"
    )
    names = ["layers.0.attn", "layers.1.attn"]
    expect(type(first.impl) is TautImplementation, f"the layer's implementation is {type(first.impl)}")
    backend = first.attn_backend
    expect(backend.get_name() == "CPU_ATTN", f"the layer's backend is named {backend.get_name()}")
    spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=KV_HEADS, head_size=SIZE, dtype=torch.float32)
    made = backend.get_builder_cls()(spec, names, config, torch.device("cpu"))
    lengths = [20, 3]
    total = sum(lengths)
    table = torch.tensor([[3, 1], [2, 2**30]], dtype=torch.int32)
    slots = [int(table[row, p // PAGE]) * PAGE + p % PAGE for row, length in enumerate(lengths) for p in range(length)]
    starts = torch.tensor([0, 20, 23], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=torch.tensor(lengths, dtype=torch.int32),
        num_reqs=2, num_actual_tokens=total, max_query_len=20, max_seq_len=20, block_table_tensor=table,
        slot_mapping=torch.tensor(slots),
    )  # fmt: skip
    metadata = made.build(0, common)
    cache = torch.full((4, KV_HEADS, PAGE, 2 * SIZE), torch.nan)
    for layer in (first, second):
        layer.kv_cache = cache
    query = torch.randn(total, HEADS * SIZE)
    key, value = torch.randn(total, KV_HEADS * SIZE), torch.randn(total, KV_HEADS * SIZE)
    with a_step(config, names, metadata, common.slot_mapping):
        outputs = [first(query, key, value), second(query, -key, -value), second(query, None, None)]
    parts = [t.view(total, -1, SIZE).split(lengths) for t in (query, key, value)]
    rows = [
        torch.nn.functional.scaled_dot_product_attention(
            *(t.transpose(0, 1) for t in row), is_causal=True, enable_gqa=True
        ).transpose(0, 1)
        for row in zip(*parts, strict=True)
    ]
    exact = torch.cat(rows).reshape(total, -1)
    for output, which in zip(
        outputs, ("the layer", "the sharing layer", "the sharing layer without keys"), strict=True
    ):
        expect(torch.allclose(output, exact, atol=1e-5), f"{which} is off by {(output - exact).abs().max()}")
    expect(config.additional_config.get("taut_attention"), "what is compiled would not be kept apart")


def the_derived_classes() -> None:
    """What vLLM derives from our classes is told apart by name, and can be made."""
    from vllm.model_executor.layers.attention.cross_attention import create_cross_attention_backend
    from vllm.model_executor.layers.attention.encoder_only_attention import create_encoder_only_attention_backend

    ours = members.backend_for("dense", "FLASH_ATTN")
    derived = [create_cross_attention_backend(ours), create_encoder_only_attention_backend(ours)]
    expect(len({c.full_cls_name() for c in (ours, *derived)}) == 3, "derived classes share a name")
    for backend in derived:
        expect(backend.get_name() == "FLASH_ATTN", f"{backend} is named {backend.get_name()}")
        expect(not backend.get_builder_cls().__abstractmethods__, f"{backend}: an abstract builder")


def the_latent_classes() -> None:
    """Those of latent attention: their methods, the calls of them, and what they read of their bases."""
    from vllm.model_executor.layers.attention import mla_attention as its

    from taut.adapters.vllm.mla.builder import DecodeMetadata, TautMLAMetadataBuilder
    from taut.adapters.vllm.mla.layer import TautMLAImplementation

    pairs = (
        (members.backend_for("MLA", "TRITON_MLA"), its.MLACommonBackend),
        (TautMLAImplementation, its.MLACommonImpl),
        (TautMLAMetadataBuilder, its.MLACommonMetadataBuilder),
    )
    for ours, base in pairs:
        the_signatures(ours, base, made=base is not its.MLACommonMetadataBuilder)
    the_signatures(TautMLAMetadataBuilder, AttentionMetadataBuilder)  # vLLM makes it with what this one takes
    for method in ("forward_mqa", "forward_mha", "do_kv_cache_update"):
        the_calls(its, method, getattr(TautMLAImplementation, method))
    the_calls(its, "_build_decode", TautMLAMetadataBuilder._build_decode)
    read = {
        its.MLACommonImpl: (
            "num_heads scale kv_cache_dtype kv_lora_rank qk_nope_head_dim qk_head_dim v_head_dim kv_b_proj "
            "dcp_world_size need_to_return_lse_for_decode supports_quant_query_input _concat_k_nope_k_pe"
        ),
        its.MLACommonMetadataBuilder: "vllm_config model_config device dcp_world_size reorder_batch_threshold",
        its.MLACommonPrefillMetadata: "query_start_loc max_query_len block_table chunked_context",
    }
    for kind, names in read.items():
        sources = "".join(inspect.getsource(c) for c in kind.__mro__ if c.__module__.startswith("vllm."))
        for name in names.split():
            expect(re.search(rf"\b{name}\b", sources), f"{kind.__name__} has no {name}")
    some = torch.zeros(1)
    expect(DecodeMetadata(some, some, None, None, None).seq_lens is some, "the metadata of decoding rows differ")


class Stock(AttentionBackend):
    """Stands in for vLLM's own class of a member, whose kernels a CPU does not have."""

    asked: tuple[Any, ...] = ()
    get_name = get_impl_cls = get_builder_cls = get_kv_cache_shape = staticmethod(lambda *_: None)

    @classmethod
    def validate_configuration(cls, **_: Any) -> list[str]:
        return []

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        cls.asked = (head_size,)
        return True

    @classmethod
    def supports_dtype(cls, dtype: torch.dtype) -> bool:
        return dtype != torch.float32

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:  # noqa: ARG003
        return True


def the_choice_on_a_gpu() -> None:
    """CUDA's own walk through the candidates: ours where we serve, its own class where `auto` left the layer to it."""
    for compiled in ("vllm._C", "vllm._C_stable_libtorch"):
        sys.modules.setdefault(compiled, ModuleType(compiled))
    from vllm.platforms import cuda
    from vllm.platforms.interface import DeviceCapability
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    class Hopper(cuda.CudaPlatformBase):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:  # noqa: ARG003
            return DeviceCapability(9, 0)

        @classmethod
        def has_device_capability(cls, *_: Any, **__: Any) -> bool:
            return True

    def chosen(member: str | None = None, **different: Any) -> Any:
        asked = AttentionSelectorConfig(
            **{"head_size": 64, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": None} | different
        )
        selected = AttentionBackendEnum[member] if member else None
        return resolve_obj_by_qualname(Hopper.get_attn_backend_cls(selected, attn_selector_config=asked))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(bridge, "stock_class", return_value=Stock))
        stack.enter_context(mock.patch.object(bridge, "validates_layers", return_value=True))
        for mode in ("auto", "on"):
            selection.register(Selection(mode))
            for member in (None, "FLASH_ATTN", "CUSTOM", None):
                ours = members.backend_for("dense", member or "FLASH_ATTN")
                found = chosen(member)
                expect(found is ours, f"{mode}, {member}: {found} is chosen")
            for member in (None, "FLASH_ATTN"):
                try:
                    found = chosen(member, use_mm_prefix=True)
                except ValueError as error:  # noqa: PERF203
                    expect(mode == "on" and "multimodal" in str(error), f"{mode}, refused: {error}")
                else:
                    expect(mode == "auto" and found is Stock, f"{mode}, refused: {found} is chosen")
            expect(chosen() is members.backend_for("dense", "FLASH_ATTN"), f"{mode}: a refusal is not forgotten")
        packed = "turboquant_4bit_nc"
        try:
            found = chosen(kv_cache_dtype=packed)
        except ValueError as error:
            expect(packed in str(error), f"a cache of {packed} is refused without its name: {error}")
        else:
            problems.append(f"on, a cache of {packed}: {found} is chosen")
        for dtype, tower in ((torch.bfloat16, "FLASH_ATTN"), (torch.float32, "TORCH_SDPA")):
            found = Hopper.get_vit_attn_backend(80, dtype).name
            expect(found == tower and Stock.asked == (80,), f"a vision tower in {dtype} gets {found}")


def main() -> None:
    selection.register(Selection("on"))
    config = VllmConfig()
    with set_current_vllm_config(config):
        the_ledger()
        ours = members.backend_for("dense", "CPU_ATTN")
        the_signatures(ours, AttentionBackend)
        the_signatures(TautImplementation, AttentionImpl)
        the_signatures(TautMetadataBuilder, AttentionMetadataBuilder)
        from vllm.model_executor.layers.attention import attention

        the_calls(attention.unified_kv_cache_update, "do_kv_cache_update", TautImplementation.do_kv_cache_update)
        the_calls(attention.unified_attention_with_output, "forward", TautImplementation.forward)
        what_is_read(config)
        the_layers(config)
        the_derived_classes()
        the_latent_classes()
    the_choice_on_a_gpu()
    sys.stdout.write("".join(f"PROBLEM {problem}\n" for problem in problems) + f"HELD vLLM {vllm.__version__}\n")


if __name__ == "__main__":
    main()
