"""Whether we serve: what SGLang was asked for and what it resolved, judged by what our kernels can do.

A model is judged twice: by its configuration, before SGLang resolves its arguments, so that SGLang can still choose as
it would without us; and layer by layer, when the backend is built in the process that runs the model.

No class of ours is known here. What the user chose, and the lines that a process says once, are kept here.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from taut.adapters.engine import Selection, serving_line
from taut.adapters.sglang import bridge
from taut.common_kernels.model import problems_of_model
from taut.common_kernels.providers import ProviderError, registry

if TYPE_CHECKING:
    from taut.common_kernels.problem import Problem

log = logging.getLogger("taut.sglang")

DTYPES = {"auto": None, "half": "float16", "float": "float32"}
# Models for which SGLang admits only backends of its own, by name.
ADMITTED_BY_NAME = ("Llama4ForConditionalGeneration", "Gemma4ForConditionalGeneration", "Gemma4ForCausalLM")
# Whose draft model runs ahead step by step, each of one token.
DRAFTED_BY_STEPS = ("EAGLE", "EAGLE3", "NEXTN", "STANDALONE")
CACHE_DTYPES = {"auto": None, "fp8_e4m3": "float8_e4m3fn", "bf16": "bfloat16", "bfloat16": "bfloat16"}


@dataclass
class _State:
    """What this process was told, what it has said, and whether a backend of ours was built in it."""

    selection: Selection = field(default_factory=Selection)
    said: set[str] = field(default_factory=set)
    built: bool = False


_state = _State()


def chosen() -> Selection:
    """What the user chose, as the plugin told it."""
    return _state.selection


def tell(selection: Selection) -> None:
    """Take what the user chose."""
    _state.selection = selection


def choose(server_args: Any) -> None:
    """Ask SGLang for our backend before it resolves its arguments, unless the user asked for another.

    Raises:
        ValueError: TAUT_ATTENTION=on, and another backend was asked for or the model cannot be served.
    """
    asked = bridge.backends_asked(server_args)
    if bridge.NAME in asked.values() or not bridge.has_model(server_args):
        return
    reasons = [f"--{argument.replace('_', '-')} {name} asks for another backend" for argument, name in asked.items()]
    reasons = reasons or argument_refusals(server_args) + model_refusals(server_args)
    if not reasons:
        server_args.attention_backend = bridge.NAME
    elif _state.selection.mode == "on":
        raise ValueError(refusal(reasons))
    else:
        say(f"TAUT_ATTENTION=auto: SGLang keeps its own attention: {'; '.join(reasons)}", logging.WARNING)


def remember_built() -> None:
    """Take note that a backend of ours was built in this process."""
    _state.built = True


def verify() -> None:
    """Stop a server that was told `on` and got another backend: SGLang hides why.

    Raises:
        ValueError: none of the backends of this process is ours.
    """
    if not _state.built:
        raise ValueError(
            "TAUT_ATTENTION=on did not take effect: SGLang built another attention backend. "
            f"Start it with --attention-backend {bridge.NAME}, or set TAUT_ATTENTION=auto"
        )


def argument_refusals(server_args: Any) -> list[str]:
    """Why SGLang cannot be served as it was started, as sentences that name its arguments."""
    reasons = []
    algorithm = getattr(server_args, "speculative_algorithm", None)
    if algorithm:
        draft = getattr(server_args, "speculative_draft_attention_backend", None)
        if algorithm == "NGRAM" or (getattr(server_args, "speculative_eagle_topk", None) or 1) > 1:
            reasons.append(
                "speculative decoding that verifies trees (NGRAM, --speculative-eagle-topk above 1) is not supported, "
                "only chains: --speculative-eagle-topk 1"
            )
        elif draft in (None, bridge.NAME) and algorithm not in DRAFTED_BY_STEPS:
            reasons.append(
                f"the attention of drafts of --speculative-algorithm {algorithm} is not supported, only of "
                f"{', '.join(DRAFTED_BY_STEPS)}: name another backend for it, "
                "--speculative-draft-attention-backend triton"
            )
    switches = {
        "enable_deterministic_inference": "sums that do not depend on the batch",
        "enable_unified_memory": "a pool of virtual slots",
        "enable_two_batch_overlap": "two batches at once",
        "dllm_algorithm": "diffusion language models",
        "multi_item_scoring_delimiter": "masks between items",
        "prefill_only_disable_kv_cache": "prompts without a cache",
    }
    reasons += [
        f"--{name.replace('_', '-')} ({what}) is not supported"
        for name, what in switches.items()
        if getattr(server_args, name, None)
    ]
    reasons += [
        f"--{name.replace('_', '-')} {size} (context parallelism) is not supported"
        for name in ("dcp_size", "attn_cp_size")
        if (size := getattr(server_args, name, None) or 1) > 1
    ]
    cache = getattr(server_args, "kv_cache_dtype", None) or "auto"
    if cache not in CACHE_DTYPES:
        reasons.append(f"--kv-cache-dtype {cache} is not supported, only {', '.join(CACHE_DTYPES)}")
    return reasons


def model_refusals(server_args: Any) -> list[str]:
    """Why the model cannot be served, as far as its configuration tells."""
    try:
        config = bridge.model_config(server_args)
    except Exception as error:  # SGLang will say it better when it reads the model itself
        return [f"the model's configuration cannot be read: {type(error).__name__}: {error}"]
    dtype, cache = server_args.dtype, getattr(server_args, "kv_cache_dtype", None) or "auto"
    try:
        problems = problems_of_model(
            config,
            target=bridge.target(server_args),
            dtype=DTYPES.get(dtype, dtype),
            cache_dtype=CACHE_DTYPES.get(cache),
            page_size=1,
            tensor_parallel=max(1, server_args.tp_size // max(1, _data_parallel(server_args))),
        )
    except ValueError as error:
        return [str(error)]
    reasons = [
        f"SGLang admits only backends of its own for {name}"
        for name in config.get("architectures") or ()
        if name in ADMITTED_BY_NAME
    ]
    if (config.get("attn_temperature_len") or -1) > 0:
        reasons.append("attn_temperature_len (temperature by position) is not supported")
    # SGLang merges the chunks of unabsorbed MLA with a kernel of its own.
    return reasons + [why for problem in problems if problem.operation != "merge" for why in _kernel_refusal(problem)]


def _kernel_refusal(problem: Problem) -> list[str]:
    try:
        registry().choose(problem, _state.selection.kernels)
    except ProviderError as error:
        return [str(error)]
    return []


def _data_parallel(server_args: Any) -> int:
    """Over how many groups the requests' attention is shared out: each group has all heads."""
    return int(server_args.dp_size) if getattr(server_args, "enable_dp_attention", False) else 1


def refusal(reasons: list[str]) -> str:
    """The sentence with which serving is refused."""
    return (
        f"taut attention cannot serve this model: {'; '.join(reasons)}. "
        "Set TAUT_ATTENTION=auto to let SGLang choose its own backend then, or TAUT_ATTENTION=off"
    )


def announce(kind: str, provider: str) -> None:
    """The line by which a process of SGLang says, once, that it serves through us."""
    say(serving_line(kind, "SGLang", bridge.engine_version(), provider, _state.selection.table))


def say_first_step(rows: int, tokens: int) -> None:
    """At level debug, once a process: proof that a step ran through this code."""
    if "step" not in _state.said:
        _state.said.add("step")
        log.debug("first step: %d rows, %d tokens", rows, tokens)


def say(line: str, level: int = logging.INFO) -> None:
    """Say a line once a process."""
    if line not in _state.said:
        _state.said.add(line)
        log.log(level, line)
