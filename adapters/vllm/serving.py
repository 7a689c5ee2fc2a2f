"""What this process serves with: its device, the kernels that were chosen, and the lines that are said about them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from vllm.v1.attention.backend import AttentionCGSupport

import taut
from taut.adapters.engine import serving_line
from taut.adapters.vllm import bridge, selection
from taut.common_kernels.providers import registry

if TYPE_CHECKING:
    from taut.common_kernels.kernels import Kernels
    from taut.common_kernels.problem import Problem
    from taut.common_kernels.providers import KernelProvider

log = logging.getLogger("taut.vllm")

_said: set[str] = set()


def device() -> torch.device:
    """The device that this process serves on."""
    from vllm.platforms import current_platform

    if current_platform.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(current_platform.device_type)


def page_size() -> int:
    """Tokens in a page, as far as it is settled when layers are made; vLLM's default before that."""
    config = bridge.current_config()
    return int(getattr(getattr(config, "cache_config", None), "block_size", None) or 16)


def model_dtype() -> torch.dtype:
    """The dtype of the model that is being built; torch's default, which vLLM sets to it, where none is told."""
    told = getattr(getattr(bridge.current_config(), "model_config", None), "dtype", None)
    return told if isinstance(told, torch.dtype) else torch.get_default_dtype()


def table_path() -> str | None:
    """The tile table that the user named, if any."""
    table = selection.chosen().table
    return None if table is None else str(table)


def provider_of(problem: Problem) -> KernelProvider:
    """Who serves a problem, as the user chose.

    Raises:
        ProviderError: nobody can serve it, or TAUT_KERNELS asks for somebody who cannot.
    """
    return registry().choose(problem, selection.chosen().kernels).provider


def serving_kernels(kind: str, problem: Problem) -> Kernels:
    """The kernels that serve a layer, chosen before the engine serves; said once a process.

    Called for every layer of ours, with its model's configuration at hand: what vLLM compiles of that model is kept
    apart from what it compiles around another backend.

    Raises:
        ProviderError: as `provider_of` does.
    """
    provider = provider_of(problem)
    bridge.mark_compiled_code(taut.__version__)
    line = serving_line(kind, "vLLM", bridge.engine_version(), provider.name, selection.chosen().table)
    if line not in _said:
        _said.add(line)
        log.info(line)
    return provider.kernels


def graph_support(problem: Problem) -> AttentionCGSupport:
    """Whole graphs for decode and uniform verification batches where the kernels can be captured; else none."""
    return AttentionCGSupport.UNIFORM_BATCH if provider_of(problem).graphs else AttentionCGSupport.NEVER


def say_first_step(rows: int, tokens: int) -> None:
    """At level debug, once a process: proof that a step ran through this code."""
    if "step" not in _said:
        _said.add("step")
        log.debug("first step: %d rows, %d tokens", rows, tokens)
