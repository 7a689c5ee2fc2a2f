"""Shared memory, its barriers, and the asynchronous copies and products that read and write it.

Where an element lies is asked of Triton itself (its linear layouts), so that bytes written through one view and read
through another come out as on the device. All of shared memory begins undefined.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import triton.language as tl
from triton.experimental.gluon.language import (
    DotOperandLayout,
    NVMMADistributedLayout,
    NVMMASharedLayout,
)

from gluon_emulator.machine import kernel_line, program
from gluon_emulator.values import (
    BITS,
    INFERRED,
    EmulationError,
    GlobalMemory,
    Inferred,
    Tensor,
    agree,
    from_bits,
    itemsize,
    to_bits,
    to_tensor,
    undefined,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor as Numbers

    from gluon_emulator.machine import Partition, Pending

MIXED_TYPES = {tl.float16, tl.bfloat16, tl.float32, tl.float8e4nv, tl.float8e5}


@lru_cache(maxsize=256)
def places_of(layout: Any, shape: tuple[int, ...]) -> tuple[Numbers, int]:
    """Where each element of a shared tensor lies, in elements from its beginning; and its alignment in bytes.

    Dimensions before those of the layout are whole tiles, one after the other.
    """
    from triton._C.libtriton import ir
    from triton._C.libtriton.gluon_ir import GluonOpBuilder

    rank = getattr(layout, "rank", None) or len(getattr(layout, "order", shape))
    rank = min(rank, len(shape))
    tile = shape[len(shape) - rank :]
    size = math.prod(tile)
    if size == 1:
        return torch.arange(math.prod(shape)).reshape(shape), 16
    context = ir.context()
    ir.load_dialects(context)
    builder = GluonOpBuilder(context)
    linear = builder.to_linear_layout(layout._to_ir(builder), list(tile))
    coordinates = torch.zeros(size, rank, dtype=torch.int64)
    order = torch.arange(size)
    for bit, basis in enumerate(linear.offset_bases):
        coordinates ^= ((order >> bit) & 1)[:, None] * torch.tensor(basis)
    strides = torch.tensor([math.prod(tile[i + 1 :]) for i in range(rank)])
    places = torch.empty(size, dtype=torch.int64)
    places[(coordinates * strides).sum(1)] = order
    before = torch.arange(math.prod(shape) // size) * size
    return (before[:, None] + places).reshape(shape), linear.alignment


class Allocation:
    """Some shared memory of a program.

    Args:
        size: bytes.
        line: that asked for it.

    Attributes:
        bytes: uint8.
        written: when each byte was last written by an ordinary store (or cp.async); 0 if otherwise.
        writer: which partition did.
        barriers: those that have been made in it, by their offset.
    """

    def __init__(self, size: int, line: str) -> None:
        self.bytes = torch.full((-(-size // 16) * 16,), 0xFF, dtype=torch.uint8)
        self.line = line
        self.written = torch.zeros(len(self.bytes), dtype=torch.int64)
        self.writer = torch.zeros(len(self.bytes), dtype=torch.int64)
        self.last_written = 0
        self.barriers: dict[int, Barrier] = {}


class SharedMemory:
    """`shared_memory_descriptor`: a view of an allocation.

    Args:
        allocation: it lies in.
        dtype: of an element.
        places: of each element, in elements from the beginning of the allocation.
        layout: the kernel's word for where they lie.
        alignment: bytes that the view must begin at a multiple of.
    """

    def __init__(
        self, allocation: Allocation, dtype: tl.dtype, places: Numbers, layout: Any, alignment: int = 16
    ) -> None:
        self.allocation = allocation
        self.dtype = dtype
        self.places = places
        self.layout = layout
        self.alignment = alignment

    @property
    def shape(self) -> list[int]:
        return list(self.places.shape)

    @property
    def numel(self) -> int:
        return self.places.numel()

    @property
    def nbytes_per_cta(self) -> int:
        return self.numel * itemsize(self.dtype)

    @property
    def type(self) -> SharedMemory:
        return self

    element_ty = property(lambda self: self.dtype)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the emulator has no `{name}` of shared memory")

    # Views.
    def index(self, index: Any) -> SharedMemory:
        index = int(index)
        if not 0 <= index < self.shape[0]:
            raise EmulationError(f"index {index} of shared memory {self.shape}")
        return SharedMemory(self.allocation, self.dtype, self.places[index], self.layout, self.alignment)

    def slice(self, start: int, length: int, dim: int = 0) -> SharedMemory:
        if start + length > self.shape[dim] or start < 0:
            raise EmulationError(f"slice {start}:{start + length} of dimension {dim} of shared memory {self.shape}")
        return SharedMemory(
            self.allocation, self.dtype, self.places.narrow(dim, start, length), self.layout, self.alignment
        )

    def permute(self, order: Sequence[int]) -> SharedMemory:
        layout: Any = INFERRED
        if isinstance(self.layout, NVMMASharedLayout):
            swapped = list(order)[-2:] != sorted(list(order)[-2:])
            layout = replace(self.layout, transposed=self.layout.transposed != swapped)
        return SharedMemory(self.allocation, self.dtype, self.places.permute(tuple(order)), layout, self.alignment)

    def reshape(self, shape: Sequence[int]) -> SharedMemory:
        layout: Any = INFERRED
        if isinstance(self.layout, NVMMASharedLayout):
            layout = replace(self.layout, rank=len(shape))
        places = self.places.reshape(tuple(int(size) for size in shape))
        return SharedMemory(self.allocation, self.dtype, places, layout, self.alignment)

    def reinterpret(self, dtype: Any = None, shape: Any = None, layout: Any = None) -> SharedMemory:
        dtype = dtype or self.dtype
        layout = layout or self.layout
        shape = tuple(int(size) for size in (shape or self.shape))
        begin = int(self.places.min()) * itemsize(self.dtype)
        places, alignment = places_of(layout, shape)
        last = begin + math.prod(shape) * itemsize(dtype)
        if last > len(self.allocation.bytes) or begin % itemsize(dtype):
            raise EmulationError(f"{dtype}{list(shape)} does not fit into the {len(self.allocation.bytes)} bytes there")
        return SharedMemory(self.allocation, dtype, places + begin // itemsize(dtype), layout, alignment)

    _reinterpret = reinterpret

    # Ordinary reads and writes.
    def load(self, layout: Any) -> Tensor:
        program().turn()
        return Tensor(self.read(), self.dtype, layout)

    def store(self, value: Any) -> None:
        if not isinstance(value, Tensor) or value.shape != self.shape or value.dtype != self.dtype:
            raise EmulationError(f"{value!r} is stored into {self.dtype}{self.shape} of shared memory")
        program().turn()
        self.write_ordinarily(value.data, program().partition)

    # What the machine does.
    def read(self) -> Numbers:
        elements = self.allocation.bytes.view(BITS[itemsize(self.dtype)])
        return from_bits(elements[self.places], self.dtype)

    def write(self, numbers: Numbers) -> None:
        elements = self.allocation.bytes.view(BITS[itemsize(self.dtype)])
        elements[self.places] = to_bits(numbers, self.dtype)

    def poison(self) -> None:
        """Make its contents undefined, as they are while something asynchronous writes them."""
        self.write(undefined(self.shape, self.dtype))
        size = itemsize(self.dtype)
        self.allocation.written.view(-1, size)[self.places] = 0

    def write_ordinarily(self, numbers: Numbers, writer: Partition) -> None:
        """Write, and remember what changed: asynchronous readers see that past a fence only."""
        one, size = program(), itemsize(self.dtype)
        elements = self.allocation.bytes.view(BITS[size])
        bits = to_bits(numbers, self.dtype)
        changed = self.places[elements[self.places] != bits]
        elements[self.places] = bits
        one.clock += 1
        self.allocation.written.view(-1, size)[changed] = one.clock
        self.allocation.writer.view(-1, size)[changed] = one.partitions.index(writer)
        self.allocation.last_written = one.clock

    def check_fenced(self, reader: str) -> None:
        """An asynchronous reader sees ordinary writes only past a fence, of the writer or of who issues the read."""
        one = program()
        fenced = one.partition.fenced
        if self.allocation.last_written <= fenced:
            return
        size = itemsize(self.dtype)
        written = self.allocation.written.view(-1, size)[self.places]
        writer = self.allocation.writer.view(-1, size)[self.places]
        by_writer = torch.tensor([partition.fenced for partition in one.partitions])[writer]
        unseen = (written > fenced) & (written > by_writer)
        if unseen.any():
            who = one.partitions[int(writer[unseen][0])].name
            raise EmulationError(f"{reader} reads what {who} has stored, without fence_async_shared in between")

    def check_aligned(self, use: str) -> None:
        """A tile that hardware reads or writes begins where its swizzle does."""
        begin = int(self.places.flatten()[0]) * itemsize(self.dtype)
        if begin % min(self.alignment, 128):
            raise EmulationError(f"{use} at byte {begin} of its allocation, not at a multiple of {self.alignment}")


class Barrier:
    """An mbarrier.

    Args:
        count: arrivals that a phase takes.
        name: for messages.
    """

    def __init__(self, count: int, name: str) -> None:
        self.count = self.left = count
        self.bytes = 0
        self.phase = 0
        self.name = name

    def describe(self) -> str:
        """Its state in words."""
        return f"{self.name}: phase {self.phase}, {self.left} of {self.count} arrivals and {self.bytes} bytes to come"

    def change(self, arrivals: int = 0, expected: int = 0, delivered: int = 0) -> None:
        """Count arrivals and bytes; the phase ends when neither is left."""
        self.left -= arrivals
        self.bytes += expected - delivered
        if self.left < 0:
            raise EmulationError(f"more arrivals than a phase takes; {self.describe()}")
        if self.left == 0 and self.bytes < 0:
            raise EmulationError(f"more bytes arrived than were expected; {self.describe()}")
        if self.left == 0 and self.bytes == 0:
            self.left = self.count
            self.phase ^= 1

    def check_end(self) -> None:
        """Nothing of a phase that began may be left."""
        if self.left != self.count or self.bytes:
            raise EmulationError(f"at the end a phase is unfinished; {self.describe()}")


def barrier_of(memory: SharedMemory) -> Barrier:
    """The barrier that has been made in some shared memory."""
    if not isinstance(memory, SharedMemory):
        raise EmulationError(f"a barrier is shared memory, not {memory!r}")
    if memory.numel != 1:
        raise EmulationError(f"a barrier is one int64, this is {memory.dtype}{memory.shape}: .index it")
    found = memory.allocation.barriers.get(int(memory.places.flatten()[0]))
    if found is None:
        raise EmulationError("this barrier has not been initialised, or is invalidated")
    return found


@dataclass
class Descriptor:
    """A TMA descriptor in a kernel.

    Args:
        memory: of the tensor.
        begin: its first byte.
        shape: in elements.
        strides: in elements.
        block_shape: of a box.
        layout: of a box in shared memory.
        dtype: of an element.
        padding: what stands outside, "zero" or "nan".
    """

    memory: GlobalMemory
    begin: int
    shape: list[Any]
    strides: list[Any]
    block_shape: list[int]
    layout: Any
    dtype: tl.dtype
    padding: str = "zero"

    def __post_init__(self) -> None:
        size = itemsize(self.dtype)
        if int(self.strides[-1]) != 1:
            raise EmulationError("the last stride of a TMA descriptor is 1")
        if (self.memory.tensor.untyped_storage().data_ptr() + self.begin) % 16:
            raise EmulationError("a TMA descriptor begins at a multiple of 16 bytes")
        if any(int(stride) * size % 16 or int(stride) < 0 for stride in self.strides[:-1]):
            raise EmulationError(f"strides of a TMA descriptor are multiples of 16 bytes, not {self.strides} elements")
        if any(not 0 < int(extent) < 2**31 for extent in self.shape):
            raise EmulationError(f"a TMA descriptor cannot have the shape {self.shape}")
        if self.block_shape[-1] * size < 16:
            raise EmulationError("a row of a TMA box has at least 16 bytes")

    @property
    def block_type(self) -> Any:
        return tl.block_type(self.dtype, self.block_shape)

    @property
    def nbytes_per_cta(self) -> int:
        return math.prod(self.block_shape) * itemsize(self.dtype)

    def box(self, corner: list[int]) -> tuple[Numbers, Numbers]:
        """Byte offsets of a box's elements, and which of them the tensor has."""
        offsets = torch.tensor(self.begin)
        inside = torch.tensor(True)
        for first, extent, stride, length in zip(corner, self.shape, self.strides, self.block_shape, strict=True):
            places = first + torch.arange(length)
            offsets = offsets[..., None] + places * (int(stride) * itemsize(self.dtype))
            inside = inside[..., None] & (places >= 0) & (places < int(extent))
        return offsets, inside

    def check(self, memory: SharedMemory, coordinates: Sequence[Any]) -> list[int]:
        """Check that a box fits its shared memory; the corner as numbers."""
        if list(memory.shape) != list(self.block_shape) or memory.dtype != self.dtype:
            raise EmulationError(
                f"boxes of {self.dtype}{self.block_shape}, shared memory of {memory.dtype}{memory.shape}"
            )
        if not isinstance(memory.layout, Inferred) and memory.layout != self.layout:
            raise EmulationError(f"the box has the layout {self.layout}, the shared memory {memory.layout}")
        if len(coordinates) != len(self.shape):
            raise EmulationError(f"{len(coordinates)} coordinates for {len(self.shape)} dimensions")
        memory.check_aligned("a TMA box")
        for one in coordinates:
            if isinstance(one, Tensor) and one.dtype != tl.int32:
                raise EmulationError(f"coordinates of TMA are int32, not {one.dtype}")
        return [int(one) for one in coordinates]


