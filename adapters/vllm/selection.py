"""What is registered with vLLM, and who is chosen when vLLM asks for a backend.

| TAUT_ATTENTION | registered | answer when vLLM asks |
| --- | --- | --- |
| unset | CUSTOM, and CPU_ATTN because a CPU asks for nothing else | ours for CUSTOM; the stock class otherwise |
| auto | CUSTOM and every member that vLLM's own priority lists walk | ours where it serves, else the stock class |
| on | the same, and the members whose caches have a format of their own | ours, or an error with every reason |
| off | nothing | - |

vLLM resolves a registered path each time it needs the class (see the ledger in `bridge`), so the answer is given then,
with the model's configuration at hand. On a GPU vLLM asks the class to validate each layer's configuration; a CPU
does not, and there the model's configuration is held against what we serve before the class is handed out.

On a GPU a choice takes several questions: vLLM resolves each candidate and has it validate the layer, and then resolves
the chosen one once more, by its path or, in later releases, by the name that the class gives. What came of the
validation is therefore kept until that last question, which ends the walk.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from taut.adapters.engine import Selection
from taut.adapters.vllm import bridge

if TYPE_CHECKING:
    from collections.abc import Container

log = logging.getLogger("taut.vllm")

MODULE = "taut.adapters.vllm.members"
CPU_MEMBERS = ("CPU_ATTN", "CPU_MLA", "AMX_MLA")
DENSE_MEMBERS = (
    "FLASH_ATTN",
    "FLASHINFER",
    "TRITON_ATTN",
    "FLEX_ATTENTION",
    "TRITON_FLASH_ATTN",
    "TRITON_FLASHINFER",
    "ROCM_ATTN",
    "ROCM_AITER_FA",
    "ROCM_AITER_UNIFIED_ATTN",
    "CPU_ATTN",
)
MLA_MEMBERS = (
    "FLASH_ATTN_MLA",
    "FLASHMLA",
    "FLASHINFER_MLA",
    "CUTLASS_MLA",
    "TRITON_MLA",
    "ROCM_AITER_MLA",
    "CPU_MLA",
    "AMX_MLA",
)
# They read caches of formats of their own. With `on` they are ours as well, so that no layer goes past the refusal.
PACKED_MEMBERS = ("TURBOQUANT", "ULTRAQUANT")
# Models whose layers ask for what no configuration tells.
UNSERVED_MODELS = {
    "Rnj1ForCausalLM": "attention in chunks that look back (chunk_lookback) is not supported",
    "Step1ForCausalLM": "ALiBi over square roots (alibi_sqrt) is not supported",
}


@dataclass
class _State:
    """What this process was told, what it has said, and what came of the validations of the current walk."""

    selection: Selection = field(default_factory=Selection)
    said: set[str] = field(default_factory=set)
    walk: dict[str, type[Any]] = field(default_factory=dict)


_state = _State()


def selection() -> Selection:
    """What the user chose, as the plugin told it."""
    return _state.selection


def register(chosen: Selection) -> None:
    """Register our backends with vLLM as the table above says. Idempotent; called in each of vLLM's processes."""
    _state.selection = chosen
    members = ["CUSTOM", *CPU_MEMBERS]
    if chosen.mode is not None:
        members += [*DENSE_MEMBERS, *MLA_MEMBERS]
    if chosen.mode == "on":
        members += PACKED_MEMBERS
    present = bridge.override(dict.fromkeys(members), MODULE)
    log.debug("registered for %s", ", ".join(present))


def answer(member: str) -> type[Any]:
    """The class that vLLM gets for a member that we have overridden.

    Raises:
        ValueError: TAUT_ATTENTION=on, or CUSTOM, and the model cannot be served; the message holds every reason.
    """
    if member in _state.walk:
        return _end_of_walk(member)
    config = bridge.current_config()
    asked = member == "CUSTOM" or custom_was_asked(config)
    if _state.selection.mode is None and not asked:
        return bridge.stock_class(member)
    latent = member in MLA_MEMBERS or (member == "CUSTOM" and bridge.latent(config))
    kind = "MLA" if latent else "dense"
    reasons = list(bridge.failures())
    if not bridge.validates_layers():
        reasons += model_refusals(config, kind=kind)
    if not reasons:
        return _ours(kind, member)
    if _state.selection.mode == "auto" and not asked:
        leave_to_engine(member, reasons)
        return bridge.stock_class(member)
    raise ValueError(refusal(reasons))


