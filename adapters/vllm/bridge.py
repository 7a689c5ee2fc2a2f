"""The ledger: every touch of vLLM's internals and every difference between its releases that this adapter meets.

Each entry says what it is, since and until which release, how it is told apart (by a probe, never by comparing
versions), why we need it, and when it can go. `taut doctor --bridge` runs the probes. The functions below are the only
places where those touches happen; the other modules of this adapter import from vLLM only what vLLM documents for
backends: `AttentionBackend`, `AttentionImpl`, `AttentionMetadataBuilder`, `CommonAttentionMetadata`, `AttentionType`,
`AttentionBackendEnum` and `register_backend`, each in the same place from 0.20.2 to 0.33.0.

vLLM is imported inside the functions, so that the ledger can be read without it.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
from functools import cache
from typing import TYPE_CHECKING, Any

from taut.adapters.engine import Touch, age_of
from taut.common_kernels.paging import dequantised, packed_cache_views
from taut.common_kernels.step import PageTable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

log = logging.getLogger("taut.vllm")

RELEASES = ("0.20.2", "0.33.0")  # what this adapter was made for, first and last
BACKEND = "vllm.v1.attention.backend"
REGISTRY = "vllm.v1.attention.backends.registry"
CUDA = "vllm.platforms.cuda"
MLA = "vllm.model_executor.layers.attention.mla_attention"
GROUP = "vllm.v1.worker.utils:AttentionGroup"
# What the builder reads of vLLM's batch.
STEP_FIELDS = frozenset(
    {
        "query_start_loc",
        "seq_lens",
        "num_actual_tokens",
        "max_query_len",
        "max_seq_len",
        "block_table_tensor",
        "slot_mapping",
        "causal",
    }
)
# How vLLM makes an implementation: these by position, anything else by name.
LAYER_ARGUMENTS = (
    "self",
    "num_heads",
    "head_size",
    "scale",
    "num_kv_heads",
    "alibi_slopes",
    "sliding_window",
    "kv_cache_dtype",
    "logits_soft_cap",
    "attn_type",
    "kv_sharing_target_layer_name",
)


def _resolve(place: str) -> Any:
    """What stands at "module:a.b"; raises where the module or the name is missing."""
    from importlib import import_module

    module, _, names = place.partition(":")
    found = import_module(module)
    for name in names.split(".") if names else ():
        found = getattr(found, name)
    return found


def _has(place: str) -> Callable[[], bool]:
    """A probe: whether "module:a.b" exists. The module must."""

    def probe() -> bool:
        _resolve(place.partition(":")[0])
        try:
            _resolve(place)
        except AttributeError:
            return False
        return True

    return probe


def _takes(place: str, *names: str) -> Callable[[], bool]:
    """A probe: whether the function at "module:a.b" has parameters of these names."""
    return lambda: set(names) <= set(inspect.signature(_resolve(place)).parameters)


def _source_of(place: str, text: str) -> Callable[[], bool]:
    """A probe: whether the source of the function at "module:a.b" contains `text`."""
    return lambda: text in inspect.getsource(_resolve(place))


LEDGER = (
    Touch(
        what="a registered override is resolved from its path whenever vLLM asks for the member",
        since="0.20.2",
        until="",
        detected="AttentionBackendEnum.get_class resolves what get_path returns, and get_path looks at the overrides",
        why="the class is chosen when vLLM asks, with the model's configuration at hand",
        ends="when vLLM lets a plugin decide per model",
        probe=lambda: (
            _source_of(f"{REGISTRY}:AttentionBackendEnum.get_class", "self.get_path()")()
            and _source_of(f"{REGISTRY}:AttentionBackendEnum.get_path", "_ATTN_OVERRIDES")()
        ),
        needed=True,
    ),
    Touch(
        what="the value of an enum member is the path of vLLM's own class, whatever overrides it",
        since="0.20.2",
        until="",
        detected="AttentionBackendEnum.TRITON_ATTN.value is a dotted path into vLLM",
        why="what is not ours is given back to vLLM as if nothing had been registered",
        ends="when an override can be asked for what it overrides",
        probe=lambda: str(_resolve(f"{REGISTRY}:AttentionBackendEnum.TRITON_ATTN.value")).startswith("vllm."),
        needed=True,
    ),
    Touch(
        what="a CPU ignores --attention-backend and takes CPU_ATTN, and asks no backend to validate a configuration",
        since="0.20.2",
        until="",
        detected="CpuPlatform.get_attn_backend_cls ends in CPU_ATTN.get_path()",
        why="CPU_ATTN is overridden even when only CUSTOM was asked for, and gives the stock class unless it was",
        ends="when the CPU platform honours the selected backend",
        probe=_source_of("vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls", "CPU_ATTN.get_path()"),
    ),
    Touch(
        what="GPUs ask a class to validate each layer; other platforms do not",
        since="0.20.2",
        until="",
        detected="current_platform.is_cuda_alike()",
        why="elsewhere the model is held against what we serve before the class is handed out",
        ends="when every platform validates",
        probe=_has("vllm.platforms:current_platform.is_cuda_alike"),
        needed=True,
    ),
    Touch(
        what="get_current_vllm_config_or_none: the configuration of the model that is being built",
        since="0.20.2",
        until="",
        detected="importable from vllm.config",
        why="what no question of vLLM's tells is read there: parallelism, soft caps, ALiBi, the page size",
        ends="when vLLM hands the configuration to the backend",
        probe=_has("vllm.config:get_current_vllm_config_or_none"),
        needed=True,
    ),
    Touch(
        what="CUDA resolves the class that it has validated by its full_cls_name; before, the member's path once more",
        since="0.24.0",
        until="",
        detected="_backend_cls_path in vllm.platforms.cuda; both ways are served alike",
        why="`auto` may leave a layer to vLLM's own class, and must not be asked again",
        ends="when 0.23 leaves the range and ROCm does the same",
        probe=lambda: "def _backend_cls_path" in _source_file(CUDA),
    ),
    Touch(
        what="validate_configuration is asked more and more: use_kv_connector, then has_sliding_window and use_pcp "
        "(0.26), use_adaptive_verification (0.28), use_dcp (0.29), use_rswa (0.30)",
        since="0.23.0",
        until="",
        detected="what is asked is looked at by name; what is not asked is read from the configuration",
        why="the reasons must be complete in every release, and none be said twice",
        ends="when 0.29 leaves the range",
        probe=_takes(f"{BACKEND}:AttentionBackend.validate_configuration", "use_kv_connector"),
    ),
    Touch(
        what="vision towers ask the overridden member supports_head_size, supports_dtype, supports_compute_capability",
        since="0.20.2",
        until="",
        detected="get_vit_attn_backend asks the class, and its caller runs vLLM's own kernels by the member",
        why="our classes answer for the class that they stand in for, and validate with a class that stands for none",
        ends="when vision towers run through a backend's class",
        probe=lambda: "vit_attn_backend.get_class()" in _source_file(CUDA),
    ),
    Touch(
        what="cross attention, encoders and chunks derive classes of ours and set attributes of our metadata",
        since="0.20.2",
        until="",
        detected="create_cross_attention_backend takes the underlying backend",
        why="builder and implementation can be derived from, metadata is mutable, derived classes have their own names",
        ends="when vLLM asks a backend for these kinds",
        probe=_takes(
            "vllm.model_executor.layers.attention.cross_attention:create_cross_attention_backend.__wrapped__",
            "underlying_attn_backend",
        ),
    ),
    Touch(
        what="an implementation is made with ten arguments by position, the rest by name",
        since="0.20.2",
        until="",
        detected="the parameters of AttentionImpl.__init__",
        why="ours takes the same, and refuses by name what it does not know",
        ends="never: this is how a layer is made",
        probe=lambda: (
            tuple(inspect.signature(_resolve(f"{BACKEND}:AttentionImpl.__init__")).parameters) == LAYER_ARGUMENTS
        ),
        needed=True,
    ),
    Touch(
        what="the fields of CommonAttentionMetadata that a step is made of",
        since="0.20.2",
        until="",
        detected="its dataclass fields",
        why="lengths, queries, pages and slots are taken as they lie on the device",
        ends="never: this is what a builder is given",
        probe=lambda: STEP_FIELDS.issubset(
            item.name for item in dataclasses.fields(_resolve(f"{BACKEND}:CommonAttentionMetadata"))
        ),
        needed=True,
    ),
    Touch(
        what="CommonAttentionMetadata.causal may be a tensor: rows that see ahead beside rows that do not",
        since="0.24.0",
        until="",
        detected="isinstance; the models that have it set attention_config.use_non_causal, which is refused",
        why="no schedule of ours has rows of both kinds",
        ends="when it has",
        probe=lambda: "Tensor" in str(_resolve(f"{BACKEND}:CommonAttentionMetadata").__annotations__["causal"]),
    ),
    Touch(
        what="the shape of the cache is the backend's: get_kv_cache_shape, get_kv_cache_block_dim",
        since="0.20.2",
        until="0.28.0",
        detected="hasattr(AttentionBackend, 'get_kv_cache_shape'); harmless where vLLM no longer calls it",
        why="we declare the packed [N, Hk, P, 2 D] that later releases hand over as a view",
        ends="when 0.28 leaves the range",
        probe=_has(f"{BACKEND}:AttentionBackend.get_kv_cache_shape"),
    ),
    Touch(
        what="get_kv_cache_stride_order and get_required_kv_cache_layout say how that shape lies in memory",
        since="0.20.2",
        until="0.28.0",
        detected="hasattr(AttentionBackend, 'get_required_kv_cache_layout')",
        why="ours lies as it is written, pages outermost and heads before tokens: vLLM may pad pages and calls it HND",
        ends="when 0.28 leaves the range",
        probe=_has(f"{BACKEND}:AttentionBackend.get_required_kv_cache_layout"),
    ),
    Touch(
        what="supported_kv_cache_layouts: vLLM lays the cache out and hands over a view [N, Hk, P, D + V]",
        since="0.29.0",
        until="",
        detected="hasattr(AttentionBackend, 'supported_kv_cache_layouts')",
        why="nothing is overridden: None, any layout, is the base's answer and true of us",
        ends="never",
        probe=_has(f"{BACKEND}:AttentionBackend.supported_kv_cache_layouts"),
    ),
    Touch(
        what="what transfers caches between engines knows keys and values side by side in one page",
        since="0.26.0",
        until="",
        detected="there is no get_kv_cache_shape, or that of FLASH_ATTN has four dimensions",
        why="before, a transfer would take our cache apart where it has no seam: it is refused",
        ends="when 0.25 leaves the range",
        probe=lambda: bool(_resolve(f"{__name__}:connectors_know_packed_caches")()),
    ),
    Touch(
        what="get_supported_kernel_block_sizes gets the cache's specification",
        since="0.31.0",
        until="",
        detected="accepted and ignored as *_",
        why="one signature serves all releases",
        ends="when 0.30 leaves the range",
        probe=_takes(f"{BACKEND}:AttentionBackend.get_supported_kernel_block_sizes", "kv_cache_spec"),
    ),
    Touch(
        what="supports_sliding_window: asked of the class, no by default",
        since="0.26.0",
        until="",
        detected="hasattr(AttentionBackend, name); answered in every release",
        why="windows are served",
        ends="never",
        probe=_has(f"{BACKEND}:AttentionBackend.supports_sliding_window"),
    ),
    Touch(
        what="supports_dcp of an implementation is True by default until 0.29, then False",
        since="0.26.0",
        until="0.29.0",
        detected="said outright, never inherited",
        why="dense attention of ours gives no LSE for the shards of a context",
        ends="when 0.29 leaves the range",
        probe=lambda: getattr(_resolve(f"{BACKEND}:AttentionImplBase"), "supports_dcp", False) is True,
    ),
    Touch(
        what="supports_device_cpu_query_lens_mismatch: rows whose queries only the device knows; yes by default",
        since="0.28.0",
        until="",
        detected="hasattr(AttentionBackend, name)",
        why="what is launched follows from the most queries of a row as the host knows it: no",
        ends="when it no longer does",
        probe=_has(f"{BACKEND}:AttentionBackend.supports_device_cpu_query_lens_mismatch"),
    ),
    Touch(
        what="update_draft_decode_metadata: the schedule of a draft's next step made within its graph",
        since="0.28.0",
        until="",
        detected="hasattr(AttentionMetadataBuilder, name); offered in every release",
        why="several draft steps in one captured graph",
        ends="never",
        probe=_has(f"{BACKEND}:AttentionMetadataBuilder.update_draft_decode_metadata"),
    ),
    Touch(
        what="get_layers_from_vllm_config: the layers of a builder's group",
        since="0.20.2",
        until="",
        detected="importable from vllm.config, with AttentionLayerBase beside the layers",
        why="the builder sizes a workspace for the problems of its layers, and compiles what they will need",
        ends="when the builder is given its layers",
        probe=lambda: (
            _has("vllm.config:get_layers_from_vllm_config")()
            and _has("vllm.model_executor.layers.attention_layer_base:AttentionLayerBase")()
        ),
        needed=True,
    ),
    Touch(
        what="_k_scale and _v_scale of a layer: one number, or one for each key-value head",
        since="0.20.2",
        until="",
        detected="their number of elements; that there are several is told by kv_cache_scheme of the quantisation",
        why="a quantised cache is stored and read with them",
        ends="never",
        probe=_takes(f"{BACKEND}:AttentionBackend.validate_configuration", "use_per_head_quant_scales"),
    ),
    Touch(
        what="additional_config is part of the key of what torch.compile leaves on disk",
        since="0.20.2",
        until="",
        detected="VllmConfig.compute_hash reads it",
        why="the key knows a member's name, not what overrides it: ours writes its release there",
        ends="when the key holds the class",
        probe=_source_of("vllm.config:VllmConfig.compute_hash", "self.additional_config"),
    ),
    Touch(
        what="latent attention is made of MLACommonBackend, MLACommonMetadataBuilder, MLACommonImpl and their metadata",
        since="0.20.2",
        until="",
        detected="importable from one module",
        why="vLLM's layer, its split into decode and prefill, and its drafts expect these",
        ends="when vLLM documents what a backend of latent attention must offer",
        probe=lambda: all(_has(f"{MLA}:MLACommon{part}")() for part in ("Backend", "MetadataBuilder", "Impl")),
    ),
    Touch(
        what="forward_mqa gets the query in two tensors, the first made for this call and not read after it",
        since="0.20.2",
        until="",
        detected="MLAAttention.forward_impl makes mqa_ql_nope, and builds the pair of it",
        why="the result is written over it: nothing is allocated per layer",
        ends="when forward_mqa is given an output",
        probe=_source_of(f"{MLA}:MLAAttention.forward_impl", "mqa_q = (mqa_ql_nope, mqa_q_pe)"),
    ),
    Touch(
        what="a prefill backend of the builder's own prepares each step's prefill; before, flags of the builder",
        since="0.21.0",
        until="",
        detected="hasattr(builder, '_prefill_backend')",
        why="ours takes its place: others plan on the host, and some wait for the device",
        ends="when a backend can bring its own prefill",
        probe=_source_of(f"{MLA}:MLACommonMetadataBuilder.__init__", "self._prefill_backend"),
    ),
    Touch(
        what="the context of prefilling rows is planned as a list of chunks, each of some rows; before, of all rows",
        since="0.28.0",
        until="",
        detected="hasattr(context, 'chunks')",
        why="both are read as one kind of chunk",
        ends="when 0.27 leaves the range",
        probe=_has(f"{MLA}:MLACommonPrefillMetadata.ContextChunk"),
    ),
    Touch(
        what="prefill_tokens_with_context: so many tokens are merged with their context, as if those came first",
        since="0.20.2",
        until="0.27.0",
        detected="a field of ChunkedContextMetadata that is set",
        why="the newer model runner orders rows by their tokens: where vLLM merges for us, under context parallelism, "
        "it would leave out the context of some; ours tells it to merge them all, for a row without is -inf and zero",
        ends="when 0.27 leaves the range",
        probe=lambda: (
            "prefill_tokens_with_context"
            in _resolve(f"{MLA}:MLACommonPrefillMetadata.ChunkedContextMetadata").__annotations__
        ),
    ),
    Touch(
        what="gather_and_maybe_dequant_cache copies latent vectors out of the cache",
        since="0.20.2",
        until="",
        detected="its parameters; a CPU, which lacks it in most releases, gathers in torch",
        why="keys and values of the context are multiplied out of them",
        ends="when we gather by ourselves",
        probe=_takes("vllm._custom_ops:gather_and_maybe_dequant_cache", "token_to_seq", "num_tokens", "seq_starts"),
    ),
    Touch(
        what="a CPU serves latent attention, as CPU_MLA; from 0.29 on as AMX_MLA where it has matrix tiles",
        since="0.28.0",
        until="",
        detected="the members of AttentionBackendEnum",
        why="both are overridden, as CPU_ATTN is",
        ends="when the CPU platform honours the selected backend",
        probe=_has(f"{REGISTRY}:AttentionBackendEnum.CPU_MLA"),
    ),
    Touch(
        what="the model runner's attn_groups: for each kind of layer the builders of metadata and the layers' names",
        since="0.20.2",
        until="",
        detected="a field metadata_builders of AttentionGroup",
        why="`taut audit` stands in for their methods, whatever the backend; nothing else uses it",
        ends="when vLLM tells how a step spends its time in attention",
        probe=lambda: "metadata_builders" in {item.name for item in dataclasses.fields(_resolve(GROUP))},
    ),
    Touch(
        what="a worker holds its model runner as model_runner, which runs a step with execute_model(scheduler_output)",
        since="0.20.2",
        until="",
        detected="the parameters of Worker.execute_model",
        why="`taut audit` tells one step from the next by it; LLM.collective_rpc hands the worker over",
        ends="with the entry above",
        probe=_takes("vllm.v1.worker.worker_base:WorkerBase.execute_model", "scheduler_output"),
    ),
)


def _source_file(module: str) -> str:
    """The source of a module that cannot be imported everywhere."""
    from importlib.util import find_spec
    from pathlib import Path

    spec = find_spec(module)
    return Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""


def engine_version() -> str:
    """vLLM's release, as it says itself."""
    import vllm

    return str(vllm.__version__)


