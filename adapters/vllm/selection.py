"""What is registered with vLLM, and who is chosen when vLLM asks for a backend.

| TAUT_ATTENTION | registered | answer when vLLM asks |
| --- | --- | --- |
| unset | CUSTOM, and CPU_ATTN because a CPU asks for nothing else | ours for CUSTOM; the stock class otherwise |
| auto | CUSTOM and every member that vLLM's own priority lists walk | ours where it serves, else the stock class |
| on | the same | ours, or an error with every reason |
| off | nothing | - |

vLLM resolves a registered path each time it needs the class (see the ledger in `bridge`), so the answer is given then,
with the model's configuration at hand. On a GPU vLLM asks the class to validate each layer's configuration; a CPU
does not, and there the model's configuration is held against what we serve before the class is handed out.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from taut.adapters.engine import Selection
from taut.adapters.vllm import bridge

log = logging.getLogger("taut.vllm")

MODULE = "taut.adapters.vllm.members"
CPU_MEMBERS = ("CPU_ATTN", "CPU_MLA", "AMX_MLA")
DENSE_MEMBERS = (
    "FLASH_ATTN",
    "FLASHINFER",
    "TRITON_ATTN",
    "FLEX_ATTENTION",
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
NO_MLA = "MLA models are not served by this release of taut"


@dataclass
class _State:
    """What this process was told, and what it has said."""

    selection: Selection = field(default_factory=Selection)
    said: set[str] = field(default_factory=set)


_state = _State()


def selection() -> Selection:
    """What the user chose, as the plugin told it."""
    return _state.selection


def register(chosen: Selection) -> None:
    """Register our backends with vLLM as the table above says. Idempotent; called in each of vLLM's processes."""
    _state.selection = chosen
    members = ["CUSTOM", "CPU_ATTN"]
    if chosen.mode is not None:
        members += [*DENSE_MEMBERS, *MLA_MEMBERS]
    present = bridge.override(dict.fromkeys(members), MODULE)
    log.debug("registered for %s", ", ".join(present))


def answer(member: str) -> type[Any]:
    """The class that vLLM gets for a member that we have overridden.

    Raises:
        ValueError: TAUT_ATTENTION=on, or CUSTOM, and the model cannot be served; the message holds every reason.
    """
    from taut.adapters.vllm.dense import backend_for

    if member == "CUSTOM":
        return backend_for(member)
    config = bridge.current_config()
    asked = custom_was_asked(config)
    if _state.selection.mode is None and not asked:
        return bridge.stock_class(member)
    if member in MLA_MEMBERS:
        reasons = [NO_MLA]
    elif member in CPU_MEMBERS:
        reasons = model_refusals(config)
    else:
        reasons = []  # a GPU's layers are validated one by one
    if not reasons:
        return backend_for(member)
    if _state.selection.mode == "auto" and not asked:
        leave_to_engine(member, reasons)
        return bridge.stock_class(member)
    raise ValueError(refusal(reasons))


def decided(kind: str, member: str) -> type[Any]:
    """The class that came of the last validation of a member: ours, or vLLM's own.

    Args:
        kind: "dense" or "MLA", which of our classes was validated.
        member: as vLLM asked for it.
    """
    from taut.adapters.vllm.dense import backend_for

    ours = {"dense": backend_for}[kind](member)
    return bridge.stock_class(member) if ours.left_to_engine else ours


def custom_was_asked(config: Any | None) -> bool:
    """Whether the engine's own flag asks for us: `--attention-backend CUSTOM`, for all layers or for one kind."""
    attention = getattr(config, "attention_config", None)
    per_kind = getattr(attention, "backend_per_kind", None) or {}
    asked = [getattr(attention, "backend", None), *per_kind.values()]
    return any(getattr(backend, "name", backend) == "CUSTOM" for backend in asked)


def model_refusals(config: Any | None) -> list[str]:
    """Why the model that is being built cannot be served on a CPU, as sentences; empty when it can.

    A model with several kinds of attention is judged whole: a CPU tells nothing of the single layer.
    """
    from taut.adapters.vllm.shared import cache_dtype_refusal

    model = getattr(config, "model_config", None)
    if config is None or model is None:
        return []
    reasons = []
    if getattr(model, "is_mm_prefix_lm", False):
        reasons.append("bidirectional attention over multimodal prefixes is not supported")
    if getattr(model, "rswa_window", None) is not None:
        reasons.append("reference sliding window attention (R-SWA) is not supported")
    if getattr(model, "is_encoder_decoder", False):
        reasons.append("cross attention of encoder-decoder models is not supported")
    if config.parallel_config.decode_context_parallel_size > 1:
        reasons.append("decode context parallelism is not supported")
    wrong_cache = cache_dtype_refusal(config.cache_config.cache_dtype)
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