def tma_load(
    tensor_desc: Descriptor, coord: Sequence[Any], barrier: SharedMemory, result: SharedMemory, pred: Any = True,
    multicast: bool = False, cache_policy: Any = None,
) -> None:  # fmt: skip
    """Copy a box into shared memory and count its bytes at a barrier, some time."""
    one = program()
    one.check_waited("a TMA load")
    signalled = barrier_of(barrier)
    corner = tensor_desc.check(result, coord)
    if multicast:
        raise EmulationError("multicast is not emulated")
    if not bool(pred):
        return
    offsets, inside = tensor_desc.box(corner)

    def numbers() -> Numbers:
        outside = math.nan if tensor_desc.padding == "nan" else 0
        filled = torch.full((), outside).to(undefined((), tensor_desc.dtype).dtype)
        return torch.where(inside, tensor_desc.memory.load(offsets, tensor_desc.dtype, inside), filled)

    early = numbers() if one.random.random() < 0.5 else None
    result.poison()

    def end() -> None:
        result.write(numbers() if early is None else early)
        signalled.change(delivered=tensor_desc.nbytes_per_cta)

    one.start("the TMA load", end)
    one.turn()


def async_copy(
    smem: SharedMemory, pointer: Tensor, mask: Any = None, cache_modifier: Any = None, eviction_policy: Any = None,
    volatile: bool = False, cache_policy: Any = None,
) -> None:  # fmt: skip
    """cp.async: the numbers at the pointers into shared memory, some time; zeros where masked."""
    one = program()
    one.check_waited("a cp.async")
    if pointer.memory is None or pointer.shape != smem.shape or pointer.dtype.element_ty != smem.dtype:
        raise EmulationError(f"{pointer!r} is copied into {smem.dtype}{smem.shape} of shared memory")
    agree(pointer.layout, *([] if mask is None else [to_tensor(mask).layout]))
    live = None if mask is None else to_tensor(mask).data.expand(pointer.data.shape)

    def numbers() -> Numbers:
        loaded = pointer.memory.load(pointer.data, smem.dtype, live)
        return loaded if live is None else torch.where(live, loaded, torch.zeros((), dtype=loaded.dtype))

    early = numbers()  # an address that is no one's is an error here, at its line
    late = one.random.random() < 0.5
    smem.poison()

    me = one.partition

    def end() -> None:
        smem.write_ordinarily(numbers() if late else early, me)

    me.copies.append(one.start("the cp.async", end))
    one.turn()


