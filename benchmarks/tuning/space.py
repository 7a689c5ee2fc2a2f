"""The tiles that can be chosen for each operation of a table. What their numbers mean is said by its kernel."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from taut.common_kernels.tiles import Tile


@dataclass(frozen=True)
class Space:
    """The tiles of one operation.

    Args:
        axes: the values of each number of a tile, in order.
        coupled: numbers that are changed together too, since they trade one resource.
        possible: whether a tile makes sense at all for what is given, see `Tuned.given`.
        unread: numbers that the kernel does not look at, by the tile and what is given: they are left as they are.
    """

    axes: Mapping[str, tuple[int, ...]]
    coupled: tuple[tuple[str, ...], ...]
    possible: Callable[[Tile, Mapping[str, int]], bool]
    unread: Callable[[Tile, Mapping[str, int]], tuple[str, ...]] = lambda _tile, _given: ()

    def whole(self, tile: Tile) -> Tile:
        """A table's tile with what it may leave out."""
        usual = {"cut": tile.get("keys", 0), "spread": 0}
        return {name: usual[name] for name in self.axes if name not in tile} | tile

    @property
    def changes(self) -> tuple[tuple[str, ...], ...]:
        """The numbers that are changed together: each by itself, then those that are coupled."""
        return (*((axis,) for axis in self.axes), *self.coupled)

    def changed(self, tile: Tile, names: Sequence[str], given: Mapping[str, int]) -> list[Tile]:
        """The tiles that differ in all of these numbers and in nothing else; only possible ones."""
        changes = [dict(zip(names, values, strict=True)) for values in product(*(self.axes[name] for name in names))]
        found = [tile | change for change in changes if all(tile[name] != change[name] for name in names)]
        return [one for one in found if self.possible(one, given) and not {*names} & {*self.unread(one, given)}]


def _filled(rows: int, least: int) -> int:
    """The rows of the largest tile that so many rows fill more than half of, or of the least one that there is."""
    return max(least, 1 << (rows - 1).bit_length())


def _mla_possible(tile: Tile, given: Mapping[str, int]) -> bool:
    if tile["rows"] > _filled(given["rows"], 16) or (tile["transposed"] and tile["spread"]):
        return False
    return tile["keys"] * tile["rows"] >= 32 * tile["warps"]  # a warp without a part of the scores


def _decode_possible(tile: Tile, given: Mapping[str, int]) -> bool:
    return tile["keys"] % tile["cut"] == 0 and tile["rows"] <= _filled(given["rows"], 16)


def _prefill_possible(tile: Tile, given: Mapping[str, int]) -> bool:
    return tile["pack"] <= given["rows"] and tile["rows"] >= 16 * tile["warps"] // 2


def _cut_unread(tile: Tile, given: Mapping[str, int]) -> tuple[str, ...]:
    """Where pages hold whole tiles, the schedule's tile is the kernel's, and no share of up to two halves is less."""
    if not given["page"] or given["page"] % tile["keys"]:
        return ()
    return ("cut", "share") if tile["cut"] < tile["keys"] else ("cut",)


# The kernels of `hopper`. A number of registers is for whom a page size has bring the keys: the copy engine or threads.

HOPPER_MEMORY, HOPPER_RESERVED = 233_472, 1024  # bytes of shared memory of a multiprocessor, and of them a program's


