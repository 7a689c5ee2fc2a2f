"""The bytes that a step must move at least, and what a grid makes of a device: arithmetic by hand."""

from __future__ import annotations

import pytest

from taut.audit.floor import blocks_per_multiprocessor, floor_bytes, split_bytes, waves_and_tail
from taut.audit.records import Layer

DENSE = Layer("dense", q_heads=32, kv_heads=8, key_size=128, value_size=128, query_bytes=2, cache_bytes=2)
WINDOWED = Layer("windowed", 32, 8, 128, 128, 2, 2, left=99)
FLOAT8 = Layer("float8", 32, 8, 128, 128, 2, 1)
LATENT = Layer(
    "latent", q_heads=16, kv_heads=1, key_size=576, value_size=512, query_bytes=2, cache_bytes=2, latent=True
)


def test_a_dense_decode_step() -> None:
    cached = (1000 + 24) * 8 * (128 + 128) * 2
    queries_and_outputs = 2 * 32 * (128 + 128) * 2
    new = 2 * 8 * (128 + 128) * (2 + 2)  # read as they come, written to the cache
    assert floor_bytes(DENSE, [1000, 24], 2) == cached + queries_and_outputs + new


def test_a_window_bounds_what_a_row_reads() -> None:
    """The query's own key and the 99 behind it, and one more for each query ahead of the last."""
    difference = floor_bytes(DENSE, [1000, 24], 2) - floor_bytes(WINDOWED, [1000, 24], 2)
    assert difference == (1000 - 100) * 8 * 256 * 2


def test_a_quantised_cache_halves_what_is_read() -> None:
    difference = floor_bytes(DENSE, [1000], 1) - floor_bytes(FLOAT8, [1000], 1)
    assert difference == 1000 * 8 * 256 + 8 * 256


def test_a_latent_vector_is_read_once_for_all_heads_and_is_its_value_too() -> None:
    assert floor_bytes(LATENT, [1000], 1) == 1000 * 576 * 2 + 16 * (576 + 512) * 2 + 576 * 4


def test_partial_results_are_written_and_read() -> None:
    assert split_bytes(rows=3, heads=16, splits=8, value_size=512) == 2 * 3 * 16 * 8 * 513 * 4
    assert split_bytes(3, 16, 1, 512) == 0


@pytest.mark.parametrize(
    ("threads", "registers", "memory", "expected"),
    [
        (128, 32, 0, 16),  # by threads: 2048 of 128, and by registers as many
        (128, 255, 0, 2),  # 4 warps of 255 x 32 registers, rounded to 8192: two blocks of 32768 each
        (128, 32, 100 * 1024, 2),  # 228 KiB of 101 each
        (32, 16, 0, 32),  # no more blocks than that
        (1024, 255, 200 * 1024, 1),  # one at least, or it would not have run
    ],
)
def test_blocks_of_a_multiprocessor(threads: int, registers: int, memory: int, expected: int) -> None:
    assert blocks_per_multiprocessor(threads, registers, memory) == expected


def test_waves_and_tail() -> None:
    assert waves_and_tail(264, 132, 1) == (2.0, 0.0)
    assert waves_and_tail(66, 132, 1) == (0.5, 0.5)
    waves, tail = waves_and_tail(132 * 2 + 33, 132, 2)
    assert waves == pytest.approx(1.125)
    assert tail == pytest.approx(0.875)
