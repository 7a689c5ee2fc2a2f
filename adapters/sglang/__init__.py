"""SGLang: the settings are read and the log line is in place; the attention backend itself is still to come."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pluggy

from taut.adapters.engine import EngineAdapter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from taut.adapters.engine import Selection

hookimpl = pluggy.HookimplMarker("taut")


def _register(selection: Selection) -> None:
    """Say that SGLang keeps its own attention; with `on`, refuse to let it serve under a wrong belief."""
    line = "this release of taut does not yet serve SGLang, which keeps its own attention backend"
    if selection.mode == "on":
        raise ValueError(f"TAUT_ATTENTION=on: {line}. Set TAUT_ATTENTION=auto or unset it")
    logging.getLogger("taut.sglang").info(line)


@hookimpl
def taut_engines() -> Sequence[EngineAdapter]:
    """This adapter, as data."""
    return [
        EngineAdapter(
            name="sglang",
            module="sglang",
            distributions=("sglang",),
            plugin_group="sglang.srt.plugins",
            plugin_filter="SGLANG_PLUGINS",
            releases=("0.5.11", "0.5.23"),
            flag="--attention-backend taut",
            serves=(),
            register=_register,
        )
    ]
