"""The operations that are measured: their shapes, their grids, and the bytes and products that each shape needs.

A shape is numbers by name: `{"heads": 128, "rows": 1, "context": 4096, ...}`. A grid is written as it is said:

    heads=16,128 rows=1,8,64 context=1k..128k

where `k` is 1024, `a..b` doubles from a to b, and what is not named has its usual value. Pure: no torch, no GPU.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING

from taut.benchmarks import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

Shape = dict[str, int]

LATENT, ROPE = 512, 64  # of DeepSeek's latent attention
MOST_ROWS = 1000  # of one grid; more is a slip


@dataclass(frozen=True)
class Operation:
    """An operation that can be measured.

    Args:
        name: what the command calls it.
        axes: the names of a shape's numbers and their usual values, in the order in which they are shown.
        usual: the grid when none is given; of each shape what differs from `axes`.
        traffic: bytes that must move; each cache byte, query and output counted once. None: there is no such floor.
        work: multiplications and additions that the mathematics needs.
        wrong: what is wrong with a shape, a sentence; "" if nothing is.
    """

    name: str
    axes: Mapping[str, int]
    usual: Sequence[Mapping[str, int]]
    traffic: Callable[[Shape], int] | None
    work: Callable[[Shape], int] = field(default=lambda _: 0)
    wrong: Callable[[Shape], str] = field(default=lambda _: "")

    def shape(self, different: Mapping[str, int]) -> Shape:
        """A whole shape from what differs.

        Raises:
            BenchmarkError: a name or a number is wrong.
        """
        unknown = next((name for name in different if name not in self.axes), None)
        if unknown is not None:
            near = difflib.get_close_matches(unknown, self.axes, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise BenchmarkError(f"{self.name} has no axis {unknown}: {hint}There are {', '.join(self.axes)}")
        whole = {**self.axes, **different}
        low = next((name for name, number in whole.items() if number < 1 and name != "float8"), None)
        says = f"{low} must be at least 1" if low else self.wrong(whole)
        if whole.get("float8", 0) > 1:
            says = "float8 is 1 for a cache of float8 e4m3, or 0"
        if says:
            raise BenchmarkError(f"{self.name} {describe(different)}: {says}")
        return whole

    def shapes(self, grid: str = "") -> list[Shape]:
        """The shapes of a grid, or the usual ones.

        Raises:
            BenchmarkError: the grid is not written as above, or holds no shape that can be.
        """
        if not grid.strip():
            return [self.shape(different) for different in self.usual]
        axes = parse_grid(grid)
        count = math.prod(map(len, axes.values()))
        if count > MOST_ROWS:
            raise BenchmarkError(f"{self.name}: {grid} has {count} rows; take fewer values ({MOST_ROWS} at most)")
        return [self.shape(dict(zip(axes, numbers, strict=True))) for numbers in product(*axes.values())]


def parse_grid(text: str) -> dict[str, list[int]]:
    """`heads=16,128 context=1k..4k` -> {"heads": [16, 128], "context": [1024, 2048, 4096]}.

    Raises:
        BenchmarkError: it is not written so.
    """
    axes: dict[str, list[int]] = {}
    for word in text.split():
        name, equals, numbers = word.partition("=")
        if not equals or not name or not numbers:
            raise BenchmarkError(f"{word} is no axis of a grid: write NAME=NUMBERS, as in context=1k,4k or rows=1..64")
        if name in axes:
            raise BenchmarkError(f"{name} stands twice in the grid: write its numbers side by side, {name}=1,2")
        axes[name] = list(dict.fromkeys(number for part in numbers.split(",") for number in _range(part, word)))
    return axes


def _range(text: str, word: str) -> list[int]:
    first, dots, last = text.partition("..")
    low, high = _number(first, word), _number(last if dots else first, word)
    if low > high or (dots and low < 1):
        raise BenchmarkError(f"{text} in {word}: a range doubles from a number above 0 to one that is no less")
    numbers = [low]
    while numbers[-1] * 2 <= high and dots:
        numbers.append(numbers[-1] * 2)
    return numbers


def _number(text: str, word: str) -> int:
    found = re.fullmatch(r"(\d+)(k?)", text.strip().lower())
    if not found:
        raise BenchmarkError(f"{text or 'nothing'} in {word} is no number: write 4096 or 4k, and 1k..64k for a range")
    return int(found[1]) * (1024 if found[2] else 1)


def describe(shape: Mapping[str, int]) -> str:
    """A shape as a grid would have it."""
    return " ".join(f"{name}={number}" for name, number in shape.items())


# What each operation needs. Elements of two bytes, or of one where a cache is quantised.


def _cached(shape: Shape) -> int:
    return 1 if shape["float8"] else 2


def _mla_traffic(s: Shape) -> int:
    pages = -(-s["context"] // s["page"]) * s["page"]
    queries = s["rows"] * s["queries"] * s["heads"]
    return _cached(s) * s["rows"] * pages * (LATENT + ROPE) + 2 * queries * (2 * LATENT + ROPE)


def _seen(s: Shape) -> int:
    """Keys that all queries of a row see, causally."""
    return s["queries"] * s["context"] - s["queries"] * (s["queries"] - 1) // 2


def _mla_work(s: Shape) -> int:
    return 2 * s["rows"] * s["heads"] * _seen(s) * (2 * LATENT + ROPE)


def _dense_traffic(s: Shape) -> int:
    page = s.get("page", 1)
    slots = s["rows"] * -(-s["context"] // page) * page
    both = s["key"] + s["value"]
    cached = _cached(s) if "float8" in s else 2
    return cached * slots * s["kv_heads"] * both + 2 * s["rows"] * s["queries"] * s["q_heads"] * both


def _dense_work(s: Shape) -> int:
    return 2 * s["rows"] * s["q_heads"] * _seen(s) * (s["key"] + s["value"])


def _dense_wrong(s: Shape) -> str:
    if s["q_heads"] % s["kv_heads"]:
        return f"{s['q_heads']} query heads cannot share {s['kv_heads']} key-value heads evenly"
    return _queries_wrong(s)


def _queries_wrong(s: Shape) -> str:
    return f"{s['queries']} new tokens are more than the context" if s["queries"] > s["context"] else ""


def _store_traffic(s: Shape) -> int:
    elements = s["tokens"] * s["kv_heads"] * (s["key"] + s["value"])
    return (2 + _cached(s)) * elements + 8 * s["tokens"]


def _store_mla_traffic(s: Shape) -> int:
    return (2 + _cached(s)) * s["tokens"] * (LATENT + ROPE) + 8 * s["tokens"]


def _merge_traffic(s: Shape) -> int:
    rows = s["tokens"] * s["heads"]
    return 2 * (s["parts"] + 1) * rows * s["value"] + 4 * (s["parts"] + 1) * rows


def _rows(names: str, *rows: tuple[int, ...]) -> list[dict[str, int]]:
    return [dict(zip(names.split(), row, strict=True)) for row in rows]


_DENSE = {"q_heads": 32, "kv_heads": 8, "key": 128, "value": 128, "rows": 1, "context": 4096}

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        Operation(
            "mla_decode",
            {"heads": 128, "rows": 1, "context": 4096, "queries": 1, "page": 64, "float8": 0},
            _rows(
                "heads rows context",
                (128, 1, 4096), (128, 1, 32768), (128, 1, 131072), (128, 8, 8192), (128, 32, 4096), (128, 64, 4096),
                (128, 128, 4096), (16, 1, 1024), (16, 1, 8192), (16, 1, 131072), (16, 32, 8192), (16, 128, 4096),
            ),
            _mla_traffic,
            _mla_work,
            _queries_wrong,
        ),
        Operation(
            "paged_decode",
            {**_DENSE, "queries": 1, "page": 16, "float8": 0},
            _rows(
                "q_heads rows context",
                (32, 1, 1024), (32, 1, 32768), (32, 1, 131072), (32, 8, 8192), (32, 64, 4096), (32, 256, 1024),
                (64, 32, 8192),
            ),
            _dense_traffic,
            _dense_work,
            _dense_wrong,
        ),
        Operation(
            "paged_extend",
            {**_DENSE, "queries": 4096, "page": 16, "float8": 0},
            _rows(
                "key value rows context queries page",
                (128, 128, 1, 8192, 8192, 16), (128, 128, 1, 8192, 8192, 64), (128, 128, 1, 8192, 8192, 1),
                (128, 128, 4, 4096, 4096, 16), (128, 128, 1, 16384, 2048, 16), (64, 64, 1, 8192, 8192, 16),
                (64, 64, 1, 8192, 2048, 16), (64, 64, 1, 30000, 5424, 16), (64, 64, 1, 30000, 8192, 16),
            ),
            _dense_traffic,
            _dense_work,
            _dense_wrong,
        ),
        Operation(
            "ragged_prefill",
            {**_DENSE, "queries": 4096},
            _rows(
                "q_heads kv_heads key rows context queries",
                (32, 8, 128, 1, 8192, 8192), (32, 8, 128, 1, 16384, 2048), (128, 128, 192, 1, 4096, 4096),
                (16, 16, 192, 4, 8192, 8192),
            ),
            _dense_traffic,
            _dense_work,
            _dense_wrong,
        ),
        Operation(
            "store_kv",
            {"tokens": 64, "kv_heads": 8, "key": 128, "value": 128, "page": 16, "float8": 0},
            _rows("tokens", (1,), (64,), (256,), (8192,)),
            _store_traffic,
        ),
        Operation(
            "store_mla_kv",
            {"tokens": 64, "page": 64, "float8": 0},
            _rows("tokens", (1,), (64,), (256,), (8192,)),
            _store_mla_traffic,
        ),
        Operation(
            "merge",
            {"parts": 2, "tokens": 4096, "heads": 128, "value": 128},
            _rows("parts tokens heads", (2, 64, 128), (2, 4096, 128), (2, 8192, 16), (8, 4096, 32)),
            _merge_traffic,
        ),
        Operation(
            "schedule",
            {"heads": 128, "rows": 64, "context": 1024},
            _rows("heads rows", (128, 1), (128, 64), (128, 256), (16, 256), (16, 1024)),
            None,
        ),
    )
}  # fmt: skip


def operation_named(name: str) -> Operation:
    """An operation by its name.

    Raises:
        BenchmarkError: there is none of this name.
    """
    if name in OPERATIONS:
        return OPERATIONS[name]
    near = difflib.get_close_matches(name, OPERATIONS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise BenchmarkError(f"{name} is no operation that can be measured: {hint}There are {', '.join(OPERATIONS)}")


def floor_us(traffic: int, work: int, bytes_per_second: float, flops_per_second: float) -> float | None:
    """The least time that the hardware needs, in microseconds; None where nothing must move."""
    if not traffic and not work:
        return None
    return 1e6 * max(traffic / bytes_per_second, work / flops_per_second)
