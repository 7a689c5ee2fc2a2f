"""Everything that is published, as calls of `taut bench`: all operations, and both shapes in each installed engine.

Each call is a process of its own, so that none finds the GPU's memory as another one left it.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from taut.benchmarks import BenchmarkError
from taut.benchmarks.results import OURS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# By engine and model, the backends of the engine's own that ours is shown beside; on an H100 or H200 all of them run.
BACKENDS: dict[str, dict[str, tuple[str, ...]]] = {
    "vllm": {"llama": ("FLASH_ATTN", "TRITON_ATTN"), "deepseek": ("FLASH_ATTN_MLA", "FLASHMLA", "TRITON_MLA")},
    "sglang": {"llama": ("triton",), "deepseek": ("triton",)},
}
KERNELS = "kernels"
TAUT = "from taut.cli.main import run; run()"


@dataclass(frozen=True)
class Part:
    """One call of `taut bench`.

    Args:
        name: of what is measured, and of the file that keeps it.
        arguments: after `taut bench`, all but the file.
    """

    name: str
    arguments: tuple[str, ...]

    def file(self, folder: Path) -> Path:
        """Where its results are kept."""
        return folder / f"{self.name}.json"

    def call(self, folder: Path) -> tuple[str, ...]:
        """Its arguments after `taut`."""
        return ("bench", *self.arguments, "-o", str(self.file(folder)))


def parts(engines: Sequence[str], runs: int, rounds: int) -> list[Part]:
    """What is to be measured: engines first, whose order of backends is that of the tables.

    Args:
        engines: names of engines; none for all that are installed here.
        runs: of each load in each process.
        rounds: processes of each backend.

    Raises:
        BenchmarkError: an engine is unknown, or was asked for and is not installed.
    """
    unknown = [name for name in engines if name not in BACKENDS]
    if unknown:
        raise BenchmarkError(f"{unknown[0]} is no engine that can be measured: there are {', '.join(BACKENDS)}")
    missing = [name for name in engines if find_spec(name) is None]
    if missing:
        raise BenchmarkError(f"{missing[0]} is not installed here: run this in its environment, beside taut")
    here = engines or [name for name in BACKENDS if find_spec(name) is not None]
    often = ("--runs", str(runs), "--rounds", str(rounds))
    of_engines = [
        Part(f"{engine}_{model}", ("engines", engine, model, *backends, OURS, *often))
        for engine in dict.fromkeys(here)
        for model, backends in BACKENDS[engine].items()
    ]
    return [*of_engines, Part(KERNELS, ("kernels",))]


def measure(part: Part, folder: Path) -> int:
    """Measure one part; its tables and its progress go where ours go.

    Returns:
        The exit status of `taut bench`.
    """
    process = subprocess.Popen([sys.executable, "-c", TAUT, *part.call(folder)])
    try:
        return process.wait()
    except BaseException:
        # It ends its own processes. From a terminal it has been interrupted too, and is not interrupted twice.
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.wait()
        raise