@cache
def failures() -> tuple[str, ...]:
    """What this release of vLLM lacks that we cannot do without, as sentences; looked for once a process.

    A release outside the range is said so, once, and served as far as the probes hold.
    """
    version = engine_version()
    if age_of(version, RELEASES) != "within":
        log.warning(
            "vLLM %s is not among %s to %s, which this release of taut was made for: served as far as the probes hold",
            version,
            *RELEASES,
        )
    return tuple(
        f"vLLM {version} is not as taut needs it: {touch.what} (probe: {touch.detected}; {touch.verdict()})"
        for touch in LEDGER
        if touch.needed and touch.verdict() != "here"
    )


def override(members: Iterable[str], module: str) -> list[str]:
    """Let `module.NAME` answer whenever vLLM asks for the backend NAME; those that this release lacks are left out.

    Returns:
        the names that this release has.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    present = [name for name in members if name in AttentionBackendEnum.__members__]
    for name in present:
        register_backend(AttentionBackendEnum[name], f"{module}.{name}")
    return present


def stock_class(member: str) -> type[Any]:
    """vLLM's own backend class for a member, whatever overrides it."""
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return resolve_obj_by_qualname(AttentionBackendEnum[member].value)  # type: ignore[no-any-return]


def validates_layers() -> bool:
    """Whether this platform asks a class to validate each layer."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda_alike())


def current_config() -> Any | None:
    """The `VllmConfig` of the model that is being built, or None outside of that."""
    from vllm.config import get_current_vllm_config_or_none

    return get_current_vllm_config_or_none()


def latent(config: Any | None) -> bool:
    """Whether the model that is being built caches latent vectors (MLA)."""
    return bool(getattr(getattr(config, "model_config", None), "use_mla", False))


def mark_compiled_code(release: str) -> None:
    """Keep what vLLM compiles of the model that is being built apart from what it compiles around its own backends."""
    additional = getattr(current_config(), "additional_config", None)
    if isinstance(additional, dict):  # a platform from outside may keep an object there, with a key of its own
        additional["taut_attention"] = release


def layers(vllm_config: Any, layer_names: list[str]) -> list[Any]:
    """A builder's layers."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    return list(get_layers_from_vllm_config(vllm_config, AttentionLayerBase, layer_names).values())


