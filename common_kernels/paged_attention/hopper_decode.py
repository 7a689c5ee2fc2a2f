"""Few queries on many keys, on Hopper: the parts of a schedule, as `triton_decode`, with keys brought by other warps.

One warpgroup attends; one warp, or four where pages are small, bring keys and values into a ring. Both go through the
same part of the schedule, item after item, each at its own pace: the ring does not run dry between two items.

The products are turned round, so that heads, of which there are few, are columns of the matrix instructions (8 at
least) and keys are their 64 rows:

    scores [keys, heads] = keys [keys, D] x queries^T          output^T [V, heads] += values^T [V, keys] x weights

Keys and values are read from the ring where they lie; only the weights, BLOCK_N x heads of them, go through shared
memory on their way from one product to the other.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from taut.common_kernels.aggregates import aggregates_of
from taut.common_kernels.gluon_features import THREAD_BARRIERS, first_of
from taut.common_kernels.hopper_mask import Mask, key_range, sees, sees_any
from taut.common_kernels.paged_attention.hopper_decode_results import (
    Pack,
    Padding,
    Partials,
    fill_padding,
    lanes_of,
    store_result,
    wide_layout,
)
from taut.common_kernels.paged_attention.hopper_ring import (
    GATHERING_WARPS,
    Cache,
    Ring,
    Row,
    Table,
    clear_dead_keys,
    gather_tile,
    half_of,
    load_tile,
    make_ring,
    pages_of_row,
)
from taut.common_kernels.paged_attention.hopper_softmax import (
    LOG2E,
    LOWEST,
    Output,
    Queries,
    Scoring,
    add_sinks,
    cap_scores,
    scoring_of,
)
from taut.common_kernels.schedule.hopper_items import (
    Item,
    Part,
    Schedule,
    let_next_start,
    load_first_item,
    load_item,
    load_part,
    tiles_of,
    wait_for_kernel_ahead,
)

thread_barrier = first_of(gl, THREAD_BARRIERS)


@aggregates_of(gl, gluon)
class Share:
    """What a program does of a step.

    Attributes:
        schedule: the tables.
        number: of the program's part.
        CUT: keys of a tile of the schedule.
        EARLY: whether the kernel ahead may still run when this one starts.
        RELEASES: whether the kernel behind may start before this one has ended.
    """

    schedule: Schedule
    number: gl.tensor
    CUT: gl.constexpr
    EARLY: gl.constexpr
    RELEASES: gl.constexpr


@aggregates_of(gl, gluon)
class Operands:
    """Left and right sides of products that this warpgroup writes.

    Attributes:
        q: queries [BLOCK_M, HEAD_MAIN] shared memory.
        q_tail: [BLOCK_M, HEAD_TAIL] shared memory, of no meaning without a tail.
        p: the weights of a tile [BLOCK_M, BLOCK_N] shared memory.
    """

    q: gl.shared_memory_descriptor
    q_tail: gl.shared_memory_descriptor
    p: gl.shared_memory_descriptor


@gluon.jit
def span_of(
    part: Part, number: gl.tensor, item: Item, mask: Mask, CUT: gl.constexpr, BLOCK_N: gl.constexpr
) -> gl.tensor:
    """What a part does of an item, by its number.

    Returns the first position, how many tiles of BLOCK_N, and the positions between which keys are read.

    The schedule may serve layers with other windows: what this mask does not see is left out here.
    """
    begin = gl.where(number == part.first_item, part.first_tile, 0)
    end = gl.where(number == part.last_item, part.end_tile, tiles_of(item, CUT))
    first_seen, end_seen, _, _ = key_range(mask, item.first_position, item.queries, item.end_key)
    start = gl.maximum(item.first_key + begin * CUT, first_seen // CUT * CUT)
    stop = gl.minimum(item.first_key + end * CUT, end_seen)
    tiles = gl.maximum(gl.cdiv(stop - start, BLOCK_N), 0)
    return start, tiles, first_seen, stop


@gluon.jit
def load_part_of_keys(share: Share, pack: Pack, cache: Cache, table: Table, mask: Mask) -> None:
    """The partition that fills the ring, with the tiles of all items of a part, one behind another."""
    if share.EARLY:
        wait_for_kernel_ahead()
    BLOCK_N: gl.constexpr = cache.BLOCK_N
    part = load_part(share.schedule, share.number)
    item = load_first_item(share.schedule, share.number)
    loaded = share.number * 0  # tiles of items before
    for number in range(part.first_item, part.last_item + 1):
        pages = pages_of_row(table, item.row)
        start, tiles, first_seen, stop = span_of(part, number, item, mask, share.CUT, BLOCK_N)
        row = Row(pages, pack.kv_head, 0, first_seen, stop)
        for i in range(tiles):
            if cache.BOX:
                load_tile(loaded + i, start + i * BLOCK_N, cache, row)
            else:
                gather_tile(loaded + i, start + i * BLOCK_N, cache, row)
        loaded += tiles
        # Not ahead of the tiles, whose begin it would put off: the ring is full, and no stage empty for a while.
        item = load_item(share.schedule, gl.minimum(number + 1, part.last_item))


@gluon.jit
def load_queries(
    queries: Queries,
    item: Item,
    pack: Pack,
    BLOCK_M: gl.constexpr,
    FIRST_COLUMN: gl.constexpr,
    COLUMNS: gl.constexpr,
) -> gl.tensor:
    """Some columns of an item's queries [BLOCK_M, COLUMNS], in registers; m is query m // PACK and head m % PACK."""
    wide: gl.constexpr = wide_layout(COLUMNS)
    m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, wide))
    group_heads = pack.first_group_head + m % pack.PACK
    here = (m // pack.PACK < item.queries) & (group_heads < pack.GROUP)
    addresses = (
        queries.start
        + (item.first_query + m // pack.PACK).to(gl.int64) * queries.token_stride
        + (pack.kv_head * pack.GROUP + group_heads) * queries.head_stride
    )
    columns = FIRST_COLUMN + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, wide))
    return gl.load(addresses[:, None] + columns[None, :], mask=here[:, None], other=0.0)


