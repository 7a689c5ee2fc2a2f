"""`taut bench` and `taut tune` on a GPU, small: every operation measured, and a table that is taken."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import torch

from taut.benchmarks.operations import OPERATIONS
from taut.benchmarks.results import KernelResults, read
from taut.common_kernels.tiles import read_table

if TYPE_CHECKING:
    from pathlib import Path

GRIDS = {
    "mla_decode": "heads=16,128 rows=2 context=2k queries=1,2",
    "paged_decode": "rows=3 context=2k float8=0,1",
    "paged_extend": "rows=2 context=2k queries=300",
    "ragged_prefill": "rows=2 context=1k queries=300",
    "store_kv": "tokens=33 float8=0,1",
    "store_mla_kv": "tokens=33 float8=0,1",
    "merge": "parts=2,5 tokens=100",
    "schedule": "rows=9",
}


def taut(*arguments: str, folder: Path) -> str:
    command = [sys.executable, "-c", "from taut.cli.main import run; run()", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def on_hopper() -> bool:
    """Whether the provider `hopper` is chosen by itself."""
    return torch.cuda.get_device_capability() == (9, 0)


def test_every_operation_is_measured(tmp_path: Path) -> None:
    for name, grid in GRIDS.items():
        taut("bench", "kernels", name, "--grid", grid, "-o", f"{name}.json", folder=tmp_path)
        results = read(tmp_path / f"{name}.json")
        assert isinstance(results, KernelResults)
        assert len(results.rows) == len(OPERATIONS[name].shapes(grid))
        for row in results.rows:
            assert 0 < row.us["taut"] < 1e5, row.left_out
            assert all(error < 2e-2 for error in row.errors.values()), row.errors
            floor = results.floor(row)
            assert floor is None or floor < 2 * row.us["taut"]


def test_a_table_is_tuned_and_taken(tmp_path: Path) -> None:
    arguments = ["llama", "deepseek", "--decode", "rows=1,8 context=4k", "--prefill", "rows=1 context=2k queries=2k"]
    told = json.loads(taut("tune", *arguments, "--most", "12", "-o", "it.json", "--json", folder=tmp_path))
    assert {one["provider"] for one in told["questions"]} == {"hopper" if on_hopper() else "triton"}
    assert all(one["counts"]["timed"] >= 1 for one in told["questions"])
    assert all(one["gain"] >= 0.99 for one in told["questions"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["it.json"]
    table = read_table(tmp_path / "it.json")
    for one in told["questions"]:
        assert table.tile(one["operation"], one["facts"]) == one["after"]["tile"]
    grid = "heads=128 rows=8 context=4k"
    taut("bench", "kernels", "mla_decode", "--grid", grid, "--table", "it.json", "--no-peers", folder=tmp_path)
