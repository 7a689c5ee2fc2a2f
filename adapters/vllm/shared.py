"""What dense and MLA attention share: vLLM's names for us, validation, the choice of kernels, and the lines we say."""

from __future__ import annotations

import logging
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from vllm.v1.attention.backend import AttentionBackend, MultipleOf

import taut
from taut.adapters.vllm import bridge, members
from taut.adapters.vllm.selection import leave_to_engine, selection
from taut.common_kernels.providers import ProviderError, registry

if TYPE_CHECKING:
    from taut.common_kernels.kernels import Kernels
    from taut.common_kernels.problem import Problem

log = logging.getLogger("taut.vllm")

CACHE_DTYPES = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "float16": "float16", "bfloat16": "bfloat16"}


def cache_dtype_refusal(kv_cache_dtype: str | None) -> str | None:
    """Why a `--kv-cache-dtype` cannot be served; None when it can."""
    if kv_cache_dtype in (None, "auto", *CACHE_DTYPES):
        return None
    return f"a KV cache of {kv_cache_dtype} is not supported, only auto, {', '.join(CACHE_DTYPES)}"


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


def table_path() -> str | None:
    """The tile table that the user named, if any."""
    return None if selection().table is None else str(selection().table)


def serving_kernels(kind: str, problem: Problem) -> Kernels:
    """The kernels that serve a layer, chosen before the engine serves; said once a process.

    Raises:
        ProviderError: nobody can serve it, or TAUT_KERNELS asks for somebody who cannot.
    """
    provider = registry().choose(problem, selection().kernels).provider
    _announce(kind, provider.name)
    return provider.kernels


class MemberBackend(AttentionBackend):
    """What our backends have in common. A subclass per overridden member gives the name that vLLM expects of it."""

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    # "dense" or "MLA": an argument of messages, and part of the name under which vLLM finds a class again.
    kind: ClassVar[str]
    member: ClassVar[str] = "CUSTOM"
    # Whether `auto` left the last layer that was validated to vLLM.
    left_to_engine: ClassVar[bool] = False

    @classmethod
    def get_name(cls) -> str:  # vLLM declares it static and calls it on the class
        """The member that this class stands for."""
        return cls.member

    @classmethod
    def full_cls_name(cls) -> tuple[str, str]:
        """Module and name under which vLLM finds this class again; see `members`."""
        return members.__name__, members.decided_name(cls.kind, cls.member)

    @staticmethod
    def get_supported_kernel_block_sizes(*_: Any) -> list[int | MultipleOf]:
        """Any page size."""
        return [MultipleOf(1)]

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: Any) -> bool:
        """The model's dtype, float16, bfloat16 and float8 e4m3."""
        return cache_dtype_refusal(kv_cache_dtype) is None

    @classmethod
    @abstractmethod
    def problem_asked(cls, asked: dict[str, Any]) -> Problem:
        """What our kernels would have to do for the layer that vLLM asks about."""

    @classmethod
    def validate_configuration(cls, **asked: Any) -> list[str]:
        """vLLM's own checks and our kernels', as sentences; with `auto` a refused layer is left to vLLM instead."""
        reasons = list(super().validate_configuration(**asked)) + cls._kernel_refusals(asked)
        cls.left_to_engine = bool(reasons) and cls.member != "CUSTOM" and selection().mode == "auto"
        if cls.left_to_engine:
            leave_to_engine(cls.member, reasons)
            return list(bridge.stock_class(cls.member).validate_configuration(**asked))
        return reasons

    @classmethod
    def _kernel_refusals(cls, asked: dict[str, Any]) -> list[str]:
        if asked.get("use_mla", False) != cls.is_mla() or cache_dtype_refusal(asked.get("kv_cache_dtype")):
            return []  # already refused above
        try:
            registry().choose(cls.problem_asked(asked), selection().kernels)
        except ProviderError as error:
            return [str(error)]
        return []


_Backend = TypeVar("_Backend", bound=MemberBackend)
_classes: dict[tuple[type[MemberBackend], str], type[MemberBackend]] = {}


def class_for(base: type[_Backend], member: str) -> type[_Backend]:
    """The subclass of `base` that stands for a member of vLLM's `AttentionBackendEnum`; always the same one."""
    if (base, member) not in _classes:
        name = f"{base.__name__}_{member}"
        _classes[base, member] = type(name, (base,), {"member": member, "__module__": base.__module__})
    return _classes[base, member]


_said: set[str] = set()


def _announce(kind: str, provider: str) -> None:
    """The line by which a process of vLLM says, once, that it serves through us."""
    table = selection().table or "packaged"
    tiles = "none" if provider == "reference" else table
    line = (
        f"taut {taut.__version__} serves {kind} attention in vLLM {bridge.engine_version()}: "
        f"kernels {provider}, tile table {tiles}"
    )
    if line not in _said:
        _said.add(line)
        log.info(line)


def say_first_step(rows: int, tokens: int) -> None:
    """At level debug, once a process: proof that a step ran through this code."""
    if "step" not in _said:
        _said.add("step")
        log.debug("first step: %d rows, %d tokens", rows, tokens)
