"""Stands in for torchvision where only its import is needed: its usual build does not load beside a CPU torch.

SGLang and transformers import it without asking; a text model calls nothing of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable

__version__ = "0.0.0"


def lacking(module: str) -> Callable[[str], Any]:
    """A module's `__getattr__`: every public name is a function that says it is not here."""

    def attribute(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*_: Any, **__: Any) -> NoReturn:
            raise NotImplementedError(f"{module}.{name} is not here: a stand-in was imported")

        return absent

    return attribute
