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

vLLM finds our classes in the module `members`, which asks here and alone knows them, under two kinds of names:

* `NAME`, a member: what `judge` says at this moment.
* `decided_KIND_NAME`: what came of the last validation: ours, or the stock class if `auto` left the layer to vLLM.
  vLLM resolves the name of the class that it has just validated, and this is the name our classes give.
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
DECIDED = "decided_"
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
CACHE_DTYPES = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "float16": "float16", "bfloat16": "bfloat16"}
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


def chosen() -> Selection:
    """What the user chose, as the plugin told it."""
    return _state.selection


def register(choice: Selection) -> None:
    """Register our backends with vLLM as the table above says. Idempotent; called in each of vLLM's processes."""
    _state.selection = choice
    members = ["CUSTOM", *CPU_MEMBERS]
    if choice.mode is not None:
        members += [*DENSE_MEMBERS, *MLA_MEMBERS]
    if choice.mode == "on":
        members += PACKED_MEMBERS
    present = bridge.override(dict.fromkeys(members), MODULE)
    log.debug("registered for %s", ", ".join(present))


def decided_name(kind: str, member: str) -> str:
    """The name by which vLLM is told to find what came of the validation of a member: "decided_dense_FLASH_ATTN"."""
    return f"{DECIDED}{kind}_{member}"


def judge(member: str) -> str | None:
    """Which kind of ours, "dense" or "MLA", answers when vLLM asks for a member; None where vLLM's own class does.

    Raises:
        ValueError: TAUT_ATTENTION=on, or CUSTOM, and the model cannot be served; the message holds every reason.
    """
    config = bridge.current_config()
    asked = member == "CUSTOM" or custom_was_asked(config)
    if _state.selection.mode is None and not asked:
        return None
    latent = member in MLA_MEMBERS or (member == "CUSTOM" and bridge.latent(config))
    kind = "MLA" if latent else "dense"
    reasons = list(bridge.failures())
    if not bridge.validates_layers():
        reasons += model_refusals(config, kind=kind)
    if not reasons:
        return kind
    if _state.selection.mode == "auto" and not asked:
        leave_to_engine(member, reasons)
        return None
    raise ValueError(refusal(reasons))


def remember(member: str, validated: type[Any]) -> None:
    """Keep the class that came of the validation of a member, for when vLLM resolves it as its choice."""
    if member in _state.walk:  # nothing was chosen in the walk before
        _state.walk.clear()
    _state.walk[member] = validated


def end_of_walk(member: str) -> type[Any] | None:
    """The class that came of the validation of a member, ours or vLLM's own, which ends the walk; None without one."""
    validated = _state.walk.get(member)
    if validated is not None:
        _state.walk.clear()
    return validated


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
    return reasons + ([] if "kv_cache_dtype" in asked else cache_dtype_refusals(config.cache_config.cache_dtype))


def cache_dtype_refusals(kv_cache_dtype: str | None) -> list[str]:
    """Why a `--kv-cache-dtype` cannot be served, as one sentence; empty when it can."""
    if kv_cache_dtype in (None, "auto", *CACHE_DTYPES):
        return []
    return [f"a KV cache of {kv_cache_dtype} is not supported, only auto, {', '.join(CACHE_DTYPES)}"]


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
