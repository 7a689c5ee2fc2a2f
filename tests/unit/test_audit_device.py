"""What a profile says: counted in one that is written by hand, as torch's profiler exports it on a GPU."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from taut.audit.device import MARK, observed

if TYPE_CHECKING:
    from pathlib import Path

PROPERTIES = {
    "numSms": 132,
    "regsPerMultiprocessor": 65536,
    "sharedMemPerMultiprocessor": 233472,
    "maxThreadsPerMultiprocessor": 2048,
}


def call(
    name: str, at: float, correlation: int = 0, long: float = 1.0, category: str = "cuda_runtime"
) -> dict[str, Any]:
    return {
        "ph": "X", "cat": category, "name": name, "pid": 1, "tid": 1, "ts": at, "dur": long,
        "args": {"correlation": correlation},
    }  # fmt: skip


def operator(name: str, at: float, long: float) -> dict[str, Any]:
    return {"ph": "X", "cat": "cpu_op", "name": name, "pid": 1, "tid": 1, "ts": at, "dur": long, "args": {}}


def on_device(name: str, correlation: int, category: str, **told: Any) -> dict[str, Any]:
    return {
        "ph": "X", "cat": category, "name": name, "pid": 0, "tid": 7, "ts": 500.0, "dur": 3.5,
        "args": {"correlation": correlation, **told},
    }  # fmt: skip


def mark(scope: str, at: float, long: float) -> dict[str, Any]:
    return {"ph": "X", "cat": "user_annotation", "name": MARK + scope, "pid": 1, "tid": 1, "ts": at, "dur": long}


EVENTS = [
    {"ph": "M", "name": "process_name"},
    mark("layer 0", 10.0, 80.0),
    call("cuLaunchKernelEx", 11.0, 1, category="cuda_driver"),
    on_device("taut_decode", 1, "kernel", grid=[264, 1, 1], block=[128, 1, 1],
              **{"registers per thread": 255, "shared memory": 100_000}),
    operator("aten::zeros", 20.0, 9.0),  # one fill, whatever it is made of
    operator("aten::zero_", 22.0, 6.0),
    operator("aten::fill_", 23.0, 4.0),
    call("cudaLaunchKernel", 24.0, 2),
    on_device("fill", 2, "kernel"),
    call("cudaMemsetAsync", 25.5, 10),  # part of that fill
    on_device("Memset (Device)", 10, "gpu_memset"),
    call("cudaMemsetAsync", 31.0, 3),  # a library's own
    on_device("Memset (Device)", 3, "gpu_memset"),
    operator("aten::copy_", 40.0, 5.0),  # one copy
    call("cudaMemcpyAsync", 41.0, 4),
    on_device("Memcpy DtoD (Device -> Device)", 4, "gpu_memcpy"),
    operator("aten::_to_copy", 50.0, 9.0),  # an upload, and no copy on the device
    operator("aten::copy_", 51.0, 7.0),
    call("cudaMemcpyAsync", 52.0, 5),
    on_device("Memcpy HtoD (Pageable -> Device)", 5, "gpu_memcpy"),
    call("cudaStreamSynchronize", 54.0),
    call("cudaMemcpyAsync", 61.0, 6),
    on_device("Memcpy DtoH (Device -> Pageable)", 6, "gpu_memcpy"),
    call("cudaMemcpyAsync", 71.0, 7),  # a library's own
    on_device("Memcpy DtoD (Device -> Device)", 7, "gpu_memcpy"),
    call("cudaLaunchKernel", 200.0, 8),  # after the mark
    call("cudaStreamSynchronize", 201.0),
    {**call("cudaLaunchKernel", 20.0, 9), "tid": 2},  # another thread's
]  # fmt: skip


def test_what_happened_inside_the_marks_by_kind() -> None:
    found = observed({"traceEvents": EVENTS, "deviceProperties": [PROPERTIES]})
    assert found.counts == {
        "layer 0": {"calls": 1, "launches": 2, "fills": 2, "copies": 2, "h2d": 1, "d2h": 1, "syncs": 1}
    }


def test_kernels_with_their_waves() -> None:
    decode, fill, *_ = observed({"traceEvents": EVENTS, "deviceProperties": [PROPERTIES]}).kernels
    assert (decode.name, decode.scope, decode.microseconds, decode.grid) == (
        "taut_decode",
        "layer 0",
        3.5,
        (264, 1, 1),
    )
    assert (decode.waves, decode.tail) == (1.0, 0.0)  # two blocks fit a multiprocessor, by registers and by memory
    assert (fill.name, fill.waves) == ("fill", None)


def test_what_ran_on_the_device_with_its_kind_and_what_ran_beside_the_backend() -> None:
    later = {**on_device("matmul", 8, "kernel"), "ts": 507.5}
    found = observed({"traceEvents": [*EVENTS, later, {**later, "name": "of the same graph"}]})
    assert [(kernel.name.split()[0], kernel.kind) for kernel in found.kernels] == [
        ("taut_decode", ""),
        ("fill", "fills"),
        ("Memset", "fills"),
        ("Memset", "fills"),
        ("Memcpy", "copies"),
        ("Memcpy", "h2d"),
        ("Memcpy", "d2h"),
        ("Memcpy", "copies"),
    ]
    assert [(kernel.name, kernel.scope, kernel.began) for kernel in found.others] == [
        ("matmul", "", 7.5),
        ("of the same graph", "", 7.5),
    ]
    assert {kernel.began for kernel in found.kernels} == {0.0}


def test_several_marks_of_a_scope_are_added_up() -> None:
    twice = [mark("layer 0", 0.0, 5.0), call("cudaLaunchKernel", 1.0), mark("layer 0", 10.0, 5.0)]
    twice += [call("cudaLaunchKernel", 11.0), call("cudaLaunchKernel", 12.0), mark("layer 1", 20.0, 5.0)]
    found = observed({"traceEvents": twice})
    assert {scope: counts["calls"] for scope, counts in found.counts.items()} == {"layer 0": 2, "layer 1": 1}
    assert found.counts["layer 0"]["launches"] == 3
    assert found.counts["layer 1"].get("launches", 0) == 0


def test_a_real_profile_of_a_cpu_has_the_marks(tmp_path: Path) -> None:
    """Its operators are counted; a CPU has no runtime to call."""
    tensor = torch.ones(4)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        with record_function(MARK + "layer 0"):
            torch.zeros(4).copy_(tensor)
        tensor.zero_()
    path = tmp_path / "profile.json"
    profiled.export_chrome_trace(str(path))
    counts = observed(json.loads(path.read_text())).counts["layer 0"]
    assert {kind: count for kind, count in counts.items() if count} == {"calls": 1, "fills": 1, "copies": 1}
