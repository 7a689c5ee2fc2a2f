"""Tensors and pointers of an emulated kernel, with Triton's rules for dtypes and Gluon's for layouts.

Numbers are held by torch in the dtype that the kernel gives them, so that bf16, fp16 and fp8 round and integers wrap as
they do on the device. Unsigned integers, for which torch has no arithmetic, are held as int64 and cut after each step.
"""

from __future__ import annotations

import math
import operator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import triton.language as tl
from triton.experimental.gluon.language import AutoLayout, CoalescedLayout, SliceLayout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor as Numbers


class EmulationError(AssertionError):
    """What a kernel does is wrong, or the emulator does not know it."""


class Inferred:
    """The layout of a result where the compiler would infer one: it goes with every other."""

    def __repr__(self) -> str:
        return "a layout that the compiler infers"


INFERRED = Inferred()
# By the names of Triton's dtypes, which are faster to look up than the dtypes.
HELD_AS = {
    "int1": torch.bool,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.int64,
    "uint16": torch.int64,
    "uint32": torch.int64,
    "fp8e5": torch.float8_e5m2,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
UNSIGNED = {"uint8": 0xFF, "uint16": 0xFFFF, "uint32": 0xFFFFFFFF}
LARGEST = {"fp8e4nv": 448.0, "fp8e5": 57344.0}
OF_TORCH = {
    torch.bool: tl.int1,
    torch.int8: tl.int8,
    torch.int16: tl.int16,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
    torch.uint8: tl.uint8,
    torch.float8_e5m2: tl.float8e5,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def itemsize(dtype: tl.dtype) -> int:
    """Bytes of one element in memory."""
    return max(1, dtype.primitive_bitwidth // 8)


def to_bits(numbers: Numbers, dtype: tl.dtype) -> Numbers:
    """Numbers as they lie in memory: integers of their own width."""
    width = BITS[itemsize(dtype)]
    if dtype.name in UNSIGNED or dtype == tl.int1:
        return numbers.to(width)
    return numbers.contiguous().view(width)


def from_bits(bits: Numbers, dtype: tl.dtype) -> Numbers:
    """The reverse of `to_bits`."""
    if dtype == tl.int1:
        return bits != 0
    if dtype.name in UNSIGNED:
        return bits.to(torch.int64) & UNSIGNED[dtype.name]
    return bits.contiguous().view(HELD_AS[dtype.name])


def cut(numbers: Numbers, dtype: tl.dtype) -> Numbers:
    """Numbers of a computation as `dtype` holds them."""
    numbers = numbers.to(HELD_AS[dtype.name])
    return numbers & UNSIGNED[dtype.name] if dtype.name in UNSIGNED else numbers


def cast(numbers: Numbers, source: tl.dtype, target: tl.dtype) -> Numbers:
    """As the device converts: toward zero to integers, to nearest among floats, saturating to fp8."""
    if source is target or source == target:
        return numbers
    if target == tl.int1:
        return numbers != 0
    if target.name in LARGEST:
        wide = numbers.to(torch.float32)
        return wide.clamp(-LARGEST[target.name], LARGEST[target.name]).to(HELD_AS[target.name])
    if source.is_floating() and target.is_int():
        wide = numbers.to(torch.float64).nan_to_num(0.0).trunc()
        low, high = (0, UNSIGNED[target.name]) if target.name in UNSIGNED else _range(target)
        return cut(wide.clamp(low, high), target)
    return cut(numbers, target)


def _range(dtype: tl.dtype) -> tuple[int, int]:
    bits = dtype.primitive_bitwidth
    return -(1 << (bits - 1)), min((1 << (bits - 1)) - 1, (1 << 62))


def undefined(shape: Sequence[int], dtype: tl.dtype) -> Numbers:
    """What stands where nothing has been written: NaN, and large integers."""
    if dtype.is_floating():
        return torch.full(tuple(shape), math.nan).to(HELD_AS[dtype.name])
    if dtype == tl.int1:
        return torch.ones(tuple(shape), dtype=torch.bool)
    return cut(torch.full(tuple(shape), 0x7B7B7B7B7B7B7B7B, dtype=torch.int64), dtype)


def dtype_of_number(number: float) -> tl.dtype:
    """Of a Python number that becomes a tensor."""
    if isinstance(number, bool):
        return tl.int1
    if isinstance(number, int):
        if -(2**31) <= number < 2**31:
            return tl.int32
        if 2**31 <= number < 2**32:
            return tl.uint32
        return tl.int64
    return tl.float32


def agree(*layouts: Any) -> Any:
    """The common layout of a computation's operands; None, of scalars, and inferred ones go with any.

    Raises:
        EmulationError: they differ.
    """
    known = [layout for layout in layouts if not isinstance(layout, (Inferred, AutoLayout, type(None)))]
    if not known:
        return next((layout for layout in layouts if layout is not None), None)
    for layout in known[1:]:
        if layout != known[0]:
            raise EmulationError(f"layouts differ:\n  {known[0]}\n  {layout}")
    return known[0]


class GlobalMemory:
    """The storage of one argument, and which of its elements are the argument's own.

    Args:
        tensor: the argument; a view of a wider storage has the elements that it shows.
        name: of the parameter.
    """

    def __init__(self, tensor: Numbers, name: str) -> None:
        self.name = name
        self.tensor = tensor
        self.itemsize = tensor.dtype.itemsize
        self.start = tensor.storage_offset() * self.itemsize
        self.bytes = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        own = torch.zeros(len(self.bytes) // self.itemsize, dtype=torch.bool)
        own.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
        self.own = own

    def places(self, offsets: Numbers, dtype: tl.dtype, live: Numbers | None, doing: str) -> tuple[Numbers, Numbers]:
        """The storage as elements of `dtype`, and the places in it of byte offsets; 0 for those outside.

        Raises:
            EmulationError: a live one is not an element of the argument.
        """
        size = itemsize(dtype)
        elements = offsets // self.itemsize
        near = elements.clamp(0, max(0, len(self.own) - 1))
        inside = (near == elements) & self.own[near] if len(self.own) else torch.zeros_like(near, dtype=torch.bool)
        if size != self.itemsize:
            inside &= offsets % size == 0
        outside = ~inside if live is None else live & ~inside
        if outside.any():
            wrong = int(offsets[outside].flatten()[0]) if offsets.dim() else int(offsets)
            raise EmulationError(
                f"{doing} outside of `{self.name}` {list(self.tensor.shape)}, strides {list(self.tensor.stride())}: "
                f"{int(outside.sum())} of {outside.numel()} elements, the first of them "
                f"{(wrong - self.start) / self.itemsize:g} elements from its beginning"
            )
        places = near if size == self.itemsize else offsets // size
        whole = len(self.bytes) // size * size
        return self.bytes[:whole].view(BITS[size]), torch.where(inside, places, 0)

    def load(self, offsets: Numbers, dtype: tl.dtype, live: Numbers | None = None) -> Numbers:
        """Numbers at byte offsets; undefined where not live."""
        elements, places = self.places(offsets, dtype, live, "a load")
        if not len(elements):
            return undefined(offsets.shape, dtype)
        numbers = from_bits(elements[places], dtype)
        return numbers if live is None else torch.where(live, numbers, undefined((), dtype))

    def store(self, offsets: Numbers, numbers: Numbers, dtype: tl.dtype, live: Numbers | None = None) -> None:
        """Put numbers at byte offsets where live."""
        elements, places = self.places(offsets, dtype, live, "a store")
        bits = to_bits(numbers, dtype).expand(offsets.shape)
        if live is None:
            elements[places] = bits
        elif live.any():
            live = live.expand(offsets.shape)
            elements[places.expand(live.shape)[live]] = bits[live]


class TensorType:
    """What `tensor.type` tells."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape = tensor.shape
        self.layout = tensor.layout
        self.scalar = tensor.dtype
        self.element_ty = tensor.dtype.element_ty if tensor.dtype.is_ptr() else tensor.dtype


class Tensor:
    """A tensor, or a scalar (shape []) of an emulated kernel; of pointers if `memory` is given.

    Args:
        data: the numbers, held as `HELD_AS` says; of pointers the byte offsets into their memory, int64.
        dtype: Triton's.
        layout: None of a scalar.
        memory: what pointers point into.
    """

    __slots__ = ("data", "dtype", "layout", "memory")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, data: Numbers, dtype: tl.dtype, layout: Any = None, memory: GlobalMemory | None = None) -> None:
        self.data = data
        self.dtype = dtype
        self.layout = layout if data.dim() else None
        self.memory = memory

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def type(self) -> TensorType:
        return TensorType(self)

    @property
    def numel(self) -> int:
        return self.data.numel()

    def __repr__(self) -> str:
        return f"<{self.dtype}{self.shape} {self.data.tolist() if self.data.numel() < 9 else ''}>"

    def __getattr__(self, name: str) -> Any:
        raise EmulationError(f"the emulator has no `{name}` of a tensor")

    # Python's own questions, which only a scalar answers.
    def __bool__(self) -> bool:
        if self.data.dim():
            raise EmulationError(f"a condition must be a scalar, this is {self.dtype}{self.shape}; use & and |")
        return bool(self.data)

    def __index__(self) -> int:
        if self.data.dim() or not self.dtype.is_int():
            raise EmulationError(f"a scalar integer is needed, not {self.dtype}{self.shape}")
        return int(self.data)

    # Shapes.
    def __getitem__(self, slices: Any) -> Tensor:
        result, slices = self, slices if isinstance(slices, tuple) else (slices,)
        for axis, one in enumerate(slices):
            if one is None:
                result = result.expand_dims(axis)
            elif one != slice(None):
                raise EmulationError("only None and : index a tensor")
        return result

    def expand_dims(self, axis: int) -> Tensor:
        layout = self.layout
        if not isinstance(layout, (Inferred, AutoLayout, CoalescedLayout)):
            if not isinstance(layout, SliceLayout) or layout.dim != axis:
                raise EmulationError(f"a dimension {axis} needs SliceLayout({axis}, ...), not {layout}")
            layout = layout.parent
        return Tensor(self.data.unsqueeze(axis), self.dtype, layout, self.memory)

    def reshape(self, *shape: Any) -> Tensor:
        return Tensor(self.data.reshape(_shape(shape)), self.dtype, INFERRED, self.memory)

    def permute(self, *order: Any) -> Tensor:
        return Tensor(self.data.permute(_shape(order)), self.dtype, INFERRED, self.memory)

    def broadcast_to(self, shape: Sequence[int]) -> Tensor:
        if self.shape and len(self.shape) != len(shape):
            raise EmulationError(f"ranks differ: {self.shape} and {list(shape)}")
        return Tensor(self.data.expand(tuple(shape)), self.dtype, self.layout or INFERRED, self.memory)

    # Dtypes.
    def to(self, dtype: tl.dtype, bitcast: bool = False) -> Tensor:
        if self.memory is not None:
            if not dtype.is_ptr():
                raise EmulationError("the emulator knows no addresses: a pointer is cast to a pointer only")
            return Tensor(self.data, dtype, self.layout, self.memory)
        if bitcast:
            if self.dtype.primitive_bitwidth != dtype.primitive_bitwidth:
                raise EmulationError(f"a bitcast from {self.dtype} to {dtype} changes the width")
            return Tensor(from_bits(to_bits(self.data, self.dtype), dtype), dtype, self.layout)
        return Tensor(cast(self.data, self.dtype, dtype), dtype, self.layout)

    cast = to

    # Arithmetic.
    def __add__(self, other: Any) -> Tensor:
        return add(self, other)

    def __radd__(self, other: Any) -> Tensor:
        return add(other, self)

    def __sub__(self, other: Any) -> Tensor:
        return add(self, -to_tensor(other)) if self.memory is not None else arithmetic(operator.sub, self, other)

    def __rsub__(self, other: Any) -> Tensor:
        return arithmetic(operator.sub, other, self)

    def __mul__(self, other: Any) -> Tensor:
        return arithmetic(operator.mul, self, other)

    def __rmul__(self, other: Any) -> Tensor:
        return arithmetic(operator.mul, other, self)

    def __truediv__(self, other: Any) -> Tensor:
        return divide(self, other)

    def __rtruediv__(self, other: Any) -> Tensor:
        return divide(other, self)

    def __floordiv__(self, other: Any) -> Tensor:
        return whole_division(_quotient, self, other)

    def __rfloordiv__(self, other: Any) -> Tensor:
        return whole_division(_quotient, other, self)

    def __mod__(self, other: Any) -> Tensor:
        return whole_division(torch.fmod, self, other)

    def __rmod__(self, other: Any) -> Tensor:
        return whole_division(torch.fmod, other, self)

    def __neg__(self) -> Tensor:
        return arithmetic(operator.sub, 0, self) if self.dtype.is_int() else Tensor(-self.data, self.dtype, self.layout)

    def __invert__(self) -> Tensor:
        return Tensor(cut(~self.data, self.dtype), self.dtype, self.layout)

    def __and__(self, other: Any) -> Tensor:
        return integers(operator.and_, self, other)

    def __rand__(self, other: Any) -> Tensor:
        return integers(operator.and_, other, self)

    def __or__(self, other: Any) -> Tensor:
        return integers(operator.or_, self, other)

    def __ror__(self, other: Any) -> Tensor:
        return integers(operator.or_, other, self)

    def __xor__(self, other: Any) -> Tensor:
        return integers(operator.xor, self, other)

    def __rxor__(self, other: Any) -> Tensor:
        return integers(operator.xor, other, self)

    def __lshift__(self, other: Any) -> Tensor:
        return integers(operator.lshift, self, other)

    def __rlshift__(self, other: Any) -> Tensor:
        return integers(operator.lshift, other, self)

    def __rshift__(self, other: Any) -> Tensor:
        return integers(operator.rshift, self, other)

    def __rrshift__(self, other: Any) -> Tensor:
        return integers(operator.rshift, other, self)

    def __lt__(self, other: Any) -> Tensor:
        return compare(operator.lt, self, other)

    def __le__(self, other: Any) -> Tensor:
        return compare(operator.le, self, other)

    def __gt__(self, other: Any) -> Tensor:
        return compare(operator.gt, self, other)

    def __ge__(self, other: Any) -> Tensor:
        return compare(operator.ge, self, other)

    def __eq__(self, other: object) -> Any:
        return compare(operator.eq, self, other)

    def __ne__(self, other: object) -> Any:
        return compare(operator.ne, self, other)


def _shape(given: tuple[Any, ...]) -> tuple[int, ...]:
    if len(given) == 1 and isinstance(given[0], (list, tuple)):
        given = tuple(given[0])
    return tuple(operator.index(size) for size in given)


class Constexpr:
    """`gl.constexpr`: an annotation, and a number written as one."""

    def __new__(cls, value: Any) -> Any:
        return value


def to_tensor(value: Any, dtype: tl.dtype | None = None) -> Tensor:
    """A Python number as a scalar; tensors as they are."""
    if isinstance(value, Tensor):
        return value if dtype is None else value.to(dtype)
    if not isinstance(value, (bool, int, float)):
        raise EmulationError(f"{value!r} of type {type(value).__name__} is no tensor and no number")
    dtype = dtype or dtype_of_number(value)
    return Tensor(_held(value, dtype.name), dtype)


@lru_cache(maxsize=4096, typed=True)
def _held(value: float, name: str) -> Numbers:
    dtype = tl.dtype(name)
    if dtype.is_floating():
        return cast(torch.tensor(float(value), dtype=torch.float64), tl.float64, dtype)
    return cast(torch.tensor(int(value), dtype=torch.int64), tl.int64, dtype)


def common_dtype(a: Any, b: Any, division: bool = False) -> tl.dtype:
    """The dtype that two operands are computed in; Python numbers of no higher kind take the other's."""
    types = [value.dtype if isinstance(value, Tensor) else dtype_of_number(value) for value in (a, b)]
    if isinstance(a, Tensor) != isinstance(b, Tensor):
        number, tensor = (types[1], types[0]) if isinstance(a, Tensor) else types
        if number.kind().value <= tensor.kind().value:
            types = [tensor, tensor]
            value = b if isinstance(a, Tensor) else a
            if tensor.is_int() and tensor != tl.int1:
                low, high = (0, UNSIGNED[tensor.name]) if tensor.name in UNSIGNED else _range(tensor)
                if not low <= value <= high:
                    raise EmulationError(f"{value} does not fit into {tensor}")
    return _promoted(types[0].name, types[1].name, division)


@lru_cache
def _promoted(first: str, second: str, division: bool) -> tl.dtype:
    x, y = types = tl.dtype(first), tl.dtype(second)
    if tl.float64 in types:
        return tl.float64
    if division and (x.is_floating() or y.is_floating()):
        return tl.float32
    for dtype in (tl.float32, tl.float16):
        if dtype in types:
            return dtype
    if tl.bfloat16 in types:
        return tl.bfloat16 if x == y else tl.float32
    if x.is_floating() or y.is_floating():
        return x if x == y else tl.float16
    if division and x.int_signedness != y.int_signedness:
        raise EmulationError(f"{x} and {y} are not divided by one another: their signs differ")
    if x.int_signedness == y.int_signedness:
        return x if x.int_bitwidth > y.int_bitwidth else y
    signed = tl.dtype.SIGNEDNESS.SIGNED
    wide, other = (y, x) if x.int_signedness == signed else (x, y)
    return wide if wide.int_bitwidth >= other.int_bitwidth else other


def operands(a: Any, b: Any, dtype: tl.dtype) -> tuple[Numbers, Numbers, Any]:
    """The numbers of two operands in one dtype, and their layout."""
    x, y = to_tensor(a), to_tensor(b)
    if x.memory is not None or y.memory is not None:
        raise EmulationError("a pointer cannot be computed with like a number")
    first, second = cast(x.data, x.dtype, dtype), cast(y.data, y.dtype, dtype)
    if not (first.dim() and second.dim()):
        return first, second, x.layout or y.layout
    if first.dim() != second.dim():
        raise EmulationError(f"ranks differ: {x.shape} and {y.shape}")
    for one, other in zip(first.shape, second.shape, strict=True):
        if one != other and 1 not in (one, other):
            raise EmulationError(f"shapes differ: {x.shape} and {y.shape}")
    return first, second, agree(x.layout, y.layout)


def arithmetic(operation: Callable[..., Numbers], a: Any, b: Any) -> Tensor:
    """A sum, difference, product or the like."""
    dtype = common_dtype(a, b)
    if dtype.name in LARGEST:
        raise EmulationError(f"there is no arithmetic on {dtype}")
    x, y, layout = operands(a, b, dtype)
    return Tensor(cut(operation(x, y), dtype), dtype, layout)


def add(a: Any, b: Any) -> Tensor:
    """A sum; of a pointer and integers the pointers behind."""
    for pointer, offset in ((a, b), (b, a)):
        if isinstance(pointer, Tensor) and pointer.memory is not None:
            offset = to_tensor(offset)
            if not offset.dtype.is_int() or offset.memory is not None:
                raise EmulationError(f"{offset.dtype} is added to a pointer")
            if pointer.shape and offset.shape and len(pointer.shape) != len(offset.shape):
                raise EmulationError(f"ranks differ: {pointer.shape} and {offset.shape}")
            moved = pointer.data + offset.data.to(torch.int64) * itemsize(pointer.dtype.element_ty)
            return Tensor(moved, pointer.dtype, agree(pointer.layout, offset.layout), pointer.memory)
    return arithmetic(operator.add, a, b)


def divide(a: Any, b: Any) -> Tensor:
    """A division of floats; integers become float32."""
    dtype = common_dtype(a, b, division=True)
    dtype = tl.float32 if dtype.is_int() else dtype
    x, y, layout = operands(a, b, dtype)
    return Tensor(x / y, dtype, layout)


def _quotient(x: Numbers, y: Numbers) -> Numbers:
    return torch.div(x, y, rounding_mode="trunc")


def whole_division(operation: Callable[..., Numbers], a: Any, b: Any) -> Tensor:
    """Quotient or remainder as in C: toward zero, of integers; a divisor of zero gives anything."""
    dtype = common_dtype(a, b, division=True)
    if dtype.is_floating() and operation is _quotient:
        raise EmulationError("// is for integers")
    x, y, layout = operands(a, b, dtype)
    if dtype.is_int():
        zero = y == 0
        result = torch.where(zero, undefined((), dtype), operation(x, torch.where(zero, 1, y)))
        return Tensor(cut(result, dtype), dtype, layout)
    return Tensor(operation(x, y), dtype, layout)


def integers(operation: Callable[..., Numbers], a: Any, b: Any) -> Tensor:
    """Bits and shifts."""
    dtype = common_dtype(a, b)
    if not dtype.is_int():
        raise EmulationError(f"bits of {dtype}")
    x, y, layout = operands(a, b, dtype)
    return Tensor(cut(operation(x, y), dtype), dtype, layout)


def compare(operation: Callable[..., Numbers], a: Any, b: Any) -> Any:
    """A comparison; with something that is no number (None, a dtype) Python's own."""
    if not all(isinstance(value, (Tensor, bool, int, float)) for value in (a, b)):
        return operation is operator.ne
    x, y, layout = operands(a, b, common_dtype(a, b))
    return Tensor(operation(x, y), tl.int1, layout)