def copies_arrive(mbarrier: SharedMemory, increment_count: bool = True) -> None:
    """Every thread of the partition arrives at a barrier when its cp.async so far have ended."""
    one = program()
    barrier = barrier_of(mbarrier)
    me = one.partition
    before = me.copies
    threads = me.num_warps * 32
    if increment_count:
        barrier.left += threads

    def end() -> None:
        if any(copy in one.pending for copy in before):
            one.pending.append(arrival)  # not yet: the copies end first
            _end_first(before)
            return
        barrier.change(arrivals=threads)

    def _end_first(copies: list[Pending]) -> None:
        copy = one.random.choice([copy for copy in copies if copy in one.pending])
        one.pending.remove(copy)
        copy.end()

    arrival = one.start("the arrival of cp.async", end)
    me.copies = []  # the barrier tells of their end
    one.turn()


class Product:
    """An asynchronous warpgroup product, and the accumulator that it stands for: unreadable until it is waited for.

    Args:
        a: left operand, in registers or shared.
        b: right operand, shared.
        acc: what is added to, None for nothing.
        out: an accumulator of the dtype and layout of the result.
        early: whether the operands are read now.
    """

    def __init__(self, a: Any, b: SharedMemory, acc: Any, out: Any, early: bool) -> None:
        self.a, self.b, self.acc = a, b, acc
        self.dtype, self.layout, self.shape = out.dtype, out.layout, out.shape
        self.line = kernel_line()
        self.result: Tensor | None = None
        if early:
            self.compute()

    @property
    def type(self) -> Product:
        return self

    def compute(self) -> None:
        """Read the operands, if that has not been done."""
        if self.result is not None:
            return
        acc = self.acc
        if isinstance(acc, Product):
            acc.compute()
            acc = acc.result
        a = self.a.data if isinstance(self.a, Tensor) else self.a.read()
        numbers = a.to(torch.float32) @ self.b.read().to(torch.float32)
        self.result = Tensor(numbers if acc is None else numbers + acc.data, self.dtype, self.layout)

    def __getattr__(self, name: str) -> Any:
        raise EmulationError(f"`{name}` of the accumulator of {self.line}, which has not been waited for")

    def _unreadable(self, *_: Any) -> Any:
        raise EmulationError(f"the accumulator of {self.line} is read, which has not been waited for")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _unreadable
    __lt__ = __le__ = __gt__ = __ge__ = __neg__ = __getitem__ = _unreadable


