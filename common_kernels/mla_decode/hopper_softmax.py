"""How scores become weights in `mla_decode` on Hopper: in powers of two, masked, relative to a running maximum."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from taut.common_kernels import base2
from taut.common_kernels.aggregates import aggregates_of
from taut.common_kernels.hopper_mask import Mask, key_range, sees
from taut.common_kernels.mla_decode.hopper_queries import Block
from taut.common_kernels.mla_decode.hopper_ring import BLOCK_N
from taut.common_kernels.schedule.hopper_items import Item

LN2 = gl.constexpr(base2.LN2)


@aggregates_of(gl, gluon)
class Scoring:
    """What scores are made with in a launch.

    Attributes:
        scale: of the scores, times log2(e).
        cache_scale: pointer to the scale of the cache, which is that of keys and values, if FLOAT8.
        mask: who sees what.
        MAY_BE_EMPTY: a query may have seen no key after a tile of its item.
        FLOAT8: whether the cache is float8.
    """

    scale: gl.tensor
    cache_scale: gl.tensor
    mask: Mask
    MAY_BE_EMPTY: gl.constexpr
    FLOAT8: gl.constexpr


@aggregates_of(gl, gluon)
class Weighing:
    """What turns an item's scores into weights.

    Attributes:
        scale: of the scores, times log2(e), and that of the cache.
        positions: [BLOCK_M] of the queries.
        end_key: the first position past the item's keys.
        seen_by_all: the first position that some query does not see.
        mask: who sees what.
        MAY_BE_EMPTY: a query may have seen no key after a tile.
    """

    scale: gl.tensor
    positions: gl.tensor
    end_key: gl.tensor
    seen_by_all: gl.tensor
    mask: Mask
    MAY_BE_EMPTY: gl.constexpr


@gluon.jit
def scales_of(scoring: Scoring) -> gl.tensor:
    """What scores, and what results are multiplied by."""
    scale = scoring.scale
    result_scale = 1.0
    if scoring.FLOAT8:
        result_scale = gl.load(scoring.cache_scale)
        scale = scale * result_scale
    return scale, result_scale


@gluon.jit
def weighing_of(
    scoring: Scoring, scale: gl.tensor, block: Block, item: Item, first_m: gl.tensor, LAYOUT: gl.constexpr
) -> Weighing:
    """How the scores of an item become weights; positions have the layout."""
    positions = item.first_position + (first_m + gl.arange(0, block.BLOCK_M, layout=LAYOUT)) // block.HEADS
    _, _, _, seen_by_all = key_range(scoring.mask, item.first_position, item.queries, item.end_key)
    return Weighing(scale, positions, item.end_key, seen_by_all, scoring.mask, scoring.MAY_BE_EMPTY)


@gluon.jit
def hide_unseen(weighing: Weighing, scores: gl.tensor, first: gl.tensor, M_AXIS: gl.constexpr) -> gl.tensor:
    """Scores of a tile that begins at position `first`: -inf where a query does not see a key."""
    OF_KEY: gl.constexpr = gl.SliceLayout(M_AXIS, scores.type.layout)
    keys = gl.expand_dims(first + gl.arange(0, BLOCK_N, layout=OF_KEY), M_AXIS)
    positions = gl.expand_dims(weighing.positions, 1 - M_AXIS)
    return gl.where(sees(weighing.mask, keys, positions, keys < weighing.end_key), scores, float("-inf"))


@gluon.jit
def base_of(row_max: gl.tensor, MAY_BE_EMPTY: gl.constexpr) -> gl.tensor:
    """What scores are taken relative to: the maximum, or 0 for a query that has seen nothing yet."""
    base = row_max
    if MAY_BE_EMPTY:
        base = gl.where(row_max == float("-inf"), 0.0, row_max)
    return base
