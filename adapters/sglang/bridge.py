"""The ledger: every touch of SGLang's internals and every difference between its releases that this adapter meets.

Each entry says what it is, since and until which release, how it is told apart (by a probe, never by comparing
versions), why we need it, and when it can go. The functions below are the only places where those touches happen; the
other modules of this adapter import from SGLang only `AttentionBackend`, whose place is the same in all of `RELEASES`,
and read the fields of the batch, the layer and the runner that every backend reads.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taut.adapters.engine import Touch
from taut.common_kernels.paging import slot_cache_view

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

RELEASES = ("0.5.11", "0.5.23")  # what this adapter was made for, first and last
NAME = "taut"


SERVER_ARGS = "sglang.srt.server_args"
MODEL_RUNNER = "sglang.srt.model_executor.model_runner"
REGISTRY = "sglang.srt.layers.attention.attention_registry"
HOOKS = "sglang.srt.plugins.hook_registry"
MLA_HANDLERS = "sglang.srt.models.deepseek_common.attention_backend_handler"
MLA_UTILITIES = "sglang.srt.models.deepseek_common.utils"
MLA_FORMS = "sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods"
CAPTURE_PROBES = ("is_in_piecewise_cuda_graph", "is_in_tc_piecewise_cuda_graph", "is_in_breakable_cuda_graph")
BASE = "sglang.srt.layers.attention.base_attn_backend"
LAYERS = "sglang.srt.layers.radix_attention"
SWA_POOL = "sglang.srt.mem_cache.swa_memory_pool"
CHUNKED_PREFIXES = "CHUNKED_PREFIX_CACHE_SUPPORTED_ATTENTION_BACKENDS"
CONFIGS = "sglang.srt.utils.hf_transformers_utils"
ENGINE = "sglang.srt.entrypoints.engine"
PIECEWISE = "disable_piecewise_cuda_graph"
SCHEDULER = "sglang.srt.managers.scheduler"
SPECULATION = "sglang.srt.speculative.spec_info"
DRAFTS = "sglang.srt.speculative.draft_utils"
VERIFY_MASK = "sglang.srt.layers.attention.verify_mask"
BUILDERS = ("init_attention_backends", "init_attention_backend")

LEDGER = (
    Touch(
        what="ATTENTION_BACKENDS, filled by register_attention_backend",
        since="0.5.11",
        until="",
        detected="importable from sglang.srt.layers.attention.attention_registry",
        why="the name `taut` stands for our backend",
        ends="never: this is how a backend is registered",
        probe=lambda: _has(REGISTRY, "ATTENTION_BACKENDS", "register_attention_backend"),
        needed=True,
    ),
    Touch(
        what="add_attention_backend_choices: the names that --attention-backend and its variants take",
        since="0.5.11",
        until="",
        detected="importable from sglang.srt.server_args",
        why="the command line refuses every other name",
        ends="never",
        probe=lambda: _has(SERVER_ARGS, "ATTENTION_BACKEND_CHOICES", "add_attention_backend_choices"),
        needed=True,
    ),
    Touch(
        what="add_draft_attention_backend_choices: the names that --speculative-draft-attention-backend takes",
        since="0.5.19",
        until="",
        detected="hasattr(sglang.srt.server_args, name); before, the list above serves for it too",
        why="the same for the draft model",
        ends="when 0.5.18 leaves the range",
        probe=lambda: _has(SERVER_ARGS, "DRAFT_ATTENTION_BACKEND_CHOICES", "add_draft_attention_backend_choices"),
    ),
    Touch(
        what="CHUNKED_PREFIX_CACHE_SUPPORTED_ATTENTION_BACKENDS, in model_runner until 0.5.15, then in server_args",
        since="0.5.11",
        until="",
        detected="hasattr(server_args, name); else model_runner, which is not imported before a scheduler is made",
        why="unabsorbed MLA over a cached prefix is switched off for a name that is not in the list",
        ends="when a backend can say so itself",
        probe=lambda: _has(SERVER_ARGS, CHUNKED_PREFIXES) or _has(MODEL_RUNNER, CHUNKED_PREFIXES),
    ),
    Touch(
        what="Scheduler.__init__: the process that computes builds its model and its backends there",
        since="0.5.11",
        until="",
        detected="in the source of sglang.srt.managers.scheduler, whose import needs far more than we do",
        why="before it the list above is joined; TAUT_ATTENTION=on that did not take effect stops the server after it",
        ends="when 0.5.15 leaves the range and a setting of the environment can choose a backend",
        probe=lambda: _names(SCHEDULER, "class Scheduler("),
    ),
    Touch(
        what="AttentionBackendRegistry and AttnForwardMethod: which form of MLA serves a batch, by the backend's name",
        since="0.5.11",
        until="",
        detected="importable from sglang.srt.models.deepseek_common",
        why="a name without a handler gets triton's, which takes the absorbed form for every cached prefix",
        ends="when a backend can say so itself",
        probe=lambda: _has(MLA_HANDLERS, "AttentionBackendRegistry") and _has(MLA_FORMS, "AttnForwardMethod"),
    ),
    Touch(
        what="what asks whether a prefill is being captured: is_in_piecewise_cuda_graph until 0.5.13, then two others",
        since="0.5.11",
        until="",
        detected="getattr on the module of the handlers, which imports those that its release has",
        why="a captured prefill must take one form of MLA always",
        ends="when 0.5.13 leaves the range",
        probe=lambda: any(_has(MLA_HANDLERS, name) for name in CAPTURE_PROBES),
    ),
    Touch(
        what="_dispatch_mla_subtype: the absorbed form with or without its rotation fused in",
        since="0.5.11",
        until="",
        detected="an attribute of the module of the handlers",
        why="a CPU with AMX fuses it",
        ends="when handlers answer with the form alone",
        probe=lambda: _has(MLA_HANDLERS, "_dispatch_mla_subtype"),
    ),
    Touch(
        what="FORWARD_ABSORB_CORE_ATTENTION_BACKENDS, a list without an adder",
        since="0.5.11",
        until="",
        detected="importable from sglang.srt.models.deepseek_common.utils",
        why="only its members get the two parts of absorbed queries and keys apart; for others they are concatenated",
        ends="when a backend can say so itself",
        probe=lambda: _has(MLA_UTILITIES, "FORWARD_ABSORB_CORE_ATTENTION_BACKENDS"),
    ),
    Touch(
        what="the arguments are resolved by ServerArgs.__post_init__, then by ServerArgs.resolve_once",
        since="0.5.11",
        until="",
        detected="hasattr(ServerArgs, 'resolve_once'); the patch of __post_init__ is ignored from 0.5.20 on (msgspec)",
        why="TAUT_ATTENTION=auto and on set the backend's name before SGLang chooses one",
        ends="when a setting of the environment can choose a backend",
        probe=lambda: _has(SERVER_ARGS, "ServerArgs") and _has(HOOKS, "HookRegistry", "HookType"),
        needed=True,
    ),
    Touch(
        what="metadata for CUDA graphs: init_forward_metadata_capture_cuda_graph and ..._replay_cuda_graph",
        since="0.5.11",
        until="0.5.12.post1",
        detected="a release calls the ones it knows; from 0.5.13 on init_forward_metadata_out_graph and ..._in_graph",
        why="the backend has both",
        ends="when 0.5.12 leaves the range",
        probe=lambda: _has_method(BASE, "AttentionBackend", "init_forward_metadata_capture_cuda_graph"),
    ),
    Touch(
        what="RadixAttention: the class of every attention layer with a cache",
        since="0.5.11",
        until="",
        detected="importable from sglang.srt.layers.radix_attention",
        why="a model's layers are judged before it serves, and found by `taut audit`",
        ends="never",
        probe=lambda: _has(LAYERS, "RadixAttention"),
    ),
    Touch(
        what="the pools: token_to_kv_pool and req_to_token_pool of the runner, and from 0.5.13 on of the backend",
        since="0.5.11",
        until="",
        detected="attributes of the runner in every release",
        why="we read and write the pool's tensors themselves; later releases find the pools through the backend",
        ends="never",
    ),
    Touch(
        what="a hybrid pool keeps the keys of windowed layers apart: layers_mapping, full_to_swa_index_mapping",
        since="0.5.11",
        until="",
        detected="hasattr(pool, 'layers_mapping') and a mapping that is not None",
        why="slots are translated once a step, so none of the three ways to hand them to set_kv_buffer is needed",
        ends="never",
        probe=lambda: _has(SWA_POOL, "SWAKVPool"),
    ),
    Touch(
        what="_attn_output of a batch: the tensor that a layer's output should be written to",
        since="0.5.11",
        until="",
        detected="getattr; taken away when read, since releases before 0.5.23 leave it there for the next layer",
        why="nothing is copied afterwards",
        ends="never",
    ),
    Touch(
        what="shared_read_ends: until when the scheduler must not write what a forward reads, `req_to_token` above all",
        since="0.5.18",
        until="",
        detected="called by the releases that have it; 0.5.15 to 0.5.17 take it that all is read when a replay begins",
        why="our layers read `req_to_token` itself, to the graph's end. Where that cannot be said, what is written "
        "meanwhile does no harm: places past a row's end, slots that hold the same keys as those they stand for, and "
        "rows of requests whose results nobody reads any more",
        ends="never",
        probe=lambda: _has(BASE, "SharedReadEnds"),
    ),
    Touch(
        what="topk and spec_input_type of a batch's spec_info: whether drafts are a tree",
        since="0.5.11",
        until="",
        detected="getattr",
        why="a chain's mask is causal, a tree's is not",
        ends="when masks of a batch's own are supported",
        probe=lambda: _has(SPECULATION, "SpecInputType"),
    ),
    Touch(
        what="maybe_create_verify_mask: the mask of drafts, which their verification may read",
        since="0.5.17",
        until="",
        detected="importable; before, and for a backend that has none, SGLang fills one over the whole context",
        why="we read none, for a chain's is causal: the smallest there is, and nothing is filled",
        ends="never",
        probe=lambda: _has(VERIFY_MASK, "maybe_create_verify_mask"),
    ),
    Touch(
        what="DraftBackendFactory._create_backend: which class serves the steps of a draft, by the backend's name",
        since="0.5.11",
        until="",
        detected="a method of the class; with a parameter stamps_children, from 0.5.18 on, its map gives a name, too",
        why="its map is a local one: our entry is added when it is passed on",
        ends="when a registered backend can say what serves its drafts",
        probe=lambda: _has_method(DRAFTS, "DraftBackendFactory", "_create_backend"),
    ),
    Touch(
        what="get_config: a model's configuration, with the user's overrides",
        since="0.5.11",
        until="",
        detected="importable from sglang.srt.utils.hf_transformers_utils",
        why="TAUT_ATTENTION=auto judges the model before SGLang starts",
        ends="when a setting of the environment can choose a backend",
        probe=lambda: _has(CONFIGS, "get_config"),
    ),
    Touch(
        what="Engine.run_scheduler_process_func: what a scheduler's process runs",
        since="0.5.11",
        until="",
        detected="named in the source of sglang.srt.entrypoints.engine, whose import needs far more than we do",
        why="`taut audit` watches from inside that process; nothing else uses it",
        ends="when SGLang tells how a step spends its time in attention",
        probe=lambda: _names(ENGINE, "run_scheduler_process_func"),
    ),
    Touch(
        what="disable_piecewise_cuda_graph, a switch of its own for captured prompts",
        since="0.5.11",
        until="0.5.13.post1",
        detected="hasattr(ServerArgs, name); later releases let disable_cuda_graph mean both",
        why="`taut audit` sees no layer inside a captured graph",
        ends="when 0.5.13 leaves the range",
        probe=lambda: _has_method(SERVER_ARGS, "ServerArgs", PIECEWISE),
    ),
    Touch(
        what="ModelRunner.forward(forward_batch) runs a step, with attn_backend for its attention",
        since="0.5.11",
        until="",
        detected="a method of the class",
        why="`taut audit` tells one step from the next by it",
        ends="with the entry below",
        probe=lambda: _has_method(MODEL_RUNNER, "ModelRunner", "forward"),
    ),
    Touch(
        what="the backends are built by ModelRunner.init_attention_backend, then by init_attention_backends",
        since="0.5.11",
        until="",
        detected="hasattr(ModelRunner, name)",
        why="`taut audit` watches them from then on",
        ends="when SGLang tells how a step spends its time in attention",
        probe=lambda: any(_has_method(MODEL_RUNNER, "ModelRunner", name) for name in BUILDERS),
    ),
)


class BridgeError(ValueError):
    """This release of SGLang lacks something that we need; the message names the probe."""


def ledger() -> tuple[Touch, ...]:
    """The entries above, for whoever wants to see them or to ask their probes."""
    return LEDGER


def check() -> None:
    """Ask the probes without which we cannot register ourselves.

    Raises:
        BridgeError: one does not hold, by name.
    """
    missing = [
        f"{touch.what} ({verdict})" for touch in LEDGER if touch.needed and (verdict := touch.verdict()) != "here"
    ]
    if missing:
        raise BridgeError(
            f"this SGLang has no {'; no '.join(missing)}. taut was made for the releases {' to '.join(RELEASES)} "
            "and cannot register itself here"
        )


def _has(module: str, *names: str) -> bool:
    """Whether a module of SGLang's is there and has all these names."""
    try:
        found = import_module(module)
    except ModuleNotFoundError:
        return False
    return all(hasattr(found, name) for name in names)


