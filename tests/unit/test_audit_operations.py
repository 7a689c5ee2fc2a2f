"""Copies between devices, work on the host's own tensors, and bytes: told from an operation alone."""

from __future__ import annotations

import pytest

from taut.audit.operations import Operand, Operation, bytes_moved, fresh_memory, kinds_of

HOST, HERE, FRESH = Operand("cpu", 1, 64), Operand("cuda", 2, 64), Operand("cuda", 3, 64)


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (Operation("aten.copy_", (HERE, HOST), (HERE,)), {"h2d": 1, "syncs": 1}),
        (Operation("aten.copy_", (HERE, HOST), (HERE,), non_blocking=True), {"h2d": 1}),
        (Operation("aten.copy_", (HOST, HERE), (HOST,)), {"d2h": 1, "syncs": 1}),
        (Operation("aten.copy_", (HERE, FRESH), (HERE,)), {"copies": 1, "launches": 1}),
        (Operation("aten._to_copy", (HOST,), (FRESH,)), {"h2d": 1, "syncs": 1, "allocations": 1}),
        (Operation("aten._to_copy", (HERE,), (HOST,)), {"d2h": 1, "syncs": 1}),
        (Operation("aten._local_scalar_dense", (HERE,)), {"syncs": 1, "d2h": 1}),
        (Operation("aten.nonzero", (HERE,), (FRESH,)), {"syncs": 1, "d2h": 1, "launches": 1, "allocations": 1}),
        (Operation("aten.index", (HERE, Operand("cuda", 4, 8, mask=True)), (FRESH,)),
         {"syncs": 1, "d2h": 1, "launches": 1, "allocations": 1}),
        (Operation("vllm.merge_attn_states", (HERE,), ()), {"launches": 1}),
        (Operation("aten.view", (HERE,), (HERE,), is_view=True), {}),
    ],
    ids=lambda value: value.name if isinstance(value, Operation) else "",
)  # fmt: skip
def test_on_a_gpu(operation: Operation, expected: dict[str, int]) -> None:
    assert kinds_of(operation, "cuda") == expected


@pytest.mark.parametrize("name", ["aten._local_scalar_dense", "aten.zero_", "aten.copy_", "aten.nonzero"])
def test_what_the_host_does_with_its_own_tensors_is_nothing_to_a_gpu(name: str) -> None:
    assert not kinds_of(Operation(name, (HOST, HOST), (HOST,)), "cuda")


def test_memory_that_was_there_before_is_not_taken() -> None:
    assert fresh_memory(Operation("aten.add", (HERE,), (FRESH, HERE, HOST)), "cuda") == {3: 64}
    assert fresh_memory(Operation("aten.view", (HERE,), (FRESH,), is_view=True), "cuda") == {}


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (Operation("aten.copy_", (HERE, FRESH), (HERE,)), 128),
        (Operation("aten.zero_", (HERE,), (HERE,)), 64),
        (Operation("aten.add", (HERE, HERE), (FRESH,)), 192),
        (Operation("aten.index", (Operand("cuda", 2, 10**9), Operand("cuda", 4, 8)), (FRESH,)), 8 + 64 + 64),
        (Operation("aten.index_put_", (Operand("cuda", 2, 10**9), Operand("cuda", 4, 8), FRESH), ()), 8 + 64 + 64),
        (Operation("aten.empty_like", (HERE,), (FRESH,)), 0),
        (Operation("_C.attention", (HERE,), (FRESH,)), None),
    ],
    ids=lambda value: value.name if isinstance(value, Operation) else "",
)
def test_bytes(operation: Operation, expected: int | None) -> None:
    assert bytes_moved(operation) == expected
