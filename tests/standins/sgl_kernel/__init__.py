"""Stands in for sgl_kernel where only its import is needed: it has no build for CPUs on PyPI.

SGLang on a CPU imports functions whose names end in `_cpu` and calls none of them for plain text; its attention kit
imports one more. Those that it calls for drafts are in `drafts`. Other names stay missing, since SGLang asks for some
of them to learn what the machine can do.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NoReturn


def __getattr__(name: str) -> Any:
    if name.endswith("_cpu") and hasattr(drafts := import_module("sgl_kernel.drafts"), name):
        return getattr(drafts, name)
    if not name.endswith("_cpu") and name != "merge_state_v2":
        raise AttributeError(f"{__name__} stands in for another package and has no {name}")

    def absent(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} is not here: {__name__} stands in for it")

    return absent