def remember(member: str, chosen: type[Any]) -> None:
    """Keep the class that came of the validation of a member, for when vLLM resolves it as its choice."""
    if member in _state.walk:  # nothing was chosen in the walk before
        _state.walk.clear()
    _state.walk[member] = chosen


def decided(kind: str, member: str) -> type[Any]:
    """The class that came of the last validation of a member: ours, or vLLM's own.

    Args:
        kind: "dense" or "MLA", which of our classes was validated.
        member: as vLLM asked for it.
    """
    return _end_of_walk(member) if member in _state.walk else _ours(kind, member)


def _ours(kind: str, member: str) -> type[Any]:
    if kind == "MLA":
        from taut.adapters.vllm.mla import backend_for
    else:
        from taut.adapters.vllm.dense import backend_for
    return backend_for(member)


def _end_of_walk(member: str) -> type[Any]:
    chosen = _state.walk[member]
    _state.walk.clear()
    return chosen


def custom_was_asked(config: Any | None) -> bool:
    """Whether the engine's own flag asks for us: `--attention-backend CUSTOM`, for all layers or for one kind."""
    attention = getattr(config, "attention_config", None)
    per_kind = getattr(attention, "backend_per_kind", None) or {}
    asked = [getattr(attention, "backend", None), *per_kind.values()]
    return any(getattr(backend, "name", backend) == "CUSTOM" for backend in asked)


def model_refusals(config: Any | None, asked: Container[str] = (), *, kind: str) -> list[str]:
    """Why the model that is being built cannot be served, as sentences; empty when it can.

    A model with several kinds of attention is judged whole: its configuration tells nothing of the single layer.

    Args:
        config: vLLM's configuration, or None where there is none.
        asked: what vLLM's own validation asks of a layer, by name; it gives those reasons itself.
        kind: "dense" or "MLA", what of ours would serve.
    """
    from taut.adapters.vllm.shared import cache_dtype_refusal

    model = getattr(config, "model_config", None)
    if config is None or model is None:
        return []
    parallel, attention, transfer = config.parallel_config, config.attention_config, config.kv_transfer_config
    judged = {
        "use_mm_prefix": (model.is_mm_prefix_lm, "bidirectional attention over multimodal prefixes is not supported"),
        "use_rswa": (
            getattr(model, "rswa_window", None) is not None,
            "reference sliding window attention (R-SWA) is not supported",
        ),
        "use_non_causal": (
            getattr(attention, "use_non_causal", False),
            "attention of decoders to what follows is not supported",
        ),
        "use_dcp": (parallel.decode_context_parallel_size > 1, "decode context parallelism is not supported"),
        "use_pcp": (parallel.prefill_context_parallel_size > 1, "prefill context parallelism is not supported"),
        "use_kv_connector": (
            transfer is not None and transfer.is_kv_transfer_instance and not bridge.connectors_know_packed_caches(),
            "this release of vLLM cannot transfer a cache that packs keys and values together",
        ),
    }
    if kind == "MLA":  # it gives the LSE that context parallelism needs, and its cache is vLLM's own in every release
        del judged["use_dcp"], judged["use_kv_connector"]
    reasons = [reason for name, (found, reason) in judged.items() if found and name not in asked]
    reasons += [reason for name, reason in UNSERVED_MODELS.items() if name in (model.architectures or ())]
    wrong_cache = None if "kv_cache_dtype" in asked else cache_dtype_refusal(config.cache_config.cache_dtype)
    return reasons + ([wrong_cache] if wrong_cache else [])


def leave_to_engine(member: str, reasons: list[str]) -> None:
    """Say, once per reason, that vLLM keeps its own backend."""
    line = f"TAUT_ATTENTION=auto: vLLM keeps its own {member}: {'; '.join(reasons)}"
    if line not in _state.said:
        _state.said.add(line)
        log.warning(line)


def refusal(reasons: list[str]) -> str:
    """The sentence with which serving is refused."""
    return (
        f"taut attention cannot serve this model: {'; '.join(reasons)}. "
        "Set TAUT_ATTENTION=auto to let vLLM choose its own backend then, or TAUT_ATTENTION=off"
    )
