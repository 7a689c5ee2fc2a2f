"""What vLLM asks of a backend of either kind: its name, whether it can serve a layer, and whose class it is."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, MultipleOf

from taut.adapters.vllm import bridge, selection
from taut.adapters.vllm.serving import provider_of
from taut.common_kernels.providers import ProviderError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from taut.common_kernels.problem import Problem


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
        """Module and name under which vLLM finds this class again; see `selection`.

        vLLM derives classes of ours for cross attention, encoders and chunks. They keep distinct names because vLLM
        groups layers by the name of their class.
        """
        if "member" not in vars(cls):
            return cls.__module__, cls.__qualname__
        return selection.MODULE, selection.decided_name(cls.kind, cls.member)

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
        return not selection.cache_dtype_refusals(kv_cache_dtype)

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
        if reasons and ours is not cls and selection.chosen().mode == "auto":
            selection.leave_to_engine(cls.member, reasons)
            chosen = bridge.stock_class(cls.member)
            reasons = list(chosen.validate_configuration(**asked))
        selection.remember(cls.member, chosen)
        return reasons

    @classmethod
    def _refusals(cls, asked: dict[str, Any]) -> list[str]:
        """Why we cannot serve a layer; asked of the class that answers for ourselves."""
        reasons = list(super().validate_configuration(**asked))
        reasons += selection.model_refusals(bridge.current_config(), asked, kind=cls.kind)
        return reasons + cls._kernel_refusals(asked)

    @classmethod
    def _kernel_refusals(cls, asked: dict[str, Any]) -> list[str]:
        if asked.get("use_mla", False) != cls.is_mla() or not cls.supports_kv_cache_dtype(asked.get("kv_cache_dtype")):
            return []  # already refused above
        return [reason for problem in cls.problems_asked(asked) for reason in _provider_refusals(problem)]


def _provider_refusals(problem: Problem) -> list[str]:
    """Why no provider serves a problem; empty when one does."""
    try:
        provider_of(problem)
    except ProviderError as error:
        return [str(error)]
    return []


_classes: dict[tuple[type[MemberBackend], str], type[MemberBackend]] = {}


def class_for(base: type[MemberBackend], member: str) -> type[MemberBackend]:
    """The subclass of `base` that stands for a member of vLLM's `AttentionBackendEnum`; always the same one."""
    if (base, member) not in _classes:
        name = f"{base.__name__}_{member}"
        _classes[base, member] = type(name, (base,), {"member": member, "__module__": base.__module__})
    return _classes[base, member]


def _base_of(cls: type[MemberBackend]) -> type[MemberBackend]:
    """What `class_for` made a class of."""
    return next(base for base in cls.__mro__ if "member" not in vars(base))
