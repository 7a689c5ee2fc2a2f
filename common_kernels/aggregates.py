"""What belongs together in a kernel travels together: aggregates, as the installed Triton has them.

An aggregate holds data. What reads it is a free function that takes it, in Triton and in Gluon alike: Triton's
interpreter drops an aggregate's methods.

    @aggregates_of(tl, triton)
    class Mask:
        left: tl.tensor
        CAUSAL: tl.constexpr

    mask = Mask(left, CAUSAL)  # in a kernel

Fields are given in the order of the class, or by name. Triton before 3.8 does not count an aggregate's fields into the
key of its cache: whoever changes their order alone clears that cache.
"""

from __future__ import annotations

import typing
from inspect import Parameter, Signature
from typing import TYPE_CHECKING, Any

from triton.language import core
from typing_extensions import dataclass_transform  # which torch brings; typing's own from Python 3.11 on

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass_transform()
def aggregates_of(language: Any, home: Any) -> Callable[[type], Any]:
    """The decorator that makes a class an aggregate of a language.

    A field is annotated with a type of the language, `tl.constexpr` among them; with `TYPE | None` where a kernel's
    argument may be None; with `Any` where it may be of several types.

    A constexpr field takes a Python number. A tensor field takes one too, and the constexpr that Triton makes of an
    argument that is 1.

    Args:
        language: `triton.language`, or Gluon's.
        home: where `aggregate` is public from Triton 3.8 on: `triton`, or `triton.experimental.gluon`.
    """
    make = getattr(home, "aggregate", None) or core._aggregate

    def decorate(cls: type) -> Any:
        hints = typing.get_type_hints(cls)
        cls.__annotations__ = {name: _kinds(hint, language) for name, hint in hints.items()}
        cls.__init__ = _constructor(language, hints)  # type: ignore[misc]
        return make(cls)

    return decorate


def _kinds(hint: Any, language: Any) -> Any:
    """What a field's value must be an instance of."""
    if hint in (Any, language.constexpr):
        return object
    if hint is language.tensor or type(None) in typing.get_args(hint):
        return hint | core.constexpr | bool | int | float
    return hint


def _constructor(language: Any, hints: dict[str, Any]) -> Callable[..., None]:
    signature = Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in hints])

    def construct(self: Any, *values: Any, _semantic: Any = None, **named: Any) -> None:
        for name, value in signature.bind(*values, **named).arguments.items():
            number = value.value if isinstance(value, core.constexpr) else value
            if hints[name] is language.constexpr and isinstance(number, language.tensor):
                raise TypeError(f"the field {name} is a constexpr, and is given a tensor")
            setattr(self, name, number if _semantic is None else _compiled(number, hints[name], language, _semantic))

    construct.__triton_builtin__ = True  # type: ignore[attr-defined]
    return construct


def _compiled(value: Any, hint: Any, language: Any, semantic: Any) -> Any:
    """A field's value as a compiler has it; elsewhere numbers and None are Python's."""
    if hint is language.constexpr or value is None:
        return language.constexpr(value)
    return semantic.to_tensor(value) if isinstance(value, (bool, int, float)) else value
