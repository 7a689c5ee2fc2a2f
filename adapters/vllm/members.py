"""The names under which vLLM finds our classes: `members.FLASH_ATTN` answers when vLLM asks for FLASH_ATTN.

* `NAME`: what `selection.answer` says at this moment.
* `decided_NAME`: what came of the last validation: ours, or the stock class if `auto` left the layer to vLLM. vLLM
  resolves the name of the class that it has just validated, and this is the name our classes give.
"""

from __future__ import annotations

from typing import Any

DECIDED = "decided_"


def __getattr__(name: str) -> type[Any]:
    from taut.adapters.vllm import dense, selection

    if name.startswith(DECIDED):
        return dense.decided(name.removeprefix(DECIDED))
    if name == "CUSTOM" or name in selection.DENSE_MEMBERS or name in selection.MLA_MEMBERS:
        return selection.answer(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
