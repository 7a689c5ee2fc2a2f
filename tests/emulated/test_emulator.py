"""The emulator tells right kernels from wrong ones: a small pipeline, and the same with one thing wrong each."""

# Kernels are written as Triton wants them.
# ruff: noqa: ANN001, ANN201, N803

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import torch
from gluon_emulator import EmulationError, seeded
from gluon_emulator.modules import EMULATED
from gluon_names import names_used
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from taut.common_kernels.aggregates import aggregates_of

if TYPE_CHECKING:
    from collections.abc import Callable

SEEDS = range(12)
ROWS, DEPTH, COLUMNS = 64, 32, 16  # of a tile's product


@gluon.jit
def load_tiles(a, b, a_ring, b_ring, full, free, tiles, STAGES: gl.constexpr, WRONG: gl.constexpr):
    for i in range(tiles):
        stage = i % STAGES
        if WRONG != "no wait for a free slot":
            mbarrier.wait(free.index(stage), ((i // STAGES) & 1) ^ 1)
        size: gl.constexpr = a.block_type.nbytes + b.block_type.nbytes
        mbarrier.expect(full.index(stage), size - 16 if WRONG == "too few bytes expected" else size)
        tma.async_load(a, [0, i * DEPTH], full.index(stage), a_ring.index(stage))
        tma.async_load(b, [i * DEPTH, 0], full.index(stage), b_ring.index(stage))


@gluon.jit
def multiply_tiles(out, a_ring, b_ring, full, free, tiles, STAGES: gl.constexpr, WRONG: gl.constexpr):
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    acc = gl.zeros([ROWS, COLUMNS], gl.float32, wide)
    phase = 0
    for i in range(tiles):
        stage = i % STAGES
        if WRONG != "no wait for a full slot":
            mbarrier.wait(full.index(stage), phase ^ 1 if WRONG == "the wrong phase" else phase)
        product = warpgroup_mma(a_ring.index(stage), b_ring.index(stage), acc, is_async=True)
        if WRONG == "a slot freed before the product's wait":
            mbarrier.arrive(free.index(stage))
        if WRONG == "read before the product's wait":
            acc = product + 0.0
        acc = warpgroup_mma_wait(0, [product])
        if WRONG == "a second arrival":
            mbarrier.arrive(free.index(stage))
        if WRONG != "a slot freed before the product's wait":
            mbarrier.arrive(free.index(stage))
        if stage == STAGES - 1:
            phase ^= 1
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, wide))
    columns = gl.arange(0, COLUMNS, gl.SliceLayout(0, wide))
    gl.store(out + rows[:, None] * COLUMNS + columns[None, :], acc)


@gluon.jit
def pipeline(a, b, out, tiles, STAGES: gl.constexpr, WRONG: gl.constexpr):
    a_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, ROWS, DEPTH], a.layout)
    b_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, DEPTH, COLUMNS], b.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    gl.warp_specialize(
        [
            (multiply_tiles, (out, a_ring, b_ring, full, free, tiles, STAGES, WRONG)),
            (load_tiles, (a, b, a_ring, b_ring, full, free, tiles, STAGES, WRONG)),
        ],
        [4],
        [24],
    )


def run_pipeline(wrong: str) -> None:
    tiles = 5
    a, b = torch.randn(ROWS, tiles * DEPTH).bfloat16(), torch.randn(tiles * DEPTH, COLUMNS).bfloat16()
    boxes = [
        TensorDescriptor.from_tensor(x, shape, gl.NVMMASharedLayout.get_default_for(shape, gl.bfloat16))
        for x, shape in ((a, [ROWS, DEPTH]), (b, [DEPTH, COLUMNS]))
    ]
    out = torch.full((ROWS, COLUMNS), torch.nan)
    pipeline[(1,)](*boxes, out, tiles, STAGES=2, WRONG=wrong, num_warps=4)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-4, atol=1e-4)


