"""What one operation makes a device do, told from its name and its tensors. Pure: data in, data out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

# What is counted. `outputs` are allocations too: those of the tensor that a layer returns.
KINDS = ("syncs", "h2d", "d2h", "copies", "fills", "launches", "allocations", "outputs")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


FILLS = _words("fill_ zero_ zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full scalar_tensor")
COPIES = _words(
    "copy_ clone _to_copy cat stack contiguous repeat constant_pad_nd slice_scatter select_scatter expand_copy "
    "view_copy permute_copy slice_copy unsqueeze_copy transpose_copy"
)
# The size of the result is in the data: the host waits to learn it, or to learn the answer.
WAITS = _words(
    "_local_scalar_dense nonzero masked_select bincount equal is_nonzero _unique _unique2 unique_dim unique_consecutive"
)
# What only names memory, or takes it without touching it.
NO_LAUNCH = _words(
    "empty empty_like empty_strided new_empty new_empty_strided empty_permuted _local_scalar_dense _unsafe_view "
    "_reshape_alias lift_fresh detach alias set_ resize_ is_pinned _pin_memory record_stream"
)
GATHERS = _words("index index_select gather embedding take")
SCATTERS = _words("index_put index_put_ index_copy_ scatter_")


@dataclass(frozen=True)
class Operand:
    """A tensor that an operation reads or writes.

    Args:
        device: "cpu", "cuda".
        memory: which memory it lies in; equal for views of one another.
        size: bytes of its elements.
        mask: whether its elements are true or false.
    """

    device: str
    memory: int
    size: int
    mask: bool = False


@dataclass(frozen=True)
class Operation:
    """One call of an operator.

    Args:
        name: with its namespace and without its overload: "aten.copy_", "vllm.merge_attn_states".
        inputs: tensors among the arguments, in their order.
        outputs: tensors it returned.
        is_view: whether the operator only names memory anew.
        non_blocking: whether it was asked not to wait.
        sized: whether the size of a repeat was given.
    """

    name: str
    inputs: tuple[Operand, ...] = ()
    outputs: tuple[Operand, ...] = ()
    is_view: bool = False
    non_blocking: bool = False
    sized: bool = False

    @property
    def word(self) -> str:
        """The name inside its namespace."""
        return self.name.partition(".")[2]

    @property
    def of_torch(self) -> bool:
        """Whether torch brings it; of others it is not known what they read."""
        return self.name.startswith("aten.")


def fresh_memory(operation: Operation, device: str) -> dict[int, int]:
    """The memory of the device that an operation took: what its results lie in and no input does, with bytes."""
    if operation.is_view:
        return {}
    known = {operand.memory for operand in operation.inputs}
    taken = (out for out in operation.outputs if out.device == device and out.size)
    return {out.memory: out.size for out in taken if out.memory not in known}


def kinds_of(operation: Operation, device: str) -> Counter[str]:
    """What an operation makes the device do, by kind; nothing where it works on the host's tensors alone.

    A wait is counted where the host cannot go on before the device has: reading a number, a result whose size is in the
    data, an index by a mask, a copy between host and device that was not asked to be non-blocking.

    Args:
        operation: to be judged.
        device: the type of the device that the engine computes on; "cpu" where that is the host itself.
    """
    found: Counter[str] = Counter()
    operands = (*operation.inputs, *operation.outputs)
    if operands and all(operand.device != device for operand in operands):
        return found
    found["allocations"] += len(fresh_memory(operation, device))
    word = operation.word if operation.of_torch else ""
    if not operation.is_view and word not in NO_LAUNCH:
        across = _across(operation, device)
        if across:
            found[across] += 1
            found["syncs"] += not operation.non_blocking
        else:
            found["launches"] += 1
            found["fills"] += word in FILLS
            found["copies"] += word in COPIES
    if word in WAITS or _indexes_by_mask(operation) or (word == "repeat_interleave" and not operation.sized):
        found["syncs"] += 1
        found["d2h"] += device != "cpu"
    return +found


def bytes_moved(operation: Operation) -> int | None:
    """Bytes that an operation reads and writes at least; None for one that is not torch's own."""
    if operation.is_view or operation.word in NO_LAUNCH:
        return 0
    if not operation.of_torch:
        return None
    if operation.word == "copy_":  # what it writes to is not read
        return sum(operand.size for operand in operation.inputs[:2])
    if operation.word in FILLS:
        return sum(operand.size for operand in operation.outputs)
    if operation.word in GATHERS:  # of what it reads from, only what it takes
        return sum(operand.size for operand in (*operation.inputs[1:], *operation.outputs, *operation.outputs))
    if operation.word in SCATTERS:  # of what it writes to, only what it puts there
        return sum(operand.size for operand in (*operation.inputs[1:], *operation.inputs[-1:]))
    return sum(operand.size for operand in (*operation.inputs, *operation.outputs))


def _across(operation: Operation, device: str) -> str | None:
    """ "h2d" or "d2h" where a copy leaves the device that it comes from."""
    if not operation.of_torch or operation.word not in ("copy_", "_to_copy"):
        return None
    ends = [operand.device for operand in (*operation.inputs, *operation.outputs)][:2]
    if len(ends) < 2 or ends[0] == ends[1]:
        return None
    written = ends[0] if operation.word == "copy_" else ends[1]  # copy_(to, from)
    return "h2d" if written == device else "d2h"


def _indexes_by_mask(operation: Operation) -> bool:
    indexing = operation.word in ("index", "index_put", "index_put_") and operation.of_torch
    return indexing and any(operand.mask for operand in operation.inputs[1:])
