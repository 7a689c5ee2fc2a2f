"""What an SGLang release that stands first on PYTHONPATH has of what the adapter touches, as JSON: its own process."""

from __future__ import annotations

import inspect
import json
import sys
from importlib import import_module
from types import SimpleNamespace

from taut.adapters.engine import Selection
from taut.adapters.sglang import bridge, registration, selection


def made_with(name: str, scheduler: type) -> str:
    """What stops a scheduler that is made with a backend of this name; empty where nothing does."""
    try:
        scheduler(SimpleNamespace(attention_backend=name))
    except ValueError as error:
        return str(error)
    return ""


def drafted(kind: str) -> str:
    """What serves a draft model whose backend is ours, in its steps ("decode") or when it takes in ("prefill")."""
    module = import_module(bridge.DRAFTS)
    module.attention_backends = lambda: ("triton", "triton")  # of the target
    factory = object.__new__(module.DraftBackendFactory)
    factory.draft_model_runner, factory.speculative_num_steps, factory.draft_attn_backend = None, 3, bridge.NAME
    backends = {"triton": getattr(factory, f"_create_triton_{kind}_backend")}
    made = factory._create_backend("decode_attention_backend", backends, "{backend_type}")
    return str(made.serves)


def main() -> None:
    scheduler = import_module(bridge.SCHEDULER).Scheduler  # what a process that computes has imported, and no more
    assert bridge.MODEL_RUNNER not in sys.modules
    made: list[str] = []
    scheduler.__init__ = lambda _self, server_args: made.append(server_args.attention_backend)
    registration.build = lambda _runner: SimpleNamespace(serves="what was accepted")
    registration.build_drafts = lambda _runner, steps: SimpleNamespace(serves=f"{steps} steps")
    registration.register(Selection("on"))
    bridge.register_mla(lambda _layer, _batch: None)
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.plugins.hook_registry import HookRegistry

    from taut.adapters.sglang.backend import TautBackend

    HookRegistry.apply_hooks()
    refused = made_with("triton", scheduler), made_with(bridge.NAME, scheduler)
    selection._state.built = True
    refused += (made_with(bridge.NAME, scheduler),)
    lists = import_module(bridge.SERVER_ARGS), import_module(bridge.MODEL_RUNNER)
    ours = vars(TautBackend)
    base = [member for owner in TautBackend.__mro__[1:] for member in vars(owner).values()]
    json.dump(
        {
            "verdicts": {touch.what: touch.verdict() for touch in bridge.LEDGER},
            "registered": ATTENTION_BACKENDS.get(bridge.NAME) is registration.build,
            "hooked": sorted(HookRegistry._patched),
            "made": made,
            "refused": refused,
            "drafts": [drafted(kind) for kind in ("decode", "prefill")],
            "chunked prefixes": [bridge.NAME in getattr(module, bridge.CHUNKED_PREFIXES, ()) for module in lists],
            "abstract": sorted(TautBackend.__abstractmethods__),
            "absent": [  # hooks of a graph that this release calls and we lack
                member.__name__
                for member in base
                if inspect.isfunction(member)
                and "cuda_graph" in member.__name__
                and member.__name__ not in ours
                and "raise NotImplementedError" in inspect.getsource(member)
            ],
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
