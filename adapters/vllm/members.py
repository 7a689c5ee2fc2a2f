"""The names under which vLLM finds our classes: `members.FLASH_ATTN` answers when vLLM asks for FLASH_ATTN.

* `NAME`: what `selection.answer` says at this moment.
* `decided_KIND_NAME`: what came of the last validation: ours, or the stock class if `auto` left the layer to vLLM.
  vLLM resolves the name of the class that it has just validated, and this is the name our classes give.
"""

from __future__ import annotations

from typing import Any

_DECIDED = "decided_"


def decided_name(kind: str, member: str) -> str:
    """The name by which vLLM is told to find what came of the validation of a member: "decided_dense_FLASH_ATTN"."""
    return f"{_DECIDED}{kind}_{member}"


def __getattr__(name: str) -> type[Any]:
    from taut.adapters.vllm import selection

    if name.startswith(_DECIDED):
        kind, _, member = name.removeprefix(_DECIDED).partition("_")
        return selection.decided(kind, member)
    if name in ("CUSTOM", *selection.DENSE_MEMBERS, *selection.MLA_MEMBERS, *selection.PACKED_MEMBERS):
        return selection.answer(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