def _has_method(module: str, owner: str, name: str) -> bool:
    return _has(module, owner) and hasattr(getattr(import_module(module), owner), name)


def _names(module: str, word: str) -> bool:
    """Whether the source of a module of SGLang's has a word in it; the module is not imported."""
    spec = find_spec(module)
    return spec is not None and spec.origin is not None and word in Path(spec.origin).read_text()


def engine_version() -> str:
    """SGLang's release, as it says itself."""
    import sglang

    return str(getattr(sglang, "__version__", "of an unknown release"))


def register(factory: Callable[[Any], Any]) -> None:
    """Let `NAME` stand for the backend that `factory(model_runner)` makes; idempotent."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    register_attention_backend(NAME)(factory)
    server_args = import_module(SERVER_ARGS)
    if NAME not in server_args.ATTENTION_BACKEND_CHOICES:
        server_args.add_attention_backend_choices([NAME])
    draft = getattr(server_args, "DRAFT_ATTENTION_BACKEND_CHOICES", None)
    if draft is not None and NAME not in draft:
        server_args.add_draft_attention_backend_choices([NAME])
    if hasattr(server_args, CHUNKED_PREFIXES):
        _join(getattr(server_args, CHUNKED_PREFIXES))
    else:
        _around_the_scheduler(_join_runner, "BEFORE")


def register_mla(handler: Callable[[Any, Any], Any]) -> None:
    """Let `handler(layer, batch)` choose the form of MLA for `NAME`, and have absorbed queries in two parts.

    Raises:
        BridgeError: this release keeps them elsewhere.
    """
    try:
        registry = import_module(MLA_HANDLERS).AttentionBackendRegistry
        wanting = import_module(MLA_UTILITIES).FORWARD_ABSORB_CORE_ATTENTION_BACKENDS
    except (ImportError, AttributeError) as error:
        raise BridgeError(f"SGLang {engine_version()} chooses the form of MLA in another place: {error}") from error
    registry.register(NAME, handler)
    _join(wanting)


def mla_forms() -> Any:
    """SGLang's names for the forms of MLA: MHA, MHA_ONE_SHOT and MHA_CHUNKED_KV, all of them unabsorbed."""
    return import_module(MLA_FORMS).AttnForwardMethod


