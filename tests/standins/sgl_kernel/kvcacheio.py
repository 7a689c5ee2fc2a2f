"""Stands in for what SGLang's scheduler imports up to 0.5.12, for a cache on the host that no test of ours asks for."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if not name.startswith("transfer_kv_"):
        raise AttributeError(f"{__name__} stands in for another module and has no {name}")

    def absent(*_: Any, **__: Any) -> None:
        raise NotImplementedError(f"{__name__}.{name} is not here: this module stands in for it")

    return absent
