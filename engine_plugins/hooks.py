"""The hook through which adapters are found, and what an engine's entry point does with one."""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING

import pluggy

from taut.adapters.engine import Selection
from taut.common_kernels.provider import GROUP
from taut.engine_plugins import logs
from taut.engine_plugins.settings import settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from taut.adapters.engine import EngineAdapter

log = logging.getLogger("taut.plugin")

NOTHING_REGISTERED = "TAUT_ATTENTION=off: nothing is registered, %s chooses as it would without this package"
hookspec = pluggy.HookspecMarker(GROUP)


class HookSpecs:
    """The hook that a third party may implement to speak to one more engine."""

    @hookspec
    def taut_engines(self) -> Sequence[EngineAdapter]:
        """The engines that this plugin can speak to, as data. Import nothing of an engine here.

        Mark an implementation `hookimpl(optionalhook=True)`: kernels are looked for before this hook is known.
        """
        raise AssertionError("a specification is never called")


@cache
def engines() -> dict[str, EngineAdapter]:
    """The adapters of this process by the engine's name."""
    from taut.adapters import sglang, vllm
    from taut.common_kernels.providers import registry

    plugins = registry().plugins  # those of the entry points are loaded there, once for both kinds of hooks
    plugins.add_hookspecs(HookSpecs)
    plugins.register(sglang)
    plugins.register(vllm)  # the last to be registered is the first to be called
    return {adapter.name: adapter for group in plugins.hook.taut_engines() for adapter in group}


def load_into(engine: str) -> None:
    """What an engine's entry point does: read the settings, set up the log, and let the adapter register itself.

    Args:
        engine: the engine that is loading us.

    Raises:
        SettingsError: a `TAUT_*` variable is wrong.
        ProviderError: `TAUT_KERNELS` names no provider.
    """
    from taut.common_kernels.providers import registry

    chosen = settings()
    logs.configure(chosen.log)
    if chosen.attention == "off":
        log.info(NOTHING_REGISTERED, engine)
        return
    registry().check_name(chosen.kernels)
    engines()[engine].register(Selection(chosen.attention, chosen.kernels, chosen.table))