def check_product(a: Any, b: Any, acc: Any) -> None:
    """What the instruction asks of its operands."""
    warps = program().partition.num_warps
    layout = acc.layout
    if not isinstance(layout, NVMMADistributedLayout) or list(layout.version) != [3, 0]:
        raise EmulationError(
            f"the accumulator of warpgroup_mma has an NVMMADistributedLayout of version 3, not {layout}"
        )
    if math.prod(layout.warps_per_cta) != warps or warps % 4:
        raise EmulationError(f"the accumulator is laid out for {layout.warps_per_cta} warps, the partition has {warps}")
    if not isinstance(b, SharedMemory) or not isinstance(a, (SharedMemory, Tensor)):
        raise EmulationError(
            "warpgroup_mma takes its left operand from registers or shared memory, its right from shared"
        )
    rows, columns, depth = a.shape[0], b.shape[-1], a.shape[-1]
    if [rows, columns] != list(acc.shape) or b.shape != [depth, columns]:
        raise EmulationError(f"warpgroup_mma of {a.shape} and {b.shape} into {acc.shape}")
    if a.dtype != b.dtype or a.dtype not in MIXED_TYPES or acc.dtype != tl.float32:
        raise EmulationError(f"warpgroup_mma of {a.dtype} and {b.dtype} into {acc.dtype}")
    width = itemsize(a.dtype)
    _, wide, deep = layout.instr_shape
    if rows % 64 or columns % wide or depth % deep or deep * width != 32 or wide % 8 or wide > 256:
        raise EmulationError(f"the instruction {layout.instr_shape} does not divide {rows} x {columns} x {depth}")
    for operand, along_depth in ((a, False), (b, True)):
        if isinstance(operand, Tensor):
            dot = operand.layout
            if isinstance(dot, Inferred):
                continue
            if not isinstance(dot, DotOperandLayout) or dot.parent != layout or dot.operand_index != 0:
                raise EmulationError(f"the left operand has the layout {dot}, not a DotOperandLayout(0) of {layout}")
            if dot.k_width * width != 4:
                raise EmulationError(f"k_width {dot.k_width} of {a.dtype} in registers")
            continue
        operand.check_aligned("an operand of warpgroup_mma")
        if isinstance(operand.layout, Inferred):
            continue
        if not isinstance(operand.layout, NVMMASharedLayout) or operand.layout.element_bitwidth != 8 * width:
            raise EmulationError(f"an operand of warpgroup_mma in shared memory has the layout {operand.layout}")
        if width != 2 and operand.layout.transposed != along_depth:
            raise EmulationError(f"operands of {a.dtype} lie along the depth of the product")
        operand.check_fenced("warpgroup_mma")