@gluon.jit
def by_warp(tile: gl.tensor) -> gl.tensor:
    """A tile [BLOCK_N, BLOCK_M] as turned products lay it out: [BLOCK_N / 64, 4 warps, 16, BLOCK_M]."""
    BLOCK_N: gl.constexpr = tile.shape[0]
    BLOCK_M: gl.constexpr = tile.shape[1]
    return gl.reshape(tile, [BLOCK_N // 64, 4, 16, BLOCK_M])


@gluon.jit
def known_to_all(found: gl.tensor) -> gl.tensor:
    """What each warp has found, [4 warps, BLOCK_M], in such a layout that every thread has it of all four.

    So a reduction over keys waits for other warps once. The compiler's own has one of them work out the result and the
    others wait for that, too.
    """
    return gl.convert_layout(found, gl.BlockedLayout([4, 2], [8, 4], [4, 1], [1, 0]))


@gluon.jit
def max_over_keys(tile: gl.tensor) -> gl.tensor:
    """The maxima [BLOCK_M] of a tile [BLOCK_N, BLOCK_M]."""
    found = gl.max(gl.max(by_warp(tile), 2), 0)
    return gl.convert_layout(gl.max(known_to_all(found), 0), gl.SliceLayout(0, tile.type.layout))


@gluon.jit
def sum_over_keys(tile: gl.tensor) -> gl.tensor:
    """The sums [BLOCK_M] of a tile [BLOCK_N, BLOCK_M]."""
    found = gl.sum(gl.sum(by_warp(tile), 2), 0)
    return gl.convert_layout(gl.sum(known_to_all(found), 0), gl.SliceLayout(0, tile.type.layout))


@gluon.jit
def attend_tiles(
    start: gl.tensor,  # the position of the first key
    tiles: gl.tensor,
    stop: gl.tensor,  # keys from here on are not seen
    attended: gl.tensor,  # tiles of items before
    item: Item,
    positions: gl.tensor,  # [BLOCK_M]
    slopes: gl.tensor,  # [BLOCK_M] base 2
    operands: Operands,
    ring: Ring,
    mask: Mask,
    scoring: Scoring,
) -> gl.tensor:
    """An item's queries against tiles of the ring.

    Returns the output [V, BLOCK_M], not yet divided, the sums of weights of each key's place [BLOCK_N, BLOCK_M], and
    row_max [BLOCK_M].
    """
    STAGES: gl.constexpr = ring.STAGES
    BLOCK_N: gl.constexpr = ring.k.shape[1]
    HEAD_MAIN: gl.constexpr = ring.v.shape[2]
    BLOCK_M: gl.constexpr = operands.q.shape[0]
    turned: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])  # [keys or V, BLOCK_M]
    acc = gl.zeros([HEAD_MAIN, BLOCK_M], gl.float32, layout=turned)
    sums = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, layout=turned)  # of each key's place: added up at the end
    row_max = gl.full([BLOCK_M], LOWEST, gl.float32, layout=gl.SliceLayout(0, turned))
    for i in range(tiles):
        stage = (attended + i) % STAGES
        phase = ((attended + i) // STAGES) & 1
        tile = start + i * BLOCK_N
        keys = tile + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, turned))
        mbarrier.wait(ring.k_full.index(stage), phase)
        if not ring.BOX:
            fence_async_shared()
        scores = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, layout=turned)
        scores = warpgroup_mma(ring.k.index(stage), operands.q.permute((1, 0)), scores, use_acc=False, is_async=True)
        if ring.HEAD_TAIL:
            scores = warpgroup_mma(ring.k_tail.index(stage), operands.q_tail.permute((1, 0)), scores, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])

        scores = cap_scores(scores, scoring) if scoring.HAS_SOFT_CAP else scores * scoring.scale
        if scoring.slopes is not None:
            scores += slopes[None, :] * (keys[:, None] - positions[None, :]).to(gl.float32)
        # All tiles are masked: it costs little beside reading them.
        seen = sees(mask, keys[:, None], positions[None, :], keys[:, None] < stop)
        scores = gl.where(seen, scores, float("-inf"))
        new_max = gl.maximum(row_max, max_over_keys(scores))
        weights = gl.exp2(scores - new_max[None, :])
        alpha = gl.exp2(row_max - new_max)
        sums = sums * alpha[None, :] + weights
        row_max = new_max
        # Every product on the weights of the tile before has been waited for by all threads: they arrived at
        # `k_empty` together.
        operands.p.permute((1, 0)).store(weights.to(operands.q.dtype))

        mbarrier.wait(ring.v_full.index(stage), phase)
        v = ring.v.index(stage)
        if ring.BOX:  # noqa: SIM102 - the outer one is the compiler's
            if tile + BLOCK_N > item.end_key:
                clear_dead_keys(v, tile, item.end_key)
        fence_async_shared()  # the weights; what was gathered, or cleared
        thread_barrier()
        acc = acc * alpha[None, :]
        acc = warpgroup_mma(v.permute((1, 0)), operands.p.permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(ring.k_empty.index(stage), count=1)
    return acc, sums, row_max


@gluon.jit
def attend_part(
    share: Share,
    operands: Operands,
    ring: Ring,
    queries: Queries,
    output: Output,
    partials: Partials,
    pack: Pack,
    padding: Padding,
    mask: Mask,
    scoring: Scoring,
) -> None:
    """The warpgroup that attends, item after item of a part, and then fills what belongs to no row."""
    if share.EARLY:
        wait_for_kernel_ahead()
    if padding.WANTED:
        padding_start = gl.load(padding.query_starts + padding.rows)  # early, so that nothing waits for it at the end
    BLOCK_N: gl.constexpr = ring.k.shape[1]
    HEAD_MAIN: gl.constexpr = ring.v.shape[2]
    BLOCK_M: gl.constexpr = operands.q.shape[0]
    turned: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])  # [keys or V, BLOCK_M]
    part = load_part(share.schedule, share.number)
    item = load_first_item(share.schedule, share.number)

    lanes = lanes_of(pack, BLOCK_M, gl.SliceLayout(0, turned))
    ours = (lanes.queries < pack.QUERIES) & (lanes.group_heads < pack.GROUP)
    slopes = gl.zeros([BLOCK_M], gl.float32, layout=gl.SliceLayout(0, turned))
    if scoring.slopes is not None:
        slopes = gl.load(scoring.slopes + lanes.heads, mask=ours, other=0.0) * LOG2E
    wide: gl.constexpr = wide_layout(HEAD_MAIN)
    wide_lanes = lanes_of(pack, BLOCK_M, gl.SliceLayout(1, wide))
    columns = gl.arange(0, HEAD_MAIN, layout=gl.SliceLayout(0, wide))

    q = load_queries(queries, item, pack, BLOCK_M, 0, HEAD_MAIN)
    q_tail = q
    if ring.HEAD_TAIL:
        q_tail = load_queries(queries, item, pack, BLOCK_M, HEAD_MAIN, ring.HEAD_TAIL)
    attended = share.number * 0  # tiles of items before
    for number in range(part.first_item, part.last_item + 1):
        # Every product on the queries of the item before has been waited for by all threads.
        thread_barrier()
        operands.q.store(q)
        if ring.HEAD_TAIL:
            operands.q_tail.store(q_tail)
        fence_async_shared()
        thread_barrier()
        next_item = load_item(share.schedule, gl.minimum(number + 1, part.last_item))
        q = load_queries(queries, next_item, pack, BLOCK_M, 0, HEAD_MAIN)  # early: wanted after this item's last tile
        if ring.HEAD_TAIL:
            q_tail = load_queries(queries, next_item, pack, BLOCK_M, HEAD_MAIN, ring.HEAD_TAIL)
        start, tiles, _, stop = span_of(part, number, item, mask, share.CUT, BLOCK_N)
        positions = item.first_position + lanes.queries
        here = ours & (lanes.queries < item.queries)
        acc, sums, row_max = attend_tiles(
            start, tiles, stop, attended, item, positions, slopes, operands, ring, mask, scoring
        )
        attended += tiles

        if share.RELEASES and number == part.last_item:
            let_next_start()

        row_sum = sum_over_keys(sums)
        factor = gl.full([BLOCK_M], 1.0, gl.float32, layout=gl.SliceLayout(0, turned))
        if scoring.sinks is not None:
            sink_scores = gl.load(scoring.sinks + lanes.heads, mask=ours, other=0.0).to(gl.float32)
            wanted = sees_any(mask, positions, item.end_key)
            # An item's sinks count once: in the part that has its first tile.
            has_first = (number != part.first_item) | (part.first_tile == 0)
            row_sum, row_max, factor = add_sinks(row_sum, row_max, sink_scores, wanted & has_first)
        factor = gl.where(row_sum > 0.0, factor / gl.where(row_sum > 0.0, row_sum, 1.0), 0.0)
        store_result(
            acc * factor[None, :], row_sum, row_max, lanes, here, wide_lanes, columns, part, number, item, output,
            partials, pack,
        )  # fmt: skip
        item = next_item

    if padding.WANTED:
        # Queries past the last row belong to no item: the parts share them out.
        fill_padding(padding_start + share.number, padding.tokens, output, pack, BLOCK_M, HEAD_MAIN)