@cache
def connectors_know_packed_caches() -> bool:
    """Whether a cache [N, Hk, P, D + V] can be transferred to another engine."""
    from vllm.v1.attention.backend import AttentionBackend

    if not hasattr(AttentionBackend, "get_kv_cache_shape"):
        return True
    try:
        return len(stock_class("FLASH_ATTN").get_kv_cache_shape(64, 16, 2, 64)) == 4
    except ImportError:
        return False


def cache_views(kv_cache: Tensor, value_size: int) -> tuple[Tensor, Tensor]:
    """Keys [N, P, Hk, D] and values [N, P, Hk, V] of vLLM's cache [N, Hk, P, D + V], of whatever strides."""
    return packed_cache_views(kv_cache, value_size)


@dataclasses.dataclass(frozen=True)
class ContextChunk:
    """What prefilling rows have cached, as far as it is attended to at once.

    Args:
        tokens: the prefilling tokens whose rows have a share in it.
        query_starts: [R + 1] int32, of those rows, from the first of `tokens` on.
        key_starts: [R + 1] int32, where the gathered keys of each row begin.
        max_query: the most queries of a row.
        max_length: the most keys of a row.
        keys: of all rows together.
        table: [R, pages] int32, where the rows' tokens lie in the cache.
        starts: [R] int32, the first position of each row that is gathered.
        token_to_seq: [keys] int32, which row a gathered key belongs to.
        workspace: [>= keys, C + E], where to.
    """

    tokens: slice
    query_starts: Tensor
    key_starts: Tensor
    max_query: int
    max_length: int
    keys: int
    table: Tensor
    starts: Tensor
    token_to_seq: Tensor
    workspace: Tensor


