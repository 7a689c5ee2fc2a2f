"""Composes: which class answers for which name. vLLM asks for `members.FLASH_ATTN`; the names are told in `selection`.

The classes of a kind are imported when one of them is first wanted, so that vLLM's own cost nobody an import of ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from taut.adapters.vllm import bridge, selection

if TYPE_CHECKING:
    from taut.adapters.vllm.backend import MemberBackend


def backend_for(kind: str, member: str) -> type[MemberBackend]:
    """Our class of a kind, "dense" or "MLA", that stands for a member; always the same one."""
    from taut.adapters.vllm.backend import class_for

    if kind == "MLA":
        from taut.adapters.vllm.mla.backend import TautMLABackend

        return class_for(TautMLABackend, member)
    from taut.adapters.vllm.dense.backend import TautBackend

    return class_for(TautBackend, member)


def __getattr__(name: str) -> type[Any]:
    if name.startswith(selection.DECIDED):
        kind, _, member = name.removeprefix(selection.DECIDED).partition("_")
        return selection.end_of_walk(member) or backend_for(kind, member)
    if name in ("CUSTOM", *selection.DENSE_MEMBERS, *selection.MLA_MEMBERS, *selection.PACKED_MEMBERS):
        return selection.end_of_walk(name) or _answer(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _answer(member: str) -> type[Any]:
    """The class that vLLM gets for a member, at this moment."""
    kind = selection.judge(member)
    return bridge.stock_class(member) if kind is None else backend_for(kind, member)