@gluon.jit
def through_shared(x, y, out, WRONG: gl.constexpr):
    """The product of x, copied by cp.async, and of y, stored by threads; the result goes through shared memory."""
    tile: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16])
    shared: gl.constexpr = gl.NVMMASharedLayout(32, 16, rank=2)
    rows = gl.arange(0, 64, gl.SliceLayout(1, tile))
    columns = gl.arange(0, 16, gl.SliceLayout(0, tile))
    left = gl.allocate_shared_memory(gl.bfloat16, [64, 16], shared)
    right = gl.allocate_shared_memory(gl.bfloat16, [16, 16], shared)
    result = gl.allocate_shared_memory(gl.float32, [64, 16], gl.NVMMASharedLayout(64, 32, rank=2))
    copied = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(copied, count=128)
    async_copy.async_load(left, x + rows[:, None] * 16 + columns[None, :], mask=(rows < 50)[:, None])
    if WRONG != "nobody is told of cp.async":
        async_copy.mbarrier_arrive(copied, increment_count=False)
    few = gl.arange(0, 16, gl.SliceLayout(1, tile))
    numbers = gl.load(y + few[:, None] * 16 + columns[None, :])
    right.store(numbers)
    if WRONG != "no wait for cp.async":
        mbarrier.wait(copied, 0)
    if WRONG != "no fence before a product":
        fence_async_shared()
    acc = warpgroup_mma(left, right, gl.zeros([64, 16], gl.float32, wide), use_acc=False)
    result.store(acc)
    gl.store(out + rows[:, None] * 16 + columns[None, :], result.load(tile))


def run_through_shared(wrong: str) -> None:
    x, y = torch.randn(64, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    x[50:] = torch.nan
    out = torch.full((64, 16), torch.nan)
    through_shared[(1,)](x[:50], y, out, wrong, num_warps=4)
    torch.testing.assert_close(out, x.nan_to_num().float() @ y.float(), rtol=1e-4, atol=1e-4)


PIPELINE_ERRORS = {
    "no wait for a free slot": "not close|more arrivals|no partition can go on|unfinished",
    "too few bytes expected": "more bytes arrived than were expected",
    "no wait for a full slot": "not close|unfinished|without having waited|more arrivals|no partition can go on",
    "the wrong phase": "not close|unfinished|more arrivals|the program ends before|no partition can go on",
    "a slot freed before the product's wait": "not close",
    "read before the product's wait": "is read, which has not been waited for",
    "a second arrival": "not close|more arrivals|unfinished|no partition",
}
SHARED_ERRORS = {
    "nobody is told of cp.async": "no partition can go on",
    "no wait for cp.async": "ends before the (arrival of )?cp.async|without fence_async_shared",
    "no fence before a product": "warpgroup_mma reads what .* without fence_async_shared",
}


@pytest.mark.parametrize("run", [run_pipeline, run_through_shared])
@pytest.mark.parametrize("seed", SEEDS)
def test_right_kernels_pass(run: Callable[[str], None], seed: int) -> None:
    with seeded(seed) as launched:
        run("")
    assert len(launched) == 1


@pytest.mark.parametrize(
    ("run", "wrong", "message"),
    [(run_pipeline, *error) for error in PIPELINE_ERRORS.items()]
    + [(run_through_shared, *error) for error in SHARED_ERRORS.items()],
)
def test_wrong_kernels_fail(run: Callable[[str], None], wrong: str, message: str) -> None:
    """Under at least a quarter of the seeds; what the order does not decide under all of them."""
    errors = []
    for seed in SEEDS:
        with seeded(seed):
            try:
                run(wrong)
            except AssertionError as error:
                errors.append(str(error))
    assert len(errors) >= len(SEEDS) / 4
    assert all(re.search(message, error) for error in errors), errors


@gluon.jit
def one_line(x, out, n, CASE: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    other: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    at = gl.arange(0, 128, layout)
    if CASE == "a load past the end":
        gl.store(out + at, gl.load(x + at))
    elif CASE == "what a mask leaves out":
        gl.store(out + at, gl.load(x + at, mask=at < n), mask=at < n + 1)
    elif CASE == "layouts that differ":
        gl.store(out + at, at + gl.arange(0, 128, other))
    elif CASE == "layouts of other warps":
        gl.store(out + at, gl.arange(0, 128, gl.BlockedLayout([1], [32], [2], [0])))
    elif CASE == "a dimension of no slice":
        gl.store(out + at, gl.sum(at[:, None], 1))
    elif CASE == "overflow":
        gl.store(out, (n * 65536) * 65536)
    elif CASE == "an unknown word":
        gl.store(out, gl.histogram(at, 2))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("a load past the end", r"a load outside of `x` \[100\].* 28 of 128 elements"),
        ("layouts that differ", "layouts differ"),
        ("layouts of other warps", "the partition has 4 warps"),
        ("a dimension of no slice", "needs SliceLayout"),
        ("an unknown word", "gluon_emulator has no `histogram`"),
    ],
)
def test_errors_name_the_line(case: str, message: str) -> None:
    with pytest.raises(EmulationError, match=message) as raised:
        one_line[(1,)](torch.ones(100), torch.zeros(128), 100, case)
    assert "test_emulator.py:" in str(raised.value)