def context_chunks(prefill: Any) -> list[ContextChunk]:
    """The chunks that vLLM has planned for the context of its prefilling rows; none where nothing is cached."""
    context = prefill.chunked_context
    if context is None:
        return []
    if hasattr(context, "chunks"):
        return [
            ContextChunk(
                tokens=chunk.token_slice,
                query_starts=chunk.query_start_loc,
                key_starts=chunk.cu_seq_lens,
                max_query=chunk.max_query_len,
                max_length=chunk.max_seq_len,
                keys=chunk.num_context_tokens,
                table=prefill.block_table[chunk.request_slice],
                starts=chunk.starts,
                token_to_seq=chunk.token_to_seq,
                workspace=context.workspace,
            )
            for chunk in context.chunks
        ]
    return [
        ContextChunk(
            tokens=slice(None),
            query_starts=prefill.query_start_loc,
            key_starts=context.cu_seq_lens[index],
            max_query=prefill.max_query_len,
            max_length=context.max_seq_lens[index],
            keys=keys,
            table=prefill.block_table,
            starts=context.starts[index],
            token_to_seq=context.token_to_seq[index],
            workspace=context.workspace,
        )
        for index, keys in enumerate(context.seq_tot)
    ]


def merge_all_rows(prefill: Any) -> None:
    """Let vLLM, where it merges for us, merge every prefilling row with its context, whichever rows have one."""
    if getattr(prefill.chunked_context, "prefill_tokens_with_context", None) is not None:
        prefill.chunked_context.prefill_tokens_with_context = None


