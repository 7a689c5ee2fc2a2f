"""What is registered with SGLang: which class of ours answers for which name.

| TAUT_ATTENTION | registered | what happens |
| --- | --- | --- |
| unset | the name `taut` | ours where `--attention-backend taut` asks for it |
| auto | the same | ours unless another backend was asked for or the model cannot be served: one line says why |
| on | the same | ours, or an error with every reason before a request is served |
| off | nothing | - |

Our classes are imported when SGLang builds a backend: they derive from SGLang's own.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from taut.adapters.sglang import bridge, selection

if TYPE_CHECKING:
    from collections.abc import Callable

    from taut.adapters.engine import Selection


def register(chosen: Selection) -> None:
    """Register our backend with SGLang as the table above says. Idempotent; called in each of SGLang's processes.

    Raises:
        BridgeError: TAUT_ATTENTION=on, and this release of SGLang lacks something that we need.
    """
    selection.tell(chosen)
    try:
        bridge.check()
    except bridge.BridgeError as error:
        if chosen.mode == "on":
            raise
        selection.say(f"SGLang keeps its own attention: {error}", logging.WARNING)
        return
    bridge.register(build)
    bridge.register_drafts(build_drafts, build)
    if chosen.mode is not None:
        bridge.before_resolution(selection.choose)
    if chosen.mode == "on":
        bridge.after_the_scheduler_is_made(selection.verify)


def build(model_runner: Any) -> Any:
    """The backend of a model: ours; with `auto`, SGLang's own where a layer turns out to be none that we can serve.

    Raises:
        ValueError: a layer cannot be served; the message holds every reason.
    """
    from taut.adapters.sglang.backend import TautBackend

    stock = "torch_native" if str(model_runner.device).startswith("cpu") else "triton"
    backend = _built(lambda: TautBackend(model_runner), stock)
    if backend is None:
        return bridge.stock_backend(stock, model_runner)
    selection.remember_built()
    return backend


def build_drafts(model_runner: Any, steps: int) -> Any:
    """The backends of the steps that a draft model runs ahead; None where SGLang's own are to serve, as in `build`.

    Raises:
        ValueError: a layer cannot be served; the message holds every reason.
    """
    from taut.adapters.sglang.drafts import TautDraftBackend

    return _built(lambda: TautDraftBackend(model_runner, steps), "triton")


def _built(make: Callable[[], Any], stock: str) -> Any:
    """What `make` makes; with `auto` None where it cannot, and one line that says why."""
    try:
        return make()
    except ValueError as error:
        if selection.chosen().mode != "auto":
            raise
        selection.say(f"TAUT_ATTENTION=auto: SGLang's {stock} serves in our place: {error}", logging.WARNING)
        return None
