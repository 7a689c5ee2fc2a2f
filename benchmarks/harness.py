"""What all benchmarks share: timing, ceilings, floors, and how a table is printed and kept.

Every function is timed as an engine runs it, replayed from a CUDA graph, after a warm-up; the median counts. A floor is
the least time that the hardware needs: the larger of the bytes over the measured bandwidth and of the products over the
measured rate of the tensor cores. Both ceilings are measured in the same process.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

RESULTS = Path(__file__).parent / "results"


@dataclass
class Row:
    """One line of a benchmark.

    Args:
        shape: what was run, by name.
        bytes: each cache byte, query and output counted once.
        flops: multiplications and additions that the mathematics needs.
        ours: microseconds.
        peers: microseconds of each.
        errors: relative error of each peer, and of ours, against `against`.
        against: what the errors are held against.
    """

    shape: dict[str, int]
    bytes: int
    flops: int
    ours: float
    peers: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    against: str = ""


@dataclass
class Ceilings:
    """What the device was measured to do.

    Args:
        bytes_per_second: of a large copy, bytes read plus bytes written.
        flops_per_second: of a large bfloat16 matrix product.
    """

    bytes_per_second: float
    flops_per_second: float

    def floor(self, row: Row) -> float:
        """The least time of a row, in microseconds."""
        return 1e6 * max(row.bytes / self.bytes_per_second, row.flops / self.flops_per_second)


def microseconds(function: Callable[[], object]) -> float:
    """Median time of one call in microseconds, replayed from a CUDA graph."""
    from triton.testing import do_bench_cudagraph

    torch.cuda.synchronize()  # it works on a stream of its own, which does not wait for the inputs
    return float(do_bench_cudagraph(function, rep=20, return_mode="median")) * 1e3


def measure_ceilings() -> Ceilings:
    """Two GiB read and written by a kernel, and a product of two 8192 x 8192 matrices of random numbers."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    copy = microseconds(lambda: torch.neg(source, out=target))
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    product = microseconds(lambda: a @ b)
    return Ceilings(2e6 * source.nbytes / copy, 2e6 * 8192**3 / product)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected|."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def peers_are_here() -> bool:
    """Whether vLLM can be imported, whose kernels the peers are; says so where it cannot."""
    try:
        import vllm  # noqa: F401
    except ImportError:
        print("no vLLM here: the peers are left out")
        return False
    return True


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    found = {name: importlib.metadata.version(name) for name in ("torch", "triton", "vllm") if _installed(name)}
    return found | {
        "gpu": torch.cuda.get_device_name(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def _installed(name: str) -> bool:
    return bool(list(importlib.metadata.distributions(name=name)))


def report(name: str, rows: list[Row], ceilings: Ceilings, extra: dict[str, float], folder: Path = RESULTS) -> None:
    """Print a table and keep everything as `folder`/`name`.json."""
    from rich.console import Console
    from rich.table import Table

    about = versions()
    peers = list(dict.fromkeys(peer for row in rows for peer in row.peers))
    table = Table(
        title=f"{name}: {about['gpu']}, {ceilings.bytes_per_second / 1e12:.2f} TB/s, "
        f"{ceilings.flops_per_second / 1e12:.0f} TFLOP/s"
    )
    for heading in [*rows[0].shape, *(f"{peer} us" for peer in peers), "taut us", "to best", "TB/s", "TF", "of floor"]:
        table.add_column(heading, justify="right")
    for row in rows:
        best = min(row.peers.values(), default=math.nan)
        table.add_row(
            *(str(number) for number in row.shape.values()),
            *(f"{row.peers[peer]:.1f}" if peer in row.peers else "-" for peer in peers),
            f"{row.ours:.1f}",
            f"{row.ours / best:.2f}",
            f"{row.bytes / row.ours / 1e6:.2f}",
            f"{row.flops / row.ours / 1e6:.0f}",
            f"{ceilings.floor(row) / row.ours:.2f}",
        )
    console = Console(width=160)
    console.print(table)
    for what, number in extra.items():
        console.print(f"{what}: {number:.2f}")
    folder.mkdir(parents=True, exist_ok=True)
    kept = {
        "about": about,
        "ceilings": asdict(ceilings),
        "extra": extra,
        "rows": [asdict(row) | {"floor": ceilings.floor(row)} for row in rows],
    }
    (folder / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")