def absorbed_form(layer: Any, forward_batch: Any) -> Any:
    """The absorbed form of MLA as it is on this machine: with its rotation fused in, or not."""
    return import_module(MLA_HANDLERS)._dispatch_mla_subtype(layer, forward_batch)


def prefill_is_captured() -> bool:
    """Whether the forward that is running is captured, whole or in pieces: then the form of MLA must not vary."""
    handlers = import_module(MLA_HANDLERS)
    probes = (getattr(handlers, name, None) for name in CAPTURE_PROBES)
    return any(captured() for captured in probes if captured is not None)


def _join(names: list[str]) -> None:
    if NAME not in names:
        names.append(NAME)


def _join_runner(_scheduler: Any, server_args: Any, *_: Any, **__: Any) -> None:
    """Join the list that releases before 0.5.16 keep beside the model runner, which a scheduler is about to import."""
    if NAME in backends_asked(server_args).values():
        _join(getattr(import_module(MODEL_RUNNER), CHUNKED_PREFIXES, []))


def stock_backend(name: str, model_runner: Any) -> Any:
    """A backend of SGLang's own."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    return ATTENTION_BACKENDS[name](model_runner)


def backends_asked(server_args: Any) -> dict[str, str]:
    """The backends that the user asked for, by the name of the argument."""
    arguments = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
    asked = {argument: getattr(server_args, argument, None) for argument in arguments}
    return {argument: name for argument, name in asked.items() if name is not None}


def has_model(server_args: Any) -> bool:
    """Whether the arguments name a model: SGLang also makes records without one."""
    return str(getattr(server_args, "model_path", None)).lower() not in ("none", "dummy", "")


def target(server_args: Any) -> str:
    """What the model is going to run on, before SGLang has settled it: "cpu", "sm_90"."""
    import torch

    from taut.common_kernels.targets import target_of

    device = getattr(server_args, "device", None) or ("cuda" if torch.cuda.is_available() else "cpu")
    return target_of(torch.device(device))


def before_resolution(hook: Callable[[Any], None]) -> None:
    """Call `hook(server_args)` before SGLang resolves its arguments; not for those that have been resolved."""
    server_args = import_module(SERVER_ARGS).ServerArgs
    method = "resolve_once" if hasattr(server_args, "resolve_once") else "__post_init__"

    def unresolved(args: Any, *_: Any, **__: Any) -> None:
        if not getattr(args, "_resolution_finished", False):
            hook(args)

    _hook(f"{SERVER_ARGS}.ServerArgs.{method}", unresolved, "BEFORE")


def register_drafts(steps: Callable[[Any, int], Any], extend: Callable[[Any], Any]) -> None:
    """Let `NAME` stand for our backends of a draft model, in a process that has imported schedulers.

    Args:
        steps: makes, of a model runner and the number of tokens of a draft, what serves the steps that it runs ahead;
            None lets SGLang's own serve them.
        extend: makes, of a model runner, what takes in the tokens that were accepted.
    """

    def add(factory: Any, _asked: str, backends: dict[str, Callable[[], Any]], *_: Any, **__: Any) -> None:
        runner, named = factory.draft_model_runner, "stamps_children" in signature(factory._create_backend).parameters

        def ours() -> Any:
            ahead = backends["triton"] == factory._create_triton_decode_backend
            made = steps(runner, factory.speculative_num_steps) if ahead else extend(runner)
            if made is None:
                return backends["triton"]()
            return (NAME, made) if named else made

        backends[NAME] = ours

    if SCHEDULER in sys.modules:
        _hook(f"{DRAFTS}.DraftBackendFactory._create_backend", add, "BEFORE")


def after_the_scheduler_is_made(hook: Callable[[], None]) -> None:
    """Call `hook()` when the process that computes has made its scheduler, and with it the model's backends."""
    _around_the_scheduler(lambda *_, **__: hook(), "AFTER")


