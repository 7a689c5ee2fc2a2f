"""SGLang: dense and MLA attention, chosen through its registry of backends.

| module | what it holds |
| --- | --- |
| `registration` | what is registered: which class answers for which name |
| `selection` | whether we serve what SGLang was asked for, and what it resolved |
| `service` | how each layer is served: what it asks of our kernels, who answers, or why nobody does |
| `batch`, `builder` | the step: SGLang's batch as data, and made ready for every layer |
| `layer`, `forms` | the layer's call; which form of MLA it takes |
| `warm_up` | the idle steps that run before SGLang serves |
| `backend` | what SGLang asks of a backend, for dense models and for MLA |
| `drafts` | the steps that a draft model runs ahead |
| `bridge` | the ledger: every touch of SGLang's internals, and every difference between its releases |
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
    from taut.adapters.sglang.registration import register

    register(selection)


def _ledger() -> Sequence[Touch]:
    from taut.adapters.sglang.bridge import ledger

    return ledger()


@hookimpl
def taut_engines() -> Sequence[EngineAdapter]:
    """This adapter, as data."""
    from taut.adapters.sglang.bridge import RELEASES

    return [
        EngineAdapter(
            name="sglang",
            title="SGLang",
            module="sglang",
            distributions=("sglang",),
            plugin_group="sglang.srt.plugins",
            plugin_filter="SGLANG_PLUGINS",
            releases=RELEASES,
            flag="--attention-backend taut",
            serves=("dense", "MLA"),
            register=_register,
            ledger=_ledger,
        )
    ]