def warpgroup_mma(
    a: Any, b: Any, acc: Any, *, use_acc: Any = True, precision: Any = None, max_num_imprecise_acc: Any = None,
    is_async: bool = False,
) -> Any:  # fmt: skip
    """acc + a @ b."""
    one = program()
    check_product(a, b, acc)
    products = one.partition.products
    early = all(product.result is not None for product in products) and one.random.random() < 0.5
    product = Product(a, b, acc if bool(use_acc) else None, acc, early)
    products.append(product)
    if is_async:
        one.turn()
        return product
    for each in products:
        each.compute()
    products.clear()
    one.turn()
    return product.result


def warpgroup_mma_wait(num_outstanding: int = 0, deps: Sequence[Any] | None = None) -> Any:
    """Wait until at most so many products of this partition are under way; those of `deps` that ended, as tensors."""
    if deps is None:
        raise EmulationError("warpgroup_mma_wait needs deps")
    one = program()
    one.turn()
    products = one.partition.products
    for product in products[: max(0, len(products) - num_outstanding)]:
        product.compute()
    del products[: max(0, len(products) - num_outstanding)]
    done = [
        dep.result if isinstance(dep, Product) and dep not in products and dep.result is not None else dep
        for dep in deps
    ]
    return done[0] if len(done) == 1 else tuple(done)


