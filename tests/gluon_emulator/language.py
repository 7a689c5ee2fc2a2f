"""`gl.*`: what is neither a tensor's own method nor shared memory."""

from __future__ import annotations

import builtins
import functools
from typing import TYPE_CHECKING, Any

import torch
import triton.language as tl
from triton.experimental.gluon.language import (
    AutoLayout,
    BlockedLayout,
    DotOperandLayout,
    NVMMADistributedLayout,
    SliceLayout,
)

from gluon_emulator.aggregates import parts_of
from gluon_emulator.machine import program
from gluon_emulator.values import (
    INFERRED,
    EmulationError,
    Inferred,
    Tensor,
    agree,
    arithmetic,
    cast,
    common_dtype,
    cut,
    itemsize,
    operands,
    to_tensor,
    undefined,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor as Numbers

ROUNDED = {tl.float16, tl.bfloat16, tl.float32, tl.float64}


def check_warps(layout: Any) -> None:
    """A layout that names warps names those of the partition."""
    while isinstance(layout, (SliceLayout, DotOperandLayout)):
        layout = layout.parent
    if isinstance(layout, (BlockedLayout, NVMMADistributedLayout)):
        warps = functools.reduce(lambda x, y: x * y, layout.warps_per_cta)
        if warps != program().partition.num_warps:
            raise EmulationError(f"the partition has {program().partition.num_warps} warps, the layout {layout}")


def placed(numbers: Numbers, dtype: tl.dtype, layout: Any) -> Tensor:
    """A new tensor with a layout of the kernel's choice."""
    layout = AutoLayout() if layout is None else layout
    check_warps(layout)
    if not isinstance(layout, (AutoLayout, Inferred)) and numbers.dim() and layout.rank != numbers.dim():
        raise EmulationError(f"a tensor {list(numbers.shape)} with the layout {layout}")
    return Tensor(numbers, dtype, layout)


def arange(start: int, end: int, layout: Any = None) -> Tensor:
    size = end - start
    if size <= 0 or size & (size - 1):
        raise EmulationError(f"arange({start}, {end}): the size is a power of two")
    return placed(torch.arange(start, end, dtype=torch.int32), tl.int32, layout)


def full(shape: Sequence[int], value: Any, dtype: tl.dtype, layout: Any = None) -> Tensor:
    shape = [int(size) for size in shape]
    if any(size <= 0 or size & (size - 1) for size in shape):
        raise EmulationError(f"a tensor {shape}: sizes are powers of two")
    number = to_tensor(value).to(dtype) if isinstance(value, Tensor) else to_tensor(value, dtype)
    return placed(number.data.expand(shape).clone(), dtype, layout)


def zeros(shape: Sequence[int], dtype: tl.dtype, layout: Any = None) -> Tensor:
    return full(shape, 0, dtype, layout)


def zeros_like(input: Tensor, shape: Any = None, dtype: Any = None, layout: Any = None) -> Tensor:  # noqa: A002
    return zeros(shape or input.shape, dtype or input.dtype, layout or input.layout)


def convert_layout(value: Tensor, layout: Any, assert_trivial: bool = False) -> Tensor:
    if not isinstance(value, Tensor) or not value.shape:
        raise EmulationError(f"convert_layout of {value!r}")
    check_warps(layout)
    return Tensor(value.data, value.dtype, layout, value.memory)


def load(
    pointer: Tensor, mask: Any = None, other: Any = None, *, cache_modifier: Any = "", eviction_policy: Any = "",
    volatile: bool = False, cache_policy: Any = None,
) -> Tensor:  # fmt: skip
    """Numbers at pointers; without `other`, what is masked is undefined."""
    program().check_waited("a load")
    dtype = _pointed_at(pointer)
    shape, layout, live = _with_mask(pointer, mask)
    offsets = pointer.data.expand(shape)
    assert pointer.memory is not None
    numbers = pointer.memory.load(offsets, dtype, live)
    if live is not None and other is not None:
        filler = to_tensor(other)
        agree(layout, filler.layout)
        numbers = torch.where(live, numbers, cast(filler.data, filler.dtype, dtype))
    return Tensor(numbers, dtype, layout)


def store(
    pointer: Tensor, value: Any, mask: Any = None, *, cache_modifier: Any = "", eviction_policy: Any = "",
    cache_policy: Any = None,
) -> None:  # fmt: skip
    """Put numbers at pointers."""
    program().check_waited("a store")
    dtype = _pointed_at(pointer)
    shape, layout, live = _with_mask(pointer, mask)
    value = to_tensor(value)
    agree(layout, value.layout)
    if value.shape and list(torch.broadcast_shapes(value.shape, shape)) != list(shape):
        raise EmulationError(f"{value.shape} is stored at {list(shape)} pointers")
    assert pointer.memory is not None
    pointer.memory.store(pointer.data.expand(shape), cast(value.data, value.dtype, dtype), dtype, live)


def _pointed_at(pointer: Any) -> tl.dtype:
    if not isinstance(pointer, Tensor) or pointer.memory is None:
        raise EmulationError(f"{pointer!r} is no pointer")
    return pointer.dtype.element_ty


def _with_mask(pointer: Tensor, mask: Any) -> tuple[tuple[int, ...], Any, Numbers | None]:
    if mask is None:
        return tuple(pointer.shape), pointer.layout, None
    mask = to_tensor(mask)
    if mask.dtype != tl.int1:
        raise EmulationError(f"a mask is int1, not {mask.dtype}")
    if mask.shape and not pointer.shape:
        raise EmulationError("one pointer with a mask of many")
    shape = tuple(torch.broadcast_shapes(pointer.shape, mask.shape))
    return shape, agree(pointer.layout, mask.layout), mask.data.expand(shape)


def atomic_add(pointer: Tensor, val: Any, mask: Any = None, sem: Any = None, scope: Any = None) -> Tensor:
    """Add to the numbers at pointers; what they were before."""
    program().check_waited("an atomic operation")
    dtype = _pointed_at(pointer)
    shape, layout, live = _with_mask(pointer, mask)
    value = to_tensor(val)
    added = cast(value.data, value.dtype, dtype).expand(shape).flatten()
    offsets = pointer.data.expand(shape).flatten()
    before = undefined((len(offsets),), dtype)
    assert pointer.memory is not None
    for i in range(len(offsets)):  # one after the other: several may meet at one address
        if live is None or live.flatten()[i]:
            before[i] = pointer.memory.load(offsets[i], dtype)
            pointer.memory.store(offsets[i], cut(before[i] + added[i], dtype), dtype)
    return Tensor(before.reshape(shape), dtype, layout)


def where(condition: Any, x: Any, y: Any) -> Tensor:
    chosen = to_tensor(condition)
    if chosen.dtype != tl.int1:
        chosen = chosen.to(tl.int1)
    pointers = [value for value in (x, y) if isinstance(value, Tensor) and value.memory is not None]
    if pointers:
        if len(pointers) != 2 or pointers[0].memory is not pointers[1].memory:
            raise EmulationError("where between pointers of different tensors: not emulated")
        layout = agree(chosen.layout, *(pointer.layout for pointer in pointers))
        data = torch.where(chosen.data, *(pointer.data for pointer in pointers))
        return Tensor(data, pointers[0].dtype, layout, pointers[0].memory)
    dtype = common_dtype(x, y)
    first, second, layout = operands(x, y, dtype)
    layout = agree(chosen.layout, layout)
    return Tensor(torch.where(chosen.data, first, second), dtype, layout)


def _unary(function: Callable[[Numbers], Numbers]) -> Callable[..., Tensor]:
    def operation(x: Any) -> Tensor:
        value = to_tensor(x)
        if value.dtype not in ROUNDED:
            raise EmulationError(f"a function of floats, not of {value.dtype}")
        return Tensor(cut(function(value.data), value.dtype), value.dtype, value.layout)

    return operation


exp2 = _unary(torch.exp2)
log2 = _unary(torch.log2)


def _larger(x: Numbers, y: Numbers) -> Numbers:
    return torch.fmax(x, y) if x.is_floating_point() else torch.maximum(x, y)


def _smaller(x: Numbers, y: Numbers) -> Numbers:
    return torch.fmin(x, y) if x.is_floating_point() else torch.minimum(x, y)


def maximum(x: Any, y: Any, propagate_nan: Any = None) -> Tensor:
    """The larger; of a number and NaN the number."""
    return arithmetic(_larger, to_tensor(x) if not isinstance(y, Tensor) else x, y)


def minimum(x: Any, y: Any, propagate_nan: Any = None) -> Tensor:
    """The smaller; of a number and NaN the number."""
    return arithmetic(_smaller, to_tensor(x) if not isinstance(y, Tensor) else x, y)


def cdiv(x: Any, div: Any) -> Any:
    if isinstance(x, Tensor) or isinstance(div, Tensor):
        return (x + (div - 1)) // div
    return -(-x // div)


def _sliced(layout: Any, axis: int) -> Any:
    return INFERRED if isinstance(layout, (Inferred, AutoLayout)) else SliceLayout(axis, layout)


def _axis(x: Tensor, axis: int | None) -> tuple[Tensor, int]:
    if axis is None:
        return Tensor(x.data.flatten(), x.dtype, INFERRED), 0
    if not 0 <= axis < len(x.shape):
        raise EmulationError(f"axis {axis} of {x.shape}")
    return x, axis


def _reduction(function: Callable[[Numbers, int], Numbers]) -> Callable[..., Tensor]:
    def operation(x: Tensor, axis: int | None = None, keep_dims: bool = False, **_: Any) -> Tensor:
        x, axis = _axis(x, axis)
        numbers = cut(function(x.data, axis), x.dtype)
        if keep_dims:
            return Tensor(numbers.unsqueeze(axis), x.dtype, x.layout)
        return Tensor(numbers, x.dtype, _sliced(x.layout, axis))

    return operation


def _largest(x: Numbers, axis: int) -> Numbers:
    if not x.is_floating_point():
        return x.amax(axis)
    nothing = x.isnan()
    return torch.where(nothing.all(axis), torch.nan, torch.where(nothing, -torch.inf, x).amax(axis)).to(x.dtype)


maximum_of = _reduction(_largest)


def sum_of(x: Tensor, axis: int | None = None, keep_dims: bool = False, dtype: Any = None) -> Tensor:
    """A sum, of integers in at least 32 bits."""
    if dtype is None and x.dtype.is_int() and x.dtype.int_bitwidth < 32:
        dtype = tl.uint32 if x.dtype in (tl.uint8, tl.uint16) else tl.int32
    wide = x if dtype is None else x.to(dtype)
    return _reduction(lambda numbers, place: numbers.sum(place))(wide, axis, keep_dims)


def program_id(axis: int = 0) -> Tensor:
    return to_tensor(program().place[axis], tl.int32)


def num_programs(axis: int = 0) -> Tensor:
    return to_tensor(program().grid[axis], tl.int32)


def static_range(*bounds: Any) -> range:
    if any(isinstance(bound, Tensor) for bound in bounds):
        raise EmulationError("static_range up to what is known on the device only")
    return range(*bounds)


def static_assert(condition: Any, message: str = "") -> None:
    if isinstance(condition, Tensor):
        raise EmulationError("static_assert of what is known on the device only")
    if not condition:
        raise EmulationError(f"static_assert: {message}")


def multiple_of(x: Any, values: Any) -> Any:
    """What the compiler is told: of pointers, that every so many bytes along an axis begin at a multiple of them."""
    divisors = [values] if isinstance(values, int) else list(values)
    if isinstance(x, Tensor) and not x.shape and len(divisors) == 1 and int(x) % divisors[0]:
        raise EmulationError(f"{int(x)} is no multiple of {divisors[0]}")
    if isinstance(x, Tensor) and x.memory is not None and x.shape:
        addresses = x.data + x.memory.bytes.data_ptr()
        for axis, divisor in enumerate(divisors):
            every = builtins.max(1, divisor // itemsize(x.dtype.element_ty))
            if divisor > 1 and (addresses.movedim(axis, 0)[::every] % divisor).any():
                raise EmulationError(f"addresses along axis {axis} that are no multiples of {divisor} bytes")
    return x


def max_contiguous(x: Any, values: Any) -> Any:
    """What the compiler is told: that so many pointers along an axis are of elements side by side."""
    if isinstance(x, Tensor) and x.memory is not None and x.shape:
        for axis, size in enumerate(values):
            groups = x.data.movedim(axis, -1).unflatten(-1, (-1, size))
            if (groups.diff(dim=-1) != itemsize(x.dtype.element_ty)).any():
                raise EmulationError(f"elements along axis {axis} that do not lie side by side, {size} at a time")
    return x


def thread_barrier(*, cluster: bool = False) -> None:
    """A barrier of the threads of a partition, which run as one here."""
    program().turn()


def warp_specialize(
    functions_and_args: Sequence[tuple[Any, Any]], worker_num_warps: Sequence[int], worker_num_regs: Any = None
) -> Any:
    """Run the first function in the program's own warps and each other in some of its own, at once."""
    if len(worker_num_warps) != len(functions_and_args) - 1:
        raise EmulationError(f"{len(functions_and_args)} functions, {len(worker_num_warps)} numbers of warps")
    if worker_num_regs is not None and len(worker_num_regs) != len(worker_num_warps):
        raise EmulationError(f"{len(worker_num_regs)} numbers of registers, {len(worker_num_warps)} of warps")
    warps = [program().partition.num_warps, *worker_num_warps]
    jobs = []
    for (function, arguments), count in zip(functions_and_args, warps, strict=True):
        if jobs and any(isinstance(part, Tensor) and part.shape for part in parts_of(tuple(arguments))):
            raise EmulationError(f"{function.__name__} is given a tensor: only scalars reach other warps")
        jobs.append((function.__name__, functools.partial(function, *arguments), count))
    return program().specialise(jobs)


def wait_for_kernel_ahead() -> Tensor:
    """griddepcontrol.wait, of all threads of a partition."""
    program().turn()
    program().partition.waited = True
    return to_tensor(0)


def let_next_start() -> Tensor:
    """griddepcontrol.launch_dependents: the next kernel may count on the end of the one ahead of this one."""
    program().check_waited("griddepcontrol.launch_dependents")
    return to_tensor(0)


# What inline PTX stands for, by a word in it.
ASSEMBLY: dict[str, Callable[..., Any]] = {
    "griddepcontrol.wait": wait_for_kernel_ahead,
    "griddepcontrol.launch_dependents": let_next_start,
}


def inline_asm_elementwise(
    asm: str, constraints: str, args: Sequence[Any], dtype: Any, is_pure: bool, pack: int
) -> Any:  # fmt: skip
    """Known instructions."""
    for word, function in ASSEMBLY.items():
        if word in asm:
            return function(*(to_tensor(x) for x in args))
    raise EmulationError(
        f"the emulator does not know this assembly; put it into a @gluon.jit function of its own and"
        f" gluon_emulator.replace it: {asm.strip()}"
    )


def reshape(x: Tensor, *shape: Any) -> Tensor:
    return x.reshape(*shape)


def permute(x: Tensor, *order: Any) -> Tensor:
    return x.permute(*order)


def expand_dims(x: Tensor, axis: int) -> Tensor:
    return x.expand_dims(axis)


def cast_to(x: Any, dtype: tl.dtype, bitcast: bool = False) -> Tensor:
    return to_tensor(x).to(dtype, bitcast=bitcast)