def _around_the_scheduler(hook: Callable[..., None], kind: str) -> None:
    """Call a hook before or after a scheduler is made, as SGLang's registry of hooks does.

    Nothing is done in a process that has not imported schedulers, which makes none.
    """
    if SCHEDULER in sys.modules:
        _hook(f"{SCHEDULER}.Scheduler.__init__", hook, kind)


def _hook(target: str, hook: Callable[..., None], kind: str) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(target, hook, HookType[kind])


def model_config(server_args: Any) -> dict[str, Any]:
    """The model's `config.json` as SGLang reads it."""
    import json

    from sglang.srt.utils.hf_transformers_utils import get_config

    overrides = json.loads(getattr(server_args, "json_model_override_args", None) or "{}")
    config = get_config(
        server_args.model_path,
        trust_remote_code=bool(server_args.trust_remote_code),
        revision=server_args.revision,
        model_override_args=overrides,
    )
    return dict(config.to_dict())


def attention_layers(model: Any) -> list[Any]:
    """Every attention layer of a model with a cache; empty where there is no model to look into."""
    modules, layer = getattr(model, "modules", None), import_module(LAYERS).RadixAttention
    return [module for module in modules() if isinstance(module, layer)] if modules else []


def sparse_refusal(model_runner: Any) -> list[str]:
    """Why a model with attention to chosen tokens cannot be served; empty for others."""
    config = getattr(getattr(model_runner, "model_config", None), "hf_config", None)
    if getattr(config, "index_topk", None) is None:
        return []
    return ["index_topk: attention to chosen tokens (sparse MLA) is not supported"]


