"""`gluon.aggregate`: data of a kernel that travels together, checked as Triton checks it."""

from __future__ import annotations

import typing
from typing import Any

from gluon_emulator.values import EmulationError, Tensor, to_tensor


class Aggregate:
    """What every aggregate is: its fields are set once, each with a value of the kind it is annotated with."""

    def __setattr__(self, name: str, value: Any) -> None:
        kinds = type(self).__annotations__
        if name not in kinds:
            raise EmulationError(f"{type(self).__name__} has no field {name}")
        if name in vars(self):
            raise EmulationError(f"{type(self).__name__}.{name} is set already")
        allowed = typing.get_args(kinds[name]) or (kinds[name],)
        if Tensor in allowed and isinstance(value, (bool, int, float)):
            value = to_tensor(value)
        if not isinstance(value, allowed):
            raise EmulationError(f"{type(self).__name__}.{name} is {kinds[name]}, not {type(value).__name__}")
        object.__setattr__(self, name, value)


def aggregate(cls: type) -> Any:
    """A class with annotated fields, and a constructor that sets them, as an aggregate."""
    return type(cls.__name__, (cls, Aggregate), {"__annotations__": cls.__annotations__, "__module__": cls.__module__})


def parts_of(value: Any) -> list[Any]:
    """What a value of a kernel consists of: of an aggregate the parts of its fields, of a tuple those of its values."""
    inside = vars(value).values() if isinstance(value, Aggregate) else value if isinstance(value, tuple) else None
    return [value] if inside is None else [part for one in inside for part in parts_of(one)]
