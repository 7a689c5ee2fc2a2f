"""Stands in for what SGLang's attention kit imports up to 0.5.17, for a backend that no test of ours asks for."""

from __future__ import annotations

from typing import Any, NoReturn


def absent(*_: Any, **__: Any) -> NoReturn:
    raise NotImplementedError(f"{__name__} stands in for another module")


convert_vertical_slash_indexes = convert_vertical_slash_indexes_mergehead = sparse_attn_func = absent