def attention_type(layer: Any) -> str:
    """ "decoder", "decoder_bidirectional" or "encoder_only"."""
    return str(getattr(layer.attn_type, "value", layer.attn_type))


def dense_cache(pool: Any, layer_id: int) -> tuple[Tensor, Tensor]:
    """Keys [slots, 1, Hk, D] and values [slots, 1, Hk, V] of a layer: the pool's own tensors.

    Asked for in every layer, since a hierarchical cache waits there for what it loads.
    """
    return slot_cache_view(pool.get_key_buffer(layer_id)), slot_cache_view(pool.get_value_buffer(layer_id))


def mla_cache(pool: Any, layer_id: int) -> Tensor:
    """Latent and rope vectors [slots, 1, C + E] of a layer: the pool's own tensor."""
    cache: Tensor = pool.get_key_buffer(layer_id)
    return cache


def cache_refusal(pool: Any, layer_id: int) -> str | None:
    """Why a pool's tensors cannot be read and written as they are; None when they can."""
    buffers = [pool.get_key_buffer(layer_id) for _ in range(2)]
    if buffers[0].data_ptr() != buffers[1].data_ptr():
        return f"{type(pool).__name__} gives a copy of its keys, not the keys"
    if buffers[0].dim() != 3:
        return f"{type(pool).__name__} keeps its keys as {buffers[0].dim()} dimensions, not as [slots, heads, size]"
    return None


