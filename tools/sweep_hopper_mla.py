"""Try the numbers of the tiles of Hopper's `mla_decode` one by one, beside the portable kernel; needs a Hopper GPU.

    .venv/bin/python tools/sweep_hopper_mla.py            # every shape
    .venv/bin/python tools/sweep_hopper_mla.py 128 16     # of these numbers of heads

For each shape a line with today's tile, and one for each tile that differs in one number. An error beyond 2 % is called
WRONG, and so is what does not run.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from taut.benchmarks.kernels import ours
from taut.benchmarks.operations import operation_named
from taut.benchmarks.tasks import MlaDecode, relative_error
from taut.benchmarks.timing import microseconds, need_gpu
from taut.common_kernels.mla_decode.triton_kernel import mla_tile
from taut.common_kernels.providers import registry
from taut.common_kernels.tiles import Tile, TileTable, table_for
from taut.common_kernels.workspace import device_facts

TABLE = "hopper_mla_decode"
SHAPES = [
    {"heads": heads, "rows": rows, "context": context, "page": page, "float8": float8}
    for heads in (128, 64, 32, 16, 8)
    for rows, context in ((1, 4096), (1, 131072), (8, 8192), (32, 4096), (128, 4096))
    for page, float8 in ((64, 0), (1, 0), (64, 1))
]
VALUES = {
    "registers": (208, 216, 224, 232, 240),
    "gather_registers": (168, 184, 200, 208, 216, 224),
    "stages": (2, 3),
    "share": (1, 2, 4),
    "spare": (0, 2, 4, 8),
}


def say(line: str) -> None:
    """One line, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def neighbours(tile: Tile, boxed: bool) -> list[Tile]:
    """The tile itself, and those that differ from it in one number which this way of bringing keys reads."""
    unread = "gather_registers" if boxed else "registers"
    names = [name for name in VALUES if name != unread and not (name == "stages" and tile["rows"] == 64)]
    return [tile, *(tile | {name: value} for name in names for value in VALUES[name] if value != tile[name])]


def write(table: TileTable, tile: Tile, path: Path) -> None:
    """A table in which every problem has this tile."""
    whole = asdict(table)
    del whole["name"]
    whole["operations"] = {name: list(entries) for name, entries in whole["operations"].items()}
    whole["operations"][TABLE] = [{"when": {}, "tile": tile}]
    path.write_text(json.dumps(whole))


def sweep(shape: dict[str, int], folder: Path) -> None:
    """Time one shape under every tile."""
    facts = device_facts("cuda:0")
    table = table_for(facts.target, facts.shared_memory)
    task = MlaDecode(operation_named("mla_decode").axes | shape, "cuda:0")
    right = task.result(task.call(registry().choose(task.problem, "reference").provider.kernels))
    say(f"{shape}: portable {microseconds(ours(task, 'triton', None)):.1f} us")
    cached = 1 if shape["float8"] else 2
    today = mla_tile(table, shape["heads"], 512, cached, 1, TABLE).tile
    for tile in neighbours(today, shape["page"] % 64 == 0 and not shape["float8"]):
        path = folder / "tiles.json"
        write(table, tile, path)
        changed = {name: value for name, value in tile.items() if value != today[name]} or "today's"
        try:
            call = ours(task, "hopper", str(path))
            error = relative_error(task.result(call), right)
            told = f"{microseconds(call):8.1f} us" if error < 0.02 else f"   WRONG {error:.3g}"
        except Exception as failed:  # one that does not compile or fit must not end the sweep
            told = f"   {type(failed).__name__}: {str(failed).splitlines()[0][:100]}"
        say(f"  {changed!s:28} {told}")


if __name__ == "__main__":
    need_gpu("this sweep")
    wanted = [int(heads) for heads in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as place:
        for one in SHAPES:
            if not wanted or one["heads"] in wanted:
                sweep(one, Path(place))
