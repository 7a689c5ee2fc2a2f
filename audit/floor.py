"""What a step must move at least, and what a launch's grid makes of a device. Arithmetic alone: no torch, no engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from taut.audit.records import Layer

MOST_BLOCKS = 32  # that a multiprocessor holds, however small they are
PARTIAL_BYTES = 4  # partial results are kept in float32, each with its log-sum-exp


def floor_bytes(layer: Layer, lengths: Sequence[int], tokens: int) -> int:
    """Bytes that a layer's attention reads and writes at least in one step.

    Every key and value that a row sees is read once, every query is read, every output and every new key and value is
    written. What a row with several queries reads for each of them again is not counted: it need not be.

    Args:
        layer: what it has to work on.
        lengths: of the rows, tokens in the cache, those of this step among them.
        tokens: queries of all rows.
    """
    vector = layer.key_size + (0 if layer.latent else layer.value_size)
    queries = max(1, tokens // max(1, len(lengths)))  # of a row; its window begins with the first of them
    seen = sum(length if layer.left < 0 else min(length, layer.left + queries) for length in lengths)
    cached = seen * layer.kv_heads * vector * layer.cache_bytes
    read_and_written = tokens * layer.q_heads * (layer.key_size + layer.value_size) * layer.query_bytes
    stored = tokens * layer.kv_heads * vector * (layer.query_bytes + layer.cache_bytes)
    return cached + read_and_written + stored


def split_bytes(rows: int, heads: int, splits: int, value_size: int) -> int:
    """Bytes of partial results that are written and read again where every row is cut into `splits` parts."""
    return 0 if splits < 2 else 2 * rows * heads * splits * (value_size + 1) * PARTIAL_BYTES


def blocks_per_multiprocessor(
    threads: int,
    registers: int,
    shared_memory: int,
    *,
    most_threads: int = 2048,
    all_registers: int = 65536,
    all_shared_memory: int = 233472,
) -> int:
    """How many blocks of a kernel one multiprocessor holds at once.

    Args:
        threads: of a block.
        registers: of a thread.
        shared_memory: of a block, bytes; the hardware keeps 1 KiB more of each.
        most_threads: that a multiprocessor holds.
        all_registers: of a multiprocessor.
        all_shared_memory: of a multiprocessor, bytes.
    """
    warps = -(-threads // 32)
    by_threads = most_threads // (warps * 32)
    # A warp's registers are given out in pieces of 256.
    by_registers = all_registers // max(1, warps * -(-registers * 32 // 256) * 256)
    by_memory = all_shared_memory // (shared_memory + 1024)
    return max(1, min(by_threads, by_registers, by_memory, MOST_BLOCKS))


def waves_and_tail(blocks: int, multiprocessors: int, blocks_each: int) -> tuple[float, float]:
    """How often a grid fills a device, and which share of the device stands idle in the last round."""
    at_once = multiprocessors * blocks_each
    waves = blocks / at_once
    last = blocks % at_once
    return waves, (1 - last / at_once if last else 0.0)