def test_numbers_are_the_device_s() -> None:
    out = torch.zeros(128, dtype=torch.int64)
    one_line[(1,)](torch.ones(100), out, 3, "overflow")
    assert out[0] == 0
    out = torch.zeros(128)
    one_line[(1,)](torch.ones(100), out, 100, "what a mask leaves out")
    assert out[:100].eq(1).all()
    assert out[100].isnan()
    assert not out[101:].any()


@gluon.jit
def wait_for_kernel_ahead():
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def let_next_start():
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def write_first(out, WRONG: gl.constexpr):
    if WRONG == "the next one is let in too early":
        let_next_start()
    if WRONG != "nobody waits":
        wait_for_kernel_ahead()
        gl.store(out, 1.0)


@gluon.jit
def write_second(out, WRONG: gl.constexpr):
    if WRONG != "one waits, another one writes" and WRONG != "nobody waits":
        wait_for_kernel_ahead()
    if WRONG != "nobody waits":
        gl.store(out + 1, 1.0)


@gluon.jit
def launched_early(out, WRONG: gl.constexpr):
    if WRONG == "a load before the wait":
        gl.load(out)
    gl.warp_specialize([(write_first, (out, WRONG)), (write_second, (out, WRONG))], [4], [24])


def test_each_partition_waits_for_the_kernel_ahead() -> None:
    out = torch.zeros(2)
    launched_early[(1,)](out, "", num_warps=4, launch_pdl=True)
    assert out.eq(1).all()
    launched_early[(1,)](out, "one waits, another one writes", num_warps=4)  # nothing is launched early


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("a load before the wait", "a load of the program, which has not waited"),
        ("one waits, another one writes", "a store of write_second, which has not waited"),
        ("the next one is let in too early", "launch_dependents of write_first, which has not waited"),
        ("nobody waits", "ends before the kernel ahead"),
    ],
)
def test_a_partition_that_does_not_wait_fails(wrong: str, message: str) -> None:
    with pytest.raises(EmulationError, match=message):
        launched_early[(1,)](torch.zeros(2), wrong, num_warps=4, launch_pdl=True)


@gluon.jit
def arithmetic(x, out, KIND: gl.constexpr):
    value = gl.load(x)
    if KIND == "quotient":
        result = value // 4
    elif KIND == "remainder":
        result = value % 4
    elif KIND == "rounded":
        result = (value + 0.001).to(gl.float32)
    elif KIND == "float8":
        result = value.to(gl.float8e4nv).to(gl.float32)
    elif KIND == "bits":
        result = value.to(gl.uint32, bitcast=True) >> 24
    gl.store(out, result)


@pytest.mark.parametrize(
    ("kind", "dtype", "value", "expected"),
    [
        ("quotient", torch.int32, -7, -1),
        ("remainder", torch.int32, -7, -3),
        ("rounded", torch.bfloat16, 1.0, 1.0),
        ("rounded", torch.float32, 1.0, 1.001),
        ("float8", torch.float32, 1e6, 448.0),
        ("float8", torch.float32, 0.3, 0.3125),
        ("bits", torch.float32, -2.0, 0xC0),
    ],
)
def test_arithmetic(kind: str, dtype: torch.dtype, value: float, expected: float) -> None:
    out = torch.zeros(1, dtype=torch.float64)
    arithmetic[(1,)](torch.tensor([value], dtype=dtype), out, kind)
    assert out.item() == pytest.approx(expected, rel=1e-6)


