"""What dense and MLA attention share: vLLM's names for us, validation, the choice of kernels, and the lines we say."""

from __future__ import annotations

import logging
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from vllm.v1.attention.backend import AttentionBackend, MultipleOf

import taut
from taut.adapters.engine import serving_line
from taut.adapters.vllm import bridge, members
from taut.adapters.vllm.selection import leave_to_engine, model_refusals, remember, selection
from taut.common_kernels.providers import ProviderError, registry

if TYPE_CHECKING:
    from collections.abc import Sequence

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


def model_dtype() -> torch.dtype:
    """The dtype of the model that is being built; torch's default, which vLLM sets to it, where none is told."""
    told = getattr(getattr(bridge.current_config(), "model_config", None), "dtype", None)
    return told if isinstance(told, torch.dtype) else torch.get_default_dtype()


def table_path() -> str | None:
    """The tile table that the user named, if any."""
    return None if selection().table is None else str(selection().table)


def serving_kernels(kind: str, problem: Problem) -> Kernels:
    """The kernels that serve a layer, chosen before the engine serves; said once a process.

    Called for every layer of ours, with its model's configuration at hand: what vLLM compiles of that model is kept
    apart from what it compiles around another backend.

    Raises:
        ProviderError: nobody can serve it, or TAUT_KERNELS asks for somebody who cannot.
    """
    provider = registry().choose(problem, selection().kernels).provider
    bridge.mark_compiled_code(taut.__version__)
    _announce(kind, provider.name)
    return provider.kernels


class MemberBackend(AttentionBackend):
    """What our backends have in common. A subclass per overridden member gives the name that vLLM expects of it."""

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    # "dense" or "MLA": an argument of messages, and part of the name under which vLLM finds a class again.
    kind: ClassVar[str]
    member: ClassVar[str] = "CUSTOM"

    @classmethod
    def get_name(cls) -> str:  # vLLM declares it static and calls it on the class
        """The member that this class stands for."""
        return cls.member

    @classmethod
    def full_cls_name(cls) -> tuple[str, str]:
        """Module and name under which vLLM finds this class again; see `members`.

        vLLM derives classes of ours for cross attention, encoders and chunks. They keep names of their own, for by
        these names it tells layers apart that need builders of their own.
        """
        if "member" not in vars(cls):
            return cls.__module__, cls.__qualname__
        return members.__name__, members.decided_name(cls.kind, cls.member)

    @staticmethod
    def get_supported_kernel_block_sizes(*_: Any) -> list[int | MultipleOf]:
        """Any page size."""
        return [MultipleOf(1)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """What vLLM's own class answers, for a member: a vision tower asks, and then runs vLLM's own kernels.

        Of ours, the kernels' providers say which sizes they have.
        """
        return bool(cls.answers_for_us() or cls.overridden().supports_head_size(head_size))

    @classmethod
    def supports_dtype(cls, dtype: torch.dtype) -> bool:
        """See `supports_head_size`."""
        return dtype in cls.supported_dtypes if cls.answers_for_us() else bool(cls.overridden().supports_dtype(dtype))

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        """See `supports_head_size`."""
        return bool(cls.answers_for_us() or cls.overridden().supports_compute_capability(capability))

    @classmethod
    def answers_for_us(cls) -> bool:
        """Whether this class stands for no member of vLLM's own."""
        return cls.member == "CUSTOM"

    @classmethod
    def overridden(cls) -> type[Any]:
        """vLLM's own class of the member that this one stands for."""
        return bridge.stock_class(cls.member)

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: Any) -> bool:
        """The model's dtype, float16, bfloat16 and float8 e4m3."""
        return cache_dtype_refusal(kv_cache_dtype) is None

    @classmethod
    @abstractmethod
    def problems_asked(cls, asked: dict[str, Any]) -> Sequence[Problem]:
        """What our kernels would have to do for the layer that vLLM asks about."""

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """No: the most queries of a row, as the host knows it, decides what is launched."""
        return False

    @classmethod
    def validate_configuration(cls, **asked: Any) -> list[str]:
        """vLLM's own checks and our kernels', as sentences; with `auto` a refused layer is left to vLLM instead."""
        ours = cls if cls.answers_for_us() else class_for(_base_of(cls), "CUSTOM")
        reasons, chosen = ours._refusals(asked), cls
        if reasons and ours is not cls and selection().mode == "auto":
            leave_to_engine(cls.member, reasons)
            chosen = bridge.stock_class(cls.member)
            reasons = list(chosen.validate_configuration(**asked))
        remember(cls.member, chosen)
        return reasons

    @classmethod
    def _refusals(cls, asked: dict[str, Any]) -> list[str]:
        """Why we cannot serve a layer; asked of the class that answers for ourselves."""
        reasons = list(super().validate_configuration(**asked))
        return reasons + model_refusals(bridge.current_config(), asked, kind=cls.kind) + cls._kernel_refusals(asked)

    @classmethod
    def _kernel_refusals(cls, asked: dict[str, Any]) -> list[str]:
        if asked.get("use_mla", False) != cls.is_mla() or cache_dtype_refusal(asked.get("kv_cache_dtype")):
            return []  # already refused above
        return [reason for problem in cls.problems_asked(asked) for reason in _provider_refusals(problem)]


def _provider_refusals(problem: Problem) -> list[str]:
    """Why no provider serves a problem; empty when one does."""
    try:
        registry().choose(problem, selection().kernels)
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


def _base_of(cls: type[MemberBackend]) -> type[MemberBackend]:
    """What `class_for` made a class of."""
    return next(base for base in cls.__mro__ if "member" not in vars(base))


_said: set[str] = set()


def _announce(kind: str, provider: str) -> None:
    """The line by which a process of vLLM says, once, that it serves through us."""
    line = serving_line(kind, "vLLM", bridge.engine_version(), provider, selection().table)
    if line not in _said:
        _said.add(line)
        log.info(line)


def say_first_step(rows: int, tokens: int) -> None:
    """At level debug, once a process: proof that a step ran through this code."""
    if "step" not in _said:
        _said.add("step")
        log.debug("first step: %d rows, %d tokens", rows, tokens)