def slot_translation(pool: Any) -> Tensor | None:
    """[slots] from a slot of the whole pool to that of its windowed layers; None where they share one."""
    if not hasattr(pool, "layers_mapping"):
        return None
    mapping: Tensor | None = getattr(pool, "full_to_swa_index_mapping", None)
    return mapping


def has_slots_of_its_own(pool: Any, layer_id: int) -> bool:
    """Whether a layer's keys lie in the windowed part of a hybrid pool."""
    mapping = getattr(pool, "layers_mapping", None)
    return bool(mapping is not None and mapping[layer_id][1])


def is_tree(drafts: Any) -> bool:
    """Whether drafts that are to be verified may be a tree: several from one node, or what n-grams found."""
    kind = getattr(getattr(drafts, "spec_input_type", None), "name", "")
    return kind == "NGRAM_VERIFY" or (getattr(drafts, "topk", None) or 1) > 1


def unread_verify_mask(drafts: int, rows: int, context: int, device: torch.device) -> Any:
    """SGLang's mask of drafts for a backend that does not read it; None in releases that have no such thing.

    Args:
        drafts: tokens of each request that are verified; 0 where none are.
        rows: the most requests.
        context: tokens that a request may have.
        device: where it lies.
    """
    if not _has(VERIFY_MASK, "maybe_create_verify_mask"):
        return None
    return import_module(VERIFY_MASK).maybe_create_verify_mask(
        is_draft_runner=False, skip_prefill=False, max_bs=rows, max_context_len=context, num_draft_tokens=drafts,
        device=device, is_read=False,
    )  # fmt: skip


def take_output(batch: Any) -> Tensor | None:
    """The tensor that SGLang wants this layer's output in, once; None where it offers none."""
    given: Tensor | None = getattr(batch, "_attn_output", None)
    if given is not None:
        batch._attn_output = None
    return given


def read_to_the_end(declared: Any) -> Any:
    """SGLang's name for what is read until a graph has ended, or what it declares itself where that is later."""
    ends = type(declared)
    return ends.max_of([declared, ends.POST_REPLAY])


def audited_engine(run_scheduler: Callable[..., Any], **arguments: Any) -> Any:
    """SGLang's engine, whose scheduler's process runs a function of ours; it must lead to `run_scheduler_process`."""
    base = import_module(ENGINE).Engine
    if hasattr(import_module(SERVER_ARGS).ServerArgs, PIECEWISE):  # it captures prompts even where graphs are disabled
        arguments.setdefault(PIECEWISE, arguments.get("disable_cuda_graph", False))
    return type("AuditedEngine", (base,), {"run_scheduler_process_func": staticmethod(run_scheduler)})(**arguments)


def run_scheduler_process(*arguments: Any, **named: Any) -> Any:
    """What a scheduler's process runs otherwise."""
    return import_module(SCHEDULER).run_scheduler_process(*arguments, **named)


def when_backends_are_built(hook: Callable[[Any], None]) -> None:
    """Call `hook(model_runner)` when a model's attention backends have been built, in a process that audits."""
    runner = import_module(MODEL_RUNNER).ModelRunner
    method = next(name for name in BUILDERS if hasattr(runner, name))
    build = getattr(runner, method)

    def building(self: Any, *arguments: Any, **named: Any) -> Any:
        built = build(self, *arguments, **named)
        hook(self)
        return built

    setattr(runner, method, building)


def register_audited(name: str, factory: Callable[[Any], Any]) -> str:
    """Let a name stand for the backend that `factory(model_runner)` makes, in a process that audits; gives the name."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    register_attention_backend(name)(factory)
    server_args = import_module(SERVER_ARGS)
    if name not in server_args.ATTENTION_BACKEND_CHOICES:
        server_args.add_attention_backend_choices([name])
    return name