@gluon.jit
def boxes_as_one(x, out, ROWS_OF_BOX: gl.constexpr):
    """Boxes of 64 columns side by side, read as one tile of 128 columns."""
    box: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    boxes = gl.allocate_shared_memory(gl.bfloat16, [2 * 64 // ROWS_OF_BOX, ROWS_OF_BOX, 64], box)
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    mbarrier.expect(full, 64 * 128 * 2)
    for column in gl.static_range(2):
        for i in gl.static_range(64 // ROWS_OF_BOX):
            place: gl.constexpr = column * (64 // ROWS_OF_BOX) + i
            tma.async_load(x, [i * ROWS_OF_BOX, column * 64], full, boxes.index(place))
    mbarrier.wait(full, 0)
    tile: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    whole = boxes._reinterpret(gl.bfloat16, [64, 128], box).load(tile)
    rows = gl.arange(0, 64, gl.SliceLayout(1, tile))
    columns = gl.arange(0, 128, gl.SliceLayout(0, tile))
    gl.store(out + rows[:, None] * 128 + columns[None, :], whole)


@pytest.mark.parametrize("rows", [8, 64])
def test_views_of_the_same_bytes(rows: int) -> None:
    x, out = torch.randn(64, 128).bfloat16(), torch.zeros(64, 128, dtype=torch.bfloat16)
    box = TensorDescriptor.from_tensor(x, [rows, 64], gl.NVMMASharedLayout(128, 16, rank=2))
    boxes_as_one[(1,)](box, out, rows)
    assert torch.equal(out, x)


def test_the_emulator_has_what_the_kernels_use_and_nothing_else() -> None:
    """A probe of what Gluon has sees the emulator as it sees Gluon."""
    from taut.common_kernels import gluon_features

    assert gluon_features.missing() == []
    used = {module: {name for names in asked for name in names} for module, asked in names_used().items()}
    unused = {f"{module}.{name}" for module, names in EMULATED.items() for name in set(names) - used[module]}
    assert unused == set(), "no kernel uses these"


@aggregates_of(gl, gluon)
class Scaled:
    factor: gl.tensor
    offsets: gl.tensor | None
    ROWS: gl.constexpr


@gluon.jit
def scale_rows(scaled, out, FIRST: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    rows = FIRST + gl.arange(0, scaled.ROWS, layout)
    value = rows * scaled.factor
    if scaled.offsets is not None:
        value += gl.load(scaled.offsets + rows)
    gl.store(out + rows, value)


@gluon.jit
def scaled_by_two_partitions(out, offsets, factor, WRONG: gl.constexpr):
    scaled = Scaled(factor, offsets, ROWS=32)
    if WRONG == "a tensor for a constexpr":
        scaled = Scaled(factor, offsets, factor)
    if WRONG == "a field that there is not":
        scaled.rows = 3
    if WRONG == "set twice":
        scaled.factor = factor
    if WRONG == "a tensor of many numbers for another partition":
        scaled = Scaled(gl.arange(0, 32, gl.BlockedLayout([1], [32], [4], [0])), offsets, ROWS=32)
    gl.warp_specialize([(scale_rows, (scaled, out, 0)), (scale_rows, (scaled, out, 32))], [4], [64])


@pytest.mark.parametrize("factor", [1, 5])
@pytest.mark.parametrize("has_offsets", [True, False])
def test_aggregates_reach_every_partition(factor: int, has_offsets: bool) -> None:
    """A factor that is 1 reaches a kernel as a constant, and is a scalar in the aggregate all the same."""
    out, offsets = torch.zeros(64, dtype=torch.int32), torch.randint(0, 100, (64,), dtype=torch.int32)
    scaled_by_two_partitions[(1,)](out, offsets if has_offsets else None, factor, "")
    assert torch.equal(out, torch.arange(64, dtype=torch.int32) * factor + (offsets if has_offsets else 0))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("a tensor for a constexpr", "the field ROWS is a constexpr"),
        ("a field that there is not", "Scaled has no field rows"),
        ("set twice", "Scaled.factor is set already"),
        ("a tensor of many numbers for another partition", "only scalars reach other warps"),
    ],
)
def test_aggregates_are_checked(wrong: str, message: str) -> None:
    with pytest.raises(EmulationError, match=message):
        scaled_by_two_partitions[(1,)](torch.zeros(64, dtype=torch.int32), None, 5, wrong)