def fence_async_shared(cluster: bool = False) -> None:
    """Let asynchronous readers see what the partition has written."""
    one = program()
    one.clock += 1
    one.partition.fenced = one.clock
    one.turn()


def allocate(element_ty: tl.dtype, shape: Sequence[int], layout: Any, value: Tensor | None = None) -> SharedMemory:
    """Shared memory of a program, for as long as something refers to it."""
    import weakref

    one = program()
    shape = tuple(int(size) for size in shape)
    size = math.prod(shape) * itemsize(element_ty)
    one.shared_bytes += size
    if one.shared_bytes > one.shared_limit:
        raise EmulationError(f"{one.shared_bytes} bytes of shared memory, {one.shared_limit} are there")
    places, alignment = places_of(layout, shape)
    allocation = Allocation(size, kernel_line())

    def free() -> None:
        one.shared_bytes -= size

    weakref.finalize(allocation, free)
    memory = SharedMemory(allocation, element_ty, places, layout, alignment)
    if value is not None:
        memory.store(value)
    return memory


def barrier_init(mbarrier: SharedMemory, count: int) -> None:
    """Make a barrier in shared memory."""
    one = program()
    place = int(mbarrier.places.flatten()[0])
    if mbarrier.numel != 1 or mbarrier.dtype != tl.int64:
        raise EmulationError(f"a barrier is one int64, not {mbarrier.dtype}{mbarrier.shape}")
    if place in mbarrier.allocation.barriers:
        raise EmulationError("this barrier has been initialised already")
    made = Barrier(int(count), f"barrier {place} of {mbarrier.allocation.line}")
    mbarrier.allocation.barriers[place] = made
    one.barriers.append(made)
    one.turn()


def barrier_expect(
    mbarrier: SharedMemory, bytes_per_cta: Any = None, pred: Any = True, *, bytes: Any = None, from_cta: Any = None  # noqa: A002
) -> None:  # fmt: skip
    """Arrive once, and wait for so many bytes more before the phase ends."""
    if bool(pred):
        expected = bytes_per_cta if bytes is None else bytes
        if isinstance(expected, Tensor):
            raise EmulationError("the bytes that a barrier expects are a constexpr")
        barrier_of(mbarrier).change(arrivals=1, expected=expected)
    program().turn()


def barrier_arrive(mbarrier: SharedMemory, *, count: int = 1, pred: Any = True, from_cta: Any = None) -> None:
    """Arrive `count` times."""
    if bool(pred):
        barrier_of(mbarrier).change(arrivals=count)
    program().turn()


def barrier_wait(mbarrier: SharedMemory, phase: Any, pred: Any = True, deps: Sequence[Any] = ()) -> None:
    """Wait until the phase of this parity has ended."""
    if not bool(pred):
        return
    barrier = barrier_of(mbarrier)
    parity = int(phase)
    if parity not in (0, 1):
        raise EmulationError(f"a phase is 0 or 1, not {parity}")
    program().turn(lambda: barrier.phase != parity, f"phase {parity} of {barrier.name}")
