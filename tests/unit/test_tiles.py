"""Tile tables: the look-up, and that every built-in table answers whatever an operation may ask."""

from __future__ import annotations

import json
from itertools import product
from typing import TYPE_CHECKING

import pytest

from taut.common_kernels.tiles import TileError, built_in_tables, choose_table, read_table, table_for

if TYPE_CHECKING:
    from pathlib import Path

    from taut.common_kernels.tiles import TileTable

# Shared memory that one program may use, by target.
GPUS = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_103": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
    "gfx950": 163_840,
}


@pytest.mark.parametrize("target", GPUS)
def test_every_gpu_has_a_table_that_fits(target: str) -> None:
    table = table_for(target, GPUS[target])
    assert table.shared_memory <= GPUS[target]
    assert table.vendor == ("amd" if target.startswith("gfx") else "nvidia")


def test_the_table_made_for_a_target_comes_first() -> None:
    assert "sm_90" in table_for("sm_90", 232_448).targets
    assert not table_for("sm_100", 232_448).targets


@pytest.mark.parametrize("table", built_in_tables(), ids=lambda table: table.name)
def test_every_problem_finds_a_tile(table: TileTable) -> None:
    for rows, rank, cache_bytes in product((1, 16, 17, 32, 33, 64, 128), (128, 256, 512), (1, 2)):
        tile = table.tile("mla_decode", {"rows": rows, "rank": rank, "cache_bytes": cache_bytes})
        assert set(tile) - {"spread"} == {
            "keys",
            "rows",
            "transposed",
            "warps",
            "stages",
            "programs",
            "share",
            "spare",
            "apart",
        }


def test_no_table_fits() -> None:
    with pytest.raises(TileError, match="no tile table fits sm_75 with 65536 bytes"):
        choose_table(built_in_tables(), "sm_75", 65_536)


def write(path: Path, entries: list[object]) -> str:
    table = {"about": "", "vendor": "nvidia", "targets": [], "shared_memory": 1, "operations": {"merge": entries}}
    path.write_text(json.dumps(table))
    return str(path)


def test_the_first_entry_that_serves(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.json",
        [{"when": {"rows": [1, 16]}, "tile": {"keys": 1}}, {"when": {"rows": [17, 64]}, "tile": {"keys": 2}}],
    )
    table = table_for("sm_90", 232_448, path)
    assert [table.tile("merge", {"rows": rows})["keys"] for rows in (1, 16, 17, 64)] == [1, 1, 2, 2]
    with pytest.raises(TileError, match=r"mine.json has no entry of merge for {'rows': 65}"):
        table.tile("merge", {"rows": 65})
    with pytest.raises(TileError, match="merge knows no 'rows'; it knows rank"):
        table.tile("merge", {"rank": 1})
    with pytest.raises(TileError, match="has no entry of store_kv"):
        table.tile("store_kv", {})


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"operations": {"merge": [{"when": {"rows": 3}}]}}'])
def test_what_is_not_a_table(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(TileError, match=r"broken.json is not a tile table"):
        read_table(path)


def test_a_missing_file() -> None:
    with pytest.raises(TileError, match="is not a tile table: FileNotFoundError"):
        table_for("sm_90", 232_448, "/nowhere/table.json")
