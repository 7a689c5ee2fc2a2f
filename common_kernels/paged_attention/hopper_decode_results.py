"""What the decode kernel writes: results, partials where an item is split, and what belongs to no row."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from taut.common_kernels.aggregates import aggregates_of
from taut.common_kernels.gluon_features import THREAD_BARRIERS, first_of
from taut.common_kernels.paged_attention.hopper_softmax import LN2, LOG2E, Output, lse_at, lse_of, out_of
from taut.common_kernels.schedule.hopper_items import Item, Part

thread_barrier = first_of(gl, THREAD_BARRIERS)


@aggregates_of(gl, gluon)
class Pack:
    """Which queries and heads share a program: m is query m // PACK of an item and head m % PACK of these.

    Attributes:
        kv_head: whose group the query heads are of.
        first_group_head: the first of them, counted in the group.
        Q_HEADS: query heads in all.
        GROUP: query heads of one key-value head.
        PACK: heads that share a program.
        QUERIES: the most queries of an item.
    """

    kv_head: gl.tensor
    first_group_head: gl.tensor
    Q_HEADS: gl.constexpr
    GROUP: gl.constexpr
    PACK: gl.constexpr
    QUERIES: gl.constexpr


@aggregates_of(gl, gluon)
class Partials:
    """Where results wait that are to be merged.

    Attributes:
        numbers: pointer [partials, QUERIES, Hq, V] float32.
        lses: pointer [partials, QUERIES, Hq] float32.
        arrivals: pointer [items, head blocks] int32, zeros before and after; None where `merge_items` follows.
    """

    numbers: gl.tensor
    lses: gl.tensor
    arrivals: gl.tensor | None


@aggregates_of(gl, gluon)
class Padding:
    """Queries past the last row.

    Attributes:
        query_starts: pointer [R + 1].
        rows: R.
        tokens: T, where they end.
        WANTED: whether they are written here.
    """

    query_starts: gl.tensor
    rows: gl.tensor
    tokens: gl.tensor
    WANTED: gl.constexpr


@aggregates_of(gl, gluon)
class Lanes:
    """What each m is of, in one layout.

    Attributes:
        queries: [BLOCK_M] of the item.
        group_heads: [BLOCK_M] query heads, counted in the group, which may have less.
        heads: [BLOCK_M] query heads, counted over all.
    """

    queries: gl.tensor
    group_heads: gl.tensor
    heads: gl.tensor


@gluon.jit
def lanes_of(pack: Pack, BLOCK_M: gl.constexpr, layout: gl.constexpr) -> Lanes:
    """What each m is of."""
    m = gl.arange(0, BLOCK_M, layout=layout)
    queries = m // pack.PACK
    group_heads = pack.first_group_head + m % pack.PACK
    return Lanes(queries, group_heads, pack.kv_head * pack.GROUP + group_heads)


@gluon.constexpr_function
def wide_layout(columns: int) -> gl.BlockedLayout:
    """How four warps share numbers [BLOCK_M, columns]: pieces of 8, whole lines side by side."""
    lanes = min(columns // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])


@gluon.jit
def store_result(
    turned: gl.tensor,  # [V, BLOCK_M] float32
    row_sum: gl.tensor,  # [BLOCK_M]
    row_max: gl.tensor,
    lanes: Lanes,
    here: gl.tensor,  # [BLOCK_M] whether the item has this query and the group this head
    wide_lanes: Lanes,  # laid out as `wide_layout`
    columns: gl.tensor,  # [V] likewise
    part: Part,
    number: gl.tensor,
    item: Item,
    output: Output,
    partials: Partials,
    pack: Pack,
) -> None:
    """Write the output of an item, by its number; a partial where it is split, which whoever comes last merges."""
    HEAD_MAIN: gl.constexpr = turned.shape[0]
    result = gl.convert_layout(gl.permute(turned, (1, 0)), wide_layout(HEAD_MAIN))
    wide_here = (wide_lanes.queries < item.queries) & (wide_lanes.group_heads < pack.GROUP)
    if item.splits > 1:
        # Scratch grows with the programs that run at once (`most_partials`): 32 bits are enough for its offsets.
        partial = item.first_partial + gl.where(number == part.first_item, part.first_split, 0)
        wide_places = (partial * pack.QUERIES + wide_lanes.queries) * pack.Q_HEADS + wide_lanes.heads
        numbers = partials.numbers + wide_places * HEAD_MAIN
        gl.store(numbers[:, None] + columns[None, :], result, mask=wide_here[:, None])
        places = (partial * pack.QUERIES + lanes.queries) * pack.Q_HEADS + lanes.heads
        gl.store(partials.lses + places, lse_of(row_sum, row_max), mask=here)
        if partials.arrivals is not None:
            thread_barrier()  # all threads' stores before the count
            arrived = partials.arrivals + number * gl.num_programs(0) + gl.program_id(0)
            if gl.atomic_add(arrived, 1, sem="acq_rel") == item.splits - 1:
                gl.store(arrived, 0)
                merged, merged_lse = merge_partials(partials, item, wide_lanes, wide_here, columns, pack)
                tokens = item.first_query + wide_lanes.queries
                out = out_of(output, tokens, wide_lanes.heads)
                rounded = merged.to(output.out.dtype.element_ty)
                gl.store(out[:, None] + columns[None, :], rounded, mask=wide_here[:, None])
                if output.lse is not None:
                    gl.store(lse_at(output, tokens, wide_lanes.heads), merged_lse, mask=wide_here)
    else:
        out = out_of(output, item.first_query + wide_lanes.queries, wide_lanes.heads)
        rounded = result.to(output.out.dtype.element_ty)
        gl.store(out[:, None] + columns[None, :], rounded, mask=wide_here[:, None])
        if output.lse is not None:
            lses = lse_at(output, item.first_query + lanes.queries, lanes.heads)
            gl.store(lses, lse_of(row_sum, row_max), mask=here)


@gluon.jit
def merge_partials(
    partials: Partials,
    item: Item,
    lanes: Lanes,
    here: gl.tensor,  # [BLOCK_M]
    columns: gl.tensor,  # [V]
    pack: Pack,
) -> gl.tensor:
    """The output [BLOCK_M, V] float32 and the LSEs [BLOCK_M] of a split item; few partials, one after another."""
    VALUE_SIZE: gl.constexpr = columns.shape[0]
    places = (item.first_partial.to(gl.int64) * pack.QUERIES + lanes.queries) * pack.Q_HEADS + lanes.heads
    row_max = gl.load(partials.lses + places, mask=here, other=0.0) * LOG2E
    addresses = (partials.numbers + places * VALUE_SIZE)[:, None] + columns[None, :]
    merged = gl.load(addresses, mask=here[:, None], other=0.0)
    row_sum = gl.where(row_max > float("-inf"), 1.0, 0.0)
    for _ in range(1, item.splits):
        places += pack.QUERIES * pack.Q_HEADS
        score = gl.load(partials.lses + places, mask=here, other=0.0) * LOG2E
        addresses = (partials.numbers + places * VALUE_SIZE)[:, None] + columns[None, :]
        numbers = gl.load(addresses, mask=here[:, None], other=0.0)
        new_max = gl.maximum(row_max, score)
        base = gl.where(new_max == float("-inf"), 0.0, new_max)
        alpha = gl.exp2(row_max - base)
        weight = gl.exp2(score - base)
        merged = merged * alpha[:, None] + numbers * weight[:, None]
        row_sum = row_sum * alpha + weight
        row_max = new_max
    seen = row_sum > 0.0
    safe = gl.where(seen, row_sum, 1.0)
    return merged / safe[:, None], gl.where(seen, (row_max + gl.log2(safe)) * LN2, float("-inf"))


@gluon.jit
def fill_padding(
    first: gl.tensor,
    tokens: gl.tensor,
    output: Output,
    pack: Pack,
    BLOCK_M: gl.constexpr,
    COLUMNS: gl.constexpr,
) -> None:
    """Zeros, and -inf as LSE, for every so many of the queries first <= t < tokens, which belong to no row.

    The parts, of which there are as many, share them out.
    """
    wide: gl.constexpr = wide_layout(COLUMNS)
    m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, wide))
    group_heads = pack.first_group_head + m
    heads = pack.kv_head * pack.GROUP + group_heads
    ours = (m < pack.PACK) & (group_heads < pack.GROUP)
    columns = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, wide))
    for token in range(first, tokens, gl.num_programs(1)):
        out = out_of(output, token, heads)
        nothing = gl.zeros([BLOCK_M, COLUMNS], output.out.dtype.element_ty, layout=wide)
        gl.store(out[:, None] + columns[None, :], nothing, mask=ours[:, None])
        if output.lse is not None:
            minus_infinity = gl.full([BLOCK_M], float("-inf"), gl.float32, layout=gl.SliceLayout(1, wide))
            gl.store(lse_at(output, token, heads), minus_infinity, mask=ours)