def gather_context(cache: Tensor, chunk: ContextChunk, kv_cache_dtype: str, scale: Tensor) -> Tensor:
    """Copy the latent and rope vectors of a chunk out of an MLA cache [N, P, C + E]: [keys, C + E] numbers."""
    gathered = chunk.workspace[: chunk.keys]
    if cache.is_cpu:
        gather_on_cpu(cache, chunk, scale, gathered)
        return gathered
    from vllm import _custom_ops

    _custom_ops.gather_and_maybe_dequant_cache(
        src_cache=cache,
        dst=chunk.workspace,
        block_table=chunk.table,
        cu_seq_lens=chunk.key_starts,
        token_to_seq=chunk.token_to_seq,
        num_tokens=chunk.keys,
        kv_cache_dtype=kv_cache_dtype,
        scale=scale,
        seq_starts=chunk.starts,
    )
    return gathered


def gather_on_cpu(cache: Tensor, chunk: ContextChunk, scale: Tensor, gathered: Tensor) -> None:
    """The same in torch: not every release has an operation for it, and none knows a quantised cache."""
    pages, ends = PageTable(chunk.table, cache.shape[1]), chunk.key_starts.tolist()
    for row, first in enumerate(chunk.starts.tolist()):
        own = slice(ends[row], ends[row + 1])
        page, place = pages.row_slots(row, first, first + own.stop - own.start)
        gathered[own] = dequantised(cache[page, place], scale, gathered.dtype)