def _hopper_rows_possible(tile: Tile, given: Mapping[str, int]) -> bool:
    most = min(64, _filled(given["rows"], 8))
    return tile["rows"] in (most, most // 2)  # fewer read the same keys more often still


def _hopper_mla_unread(_tile: Tile, given: Mapping[str, int]) -> tuple[str, ...]:
    boxed = given["page"] % 64 == 0 and given["cache_bytes"] == 2
    return ("gather_registers",) if boxed else ("registers",)


def _hopper_decode_possible(tile: Tile, given: Mapping[str, int]) -> bool:
    # A part must not begin amid a box, and boxes are pages of up to half a tile. Tables are not asked with the page.
    if tile["cut"] not in (tile["keys"], tile["keys"] // 2) or not _hopper_rows_possible(tile, given):
        return False
    return _hopper_fits(tile, given, tile["rows"] * tile["keys"] * given["element_bytes"], tile["programs"])


def _hopper_prefill_possible(tile: Tile, given: Mapping[str, int]) -> bool:
    # Three warpgroups attend only with heads of 64, and each of their threads needs 160 registers.
    if tile["rows"] == 192 and (given["key_bytes"] > 256 or tile["load_registers"] > 32):
        return False
    return tile["pack"] <= _filled(given["rows"], 1) and _hopper_fits(tile, given)


def _hopper_fits(tile: Tile, given: Mapping[str, int], weights: int = 0, programs: int = 1) -> bool:
    """Whether programs with ring, queries and weights share a multiprocessor; what they need exactly is compiled."""
    needs = weights + tile["stages"] * tile["keys"] * given["key_bytes"] + tile["rows"] * given["key_bytes"] // 2
    return programs * (needs + HOPPER_RESERVED) <= HOPPER_MEMORY


def _hopper_paged_unread(tile: Tile, given: Mapping[str, int]) -> tuple[str, ...]:
    page, keys = given["page"], tile["keys"]
    boxed = page % keys == 0 or (page >= 16 and keys % page == 0)
    return ("gather_registers",) if boxed else ("load_registers",)


def _hopper_prefill_unread(tile: Tile, given: Mapping[str, int]) -> tuple[str, ...]:
    unread = _hopper_paged_unread(tile, given)
    return (*unread, "rows") if "load_registers" in unread else unread


SPACES: dict[str, Space] = {
    "mla_decode": Space(
        {
            "keys": (16, 32, 64, 128), "rows": (16, 32, 64), "transposed": (0, 1), "warps": (4, 8),
            "stages": (1, 2, 3, 4), "programs": (1, 2), "share": (1, 2), "spare": (1, 2, 4, 8), "apart": (0, 1),
            "spread": (0, 1),
        },
        (("keys", "stages"), ("warps", "programs"), ("rows", "warps")),
        _mla_possible,
    ),
    "paged_decode": Space(
        {
            "rows": (16, 32, 64), "keys": (32, 64, 128), "cut": (16, 32, 64, 128), "warps": (2, 4, 8),
            "stages": (2, 3, 4, 5), "programs": (1, 2, 3, 4), "share": (1, 2), "spare": (2, 4, 8),
        },
        (("keys", "stages"), ("keys", "cut"), ("warps", "programs")),
        _decode_possible,
        _cut_unread,
    ),
    "paged_prefill": Space(
        {
            "rows": (64, 128), "keys": (32, 64, 128), "pack": (1, 2, 4, 8), "warps": (4, 8), "stages": (1, 2, 3, 4),
        },
        (("keys", "stages"), ("rows", "warps")),
        _prefill_possible,
    ),
    # Always 64 keys, two slots and one program: more do not fit.
    "hopper_mla_decode": Space(
        {
            "rows": (8, 16, 32, 64), "registers": (208, 216, 224, 232, 240),
            "gather_registers": (168, 184, 200, 208, 216, 224), "share": (1, 2, 4), "spare": (0, 2, 4, 8),
        },
        (("rows", "registers"), ("rows", "gather_registers"), ("share", "spare")),
        _hopper_rows_possible,
        _hopper_mla_unread,
    ),
    # Not three programs: 85 registers a thread are handed out as 88, of which the multiprocessor has too few for three.
    "hopper_paged_decode": Space(
        {
            "rows": (8, 16, 32, 64), "keys": (64, 128), "cut": (32, 64, 128), "stages": (2, 3, 4, 5, 6, 8),
            "programs": (1, 2, 4), "share": (1, 2), "spare": (2, 4, 8), "load_registers": (24, 40, 56, 72),
            "gather_registers": (24, 40, 56, 72),
        },
        (("keys", "stages"), ("keys", "cut"), ("keys", "cut", "stages"), ("stages", "programs")),
        _hopper_decode_possible,
        lambda tile, given: _cut_unread(tile, given) + _hopper_paged_unread(tile, given),
    ),
    "hopper_paged_prefill": Space(
        {
            "rows": (128, 192), "keys": (64, 128), "stages": (2, 3, 4, 5, 6), "pack": (1, 2, 4, 8),
            "load_registers": (24, 32, 40, 56, 72), "gather_registers": (24, 40, 56, 72),
        },
        (("keys", "stages"), ("rows", "load_registers")),
        _hopper_prefill_possible,
        _hopper_prefill_unread,
    ),
}  # fmt: skip