@gluon.jit(do_not_specialize=["tokens", "rows", "pages", "table_stride"])
def taut_decode(
    query: gl.tensor,  # [T, Hq, D]
    key: gl.tensor,  # a descriptor of [N, Hk, P, D], boxes [1, 1, BOX, 64]; gathered: the cache [N, P, Hk, D]
    value: gl.tensor,
    out: gl.tensor,  # [T, Hq, V]
    lse: gl.tensor,  # [T, Hq] or None
    partial_numbers: gl.tensor,  # [partials, QUERIES, Hq, V] float32
    partial_lses: gl.tensor,  # [partials, QUERIES, Hq] float32
    arrivals: gl.tensor,  # [items, head blocks] int32, zeros before and after, or None where `merge_items` follows
    sinks: gl.tensor,  # [Hq] or None
    slopes: gl.tensor,  # [Hq] or None
    items: gl.tensor,  # the schedule
    parts: gl.tensor,
    query_starts: gl.tensor,  # [R + 1]
    table: gl.tensor,  # [*, pages]
    table_rows: gl.tensor,  # [R], or None
    tokens: gl.tensor,
    rows: gl.tensor,
    pages: gl.tensor,  # N, and so the number of a page that there is not
    scale: gl.tensor,
    soft_cap: gl.tensor,
    left: gl.tensor,
    right: gl.tensor,
    query_token_stride: gl.tensor,
    query_head_stride: gl.tensor,
    key_page_stride: gl.tensor,  # of keys and values in pieces of 8 elements
    key_token_stride: gl.tensor,
    key_head_stride: gl.tensor,
    value_page_stride: gl.tensor,
    value_token_stride: gl.tensor,
    value_head_stride: gl.tensor,
    out_token_stride: gl.tensor,
    out_head_stride: gl.tensor,
    lse_token_stride: gl.tensor,
    lse_head_stride: gl.tensor,
    table_stride: gl.tensor,
    Q_HEADS: gl.constexpr,
    GROUP: gl.constexpr,  # query heads of one key-value head
    PACK: gl.constexpr,  # of them, how many share a program
    QUERIES: gl.constexpr,  # the most queries of an item
    EARLY: gl.constexpr,  # whether the kernel ahead may still run when this one starts
    RELEASES: gl.constexpr,  # whether the merge is launched so that it may start before this kernel has ended
    PADDING: gl.constexpr,  # whether queries past the last row are written here
    CAUSAL: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    HAS_SOFT_CAP: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    BOX: gl.constexpr,  # keys of a box of the copy engine, 0 where the keys are gathered
    BLOCK_M: gl.constexpr,  # at least QUERIES * PACK
    BLOCK_N: gl.constexpr,  # keys of a tile of the ring
    CUT: gl.constexpr,  # keys of a tile of the schedule; BLOCK_N is a multiple of it, and it of BOX
    HEAD_MAIN: gl.constexpr,
    HEAD_TAIL: gl.constexpr,
    STAGES: gl.constexpr,
    LOAD_REGISTERS: gl.constexpr,  # of a thread that loads
) -> None:
    """One program works through one part for the packed heads of one key-value head; see `hopper_launch.decode`."""
    PACKS: gl.constexpr = (GROUP + PACK - 1) // PACK
    LOAD_WARPS: gl.constexpr = 1 if BOX else GATHERING_WARPS
    gl.static_assert(BOX == 0 or CUT % BOX == 0, "a part may begin amid a box")
    kv_head = gl.program_id(0) // PACKS
    first_group_head = gl.program_id(0) % PACKS * PACK
    number = gl.program_id(1)

    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    DTYPE: gl.constexpr = out.dtype.element_ty
    q = gl.allocate_shared_memory(DTYPE, [BLOCK_M, HEAD_MAIN], layout)
    p = gl.allocate_shared_memory(DTYPE, [BLOCK_M, BLOCK_N], layout)
    k = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, HEAD_MAIN], layout)
    v = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, HEAD_MAIN], layout)
    q_tail = q
    k_tail = k
    if HEAD_TAIL:
        q_tail = gl.allocate_shared_memory(DTYPE, [BLOCK_M, HEAD_TAIL], layout)
        k_tail = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, HEAD_TAIL], layout)
    ring = make_ring(k, k_tail, v, HEAD_TAIL, BOX, 1, False, True)
    fence_async_shared()
    thread_barrier()

    share = Share(Schedule(items, parts), number, CUT, EARLY, RELEASES)
    mask = Mask(left, right, CAUSAL, HAS_LEFT, HAS_RIGHT)
    scoring = scoring_of(scale, soft_cap, sinks, slopes, HAS_SOFT_CAP)
    operands = Operands(q, q_tail, p)
    queries = Queries(query, query_token_stride, query_head_stride)
    output = Output(out, lse, out_token_stride, out_head_stride, lse_token_stride, lse_head_stride)
    partials = Partials(partial_numbers, partial_lses, arrivals)
    pack = Pack(kv_head, first_group_head, Q_HEADS, GROUP, PACK, QUERIES)
    padding = Padding(query_starts, rows, tokens, PADDING)
    keys = half_of(
        key, key_page_stride, key_token_stride, key_head_stride, kv_head, ring.k, ring.k_tail, ring.k_full,
        ring.k_empty, BOX, HEAD_TAIL,
    )  # fmt: skip
    values = half_of(
        value, value_page_stride, value_token_stride, value_head_stride, kv_head, ring.v, ring.v, ring.v_full,
        ring.v_empty, BOX, 0,
    )  # fmt: skip
    cache = Cache(keys, values, pages, True, PAGE_SIZE, BOX, BLOCK_N, HEAD_MAIN, STAGES, True)
    page_table = Table(table, table_rows, table_stride)
    gl.warp_specialize(
        [
            (attend_part, (share, operands, ring, queries, output, partials, pack, padding, mask, scoring)),
            (load_part_of_keys, (share, pack, cache, page_table, mask)),
        ],
        [LOAD_WARPS],
        [LOAD_REGISTERS],
    )