def prefill_through(builder: Any, prefill: Any) -> None:
    """Let an MLA builder prepare nothing for vLLM's own prefill kernels, which ours take the place of.

    From 0.21 on a prefill backend of the builder's prepares each step, and some wait for the device to do it. Before,
    the builder did so itself by the flags below; they stay where context parallelism prefills with those kernels.
    """
    if hasattr(builder, "_prefill_backend"):
        builder._prefill_backend = prefill
    elif builder.dcp_world_size == 1:
        from vllm.model_executor.layers.attention.mla_attention import MLACommonPrefillMetadata

        builder._use_fi_prefill = builder._use_cudnn_prefill = builder._use_trtllm_ragged_prefill = False
        builder.prefill_metadata_cls = MLACommonPrefillMetadata
        builder._workspace_buffer = builder.cudnn_workspace = None


@dataclasses.dataclass(frozen=True)
class AuditedParts:
    """What of a worker an audit stands in for.

    Args:
        runner: runs a step with `execute_model`.
        backends: the classes that vLLM chose.
        builders: of metadata, with `build`.
        layers: of attention, by their names, with `forward` and `impl`.
    """

    runner: Any
    backends: list[type[Any]]
    builders: list[Any]
    layers: dict[str, Any]


def audited_parts(worker: Any) -> AuditedParts:
    """The parts of a worker whose steps are audited, as `LLM.collective_rpc` hands it over."""
    runner = getattr(worker, "worker", worker).model_runner
    groups = [group for of_cache in runner.attn_groups for group in of_cache]
    names = [name for group in groups for name in group.layer_names]
    named = zip(names, layers(runner.vllm_config, names), strict=True)
    attention = {name: layer for name, layer in named if hasattr(layer, "impl")}  # a recurrent layer has none
    builders = [builder for group in groups for builder in group.metadata_builders]
    return AuditedParts(runner, [group.backend for group in groups], builders, attention)


def audited_batch(arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """The `CommonAttentionMetadata` among the arguments of a builder's `build`."""
    return named["common_attn_metadata"] if "common_attn_metadata" in named else arguments[1]
