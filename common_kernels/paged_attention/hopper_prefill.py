"""Long extends on Hopper: a block of queries, two or three warpgroups that attend, two warps or four that load.

Those that load fill a ring of shared memory with tiles: one warp brings keys and one values, for a stage is empty of
values later than of keys, and neither shall wait for the other. (Small pages: four warps gather both.) Each of the
attending warpgroups keeps 64 queries times heads, their scores and their output in registers, and multiplies from the
ring. They go one of two ways. By turns (`attend_in_turns`), two of them:

    keys      K0 K1 K2 ...
    values    V0 V1 V2 ...
    m = 0-63    QK0 | softmax 0 | QK1 PV0 | softmax 1 | QK2 PV1 | softmax 2 | ...
    m = 64-     ... QK0 | softmax 0 | QK1 PV0 | softmax 1 | ...

Within a warpgroup the products of the next tile are under way while the weights of this one are worked out; between
the two a token goes to and fro, so that one multiplies while the other exponentiates (FlashAttention-3, arXiv
2407.08608, section 3.1 and 3.2).

Heads of 64 leave registers free: there the scores run a step of half a tile ahead (`attend_ahead`), so that no softmax
waits for a product that was begun just before, no turns are taken, and a third warpgroup fits:

    each        QK0 | QK1     softmax 0 | QK2 PV0 softmax 1 | QK3 PV1 softmax 2 | ...        (0, 1, 2: steps)

(The deeper pipeline that FlashAttention-3 describes in its appendix B.3, for which whole tiles take too many.) Why each
barrier is right is said where it is made.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma_wait

from taut.common_kernels.gluon_features import THREAD_BARRIERS, first_of
from taut.common_kernels.hopper_mask import Mask, key_range, sees_any
from taut.common_kernels.paged_attention.hopper_prefill_attend import (
    WARPGROUP_M,
    Block,
    Role,
    Warpgroup,
    attend_ahead,
    attend_in_turns,
)
from taut.common_kernels.paged_attention.hopper_prefill_load import as_pieces, gather_tiles, load_keys, load_values
from taut.common_kernels.paged_attention.hopper_ring import (
    GATHERING_WARPS,
    Cache,
    Ring,
    Row,
    Table,
    half_of,
    make_ring,
    pages_of_row,
)
from taut.common_kernels.paged_attention.hopper_softmax import (
    LOG2E,
    Output,
    Queries,
    Scoring,
    add_sinks,
    lse_at,
    lse_of,
    scoring_of,
)

thread_barrier = first_of(gl, THREAD_BARRIERS)


@gluon.jit
def row_of_block(query_starts: gl.tensor, rows: gl.tensor, block: gl.tensor, BLOCK: gl.constexpr) -> gl.tensor:
    """The row whose queries block number `block` holds, and its first block; see `triton_prefill.row_of_block`."""
    low = rows * 0
    high = rows
    while low < high:
        middle = (low + high + 1) // 2
        if gl.load(query_starts + middle) // BLOCK + middle <= block:
            low = middle
        else:
            high = middle - 1
    return low, gl.load(query_starts + low) // BLOCK + low


@gluon.jit
def place_of(program: gl.tensor, packs: gl.tensor, together: gl.tensor, blocks: gl.tensor) -> gl.tensor:
    """Which pack of heads and which block of queries a program serves; see `triton_prefill.place_of`."""
    first = program // (together * blocks) * together
    beside = gl.minimum(together, packs - first)
    place = program - first * blocks
    return first + place % beside, blocks - 1 - place // beside


@gluon.jit
def load_queries(
    target: gl.shared_memory_descriptor,  # [64, COLUMNS] shared memory
    queries: Queries,
    block: Block,
    WHICH: gl.constexpr,
    FIRST_COLUMN: gl.constexpr,
) -> None:
    """Some columns of the queries of one warpgroup; zeros where there is no query."""
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    m = WHICH * WARPGROUP_M + gl.arange(0, WARPGROUP_M, layout=gl.SliceLayout(1, wide))
    tokens = block.first_query + m // block.PACK
    here = tokens < block.query_end
    addresses = (
        queries.start
        + tokens.to(gl.int64) * queries.token_stride
        + (block.first_head + m % block.PACK) * queries.head_stride
    )
    columns = FIRST_COLUMN + gl.arange(0, target.shape[1], layout=gl.SliceLayout(0, wide))
    target.store(gl.load(addresses[:, None] + columns[None, :], mask=here[:, None], other=0.0))


@gluon.jit
def attend(
    role: Role,
    q: gl.shared_memory_descriptor,  # [WARPGROUPS, 64, HEAD_MAIN] shared memory
    q_tail: gl.shared_memory_descriptor,  # [WARPGROUPS, 64, HEAD_TAIL]
    ring: Ring,
    turns: gl.shared_memory_descriptor,  # [2, 1] the barriers of those that attend by turns
    queries: Queries,
    output: Output,
    block: Block,
    mask: Mask,
    scoring: Scoring,
) -> None:
    """One warpgroup: 64 queries times heads against all tiles, and their output."""
    WHICH: gl.constexpr = role.WHICH
    KEYS: gl.constexpr = ring.k.shape[1] // 2 if role.AHEAD else ring.k.shape[1]  # whose scores are worked out at once
    HEAD_MAIN: gl.constexpr = ring.v.shape[2]
    PACK: gl.constexpr = block.PACK
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_MAIN, 16])
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])

    q_main = q.index(WHICH)
    load_queries(q_main, queries, block, WHICH, 0)
    q_rest = q_main
    if ring.HEAD_TAIL:
        q_rest = q_tail.index(WHICH)
        load_queries(q_rest, queries, block, WHICH, HEAD_MAIN)
    fence_async_shared()
    thread_barrier()  # every thread's queries are there before the first product reads them

    m = WHICH * WARPGROUP_M + gl.arange(0, WARPGROUP_M, layout=gl.SliceLayout(1, s_layout))
    positions = block.first_position + m // PACK
    slopes = gl.zeros([WARPGROUP_M], gl.float32, layout=gl.SliceLayout(1, s_layout))
    if scoring.slopes is not None:
        slopes = gl.load(scoring.slopes + block.first_head + m % PACK) * LOG2E
    warpgroup = Warpgroup(q_main, q_rest, positions, slopes, WHICH)

    if role.AHEAD:
        acc, row_sum, row_max = attend_ahead(warpgroup, ring, block, mask, scoring)
    else:
        acc, row_sum, row_max = attend_in_turns(warpgroup, ring, turns, block, mask, scoring)

    factor = gl.full([WARPGROUP_M], 1.0, gl.float32, layout=gl.SliceLayout(1, s_layout))
    heads = block.first_head + m % PACK
    tokens = block.first_query + m // PACK
    ours = tokens < block.query_end
    if scoring.sinks is not None:
        sink_scores = gl.load(scoring.sinks + heads, mask=ours, other=0.0).to(gl.float32)
        wanted = sees_any(mask, positions, block.length)
        row_sum, row_max, factor = add_sinks(row_sum, row_max, sink_scores, wanted)
    factor = gl.where(row_sum > 0.0, factor / gl.where(row_sum > 0.0, row_sum, 1.0), 0.0)
    if output.lse is not None:
        gl.store(lse_at(output, tokens, heads), lse_of(row_sum, row_max), mask=ours)
    factor = gl.convert_layout(factor, gl.SliceLayout(1, o_layout))
    acc = warpgroup_mma_wait(0, deps=[acc])

    # The output goes through the queries' shared memory, which this warpgroup alone has read, into whole lines.
    q_main.store((acc * factor[:, None]).to(q.dtype))
    thread_barrier()
    m = WHICH * WARPGROUP_M + gl.arange(0, WARPGROUP_M, layout=gl.SliceLayout(1, wide))
    tokens = block.first_query + m // PACK
    out = (
        output.out
        + tokens.to(gl.int64) * output.out_token_stride
        + (block.first_head + m % PACK) * output.out_head_stride
    )
    columns = gl.arange(0, HEAD_MAIN, layout=gl.SliceLayout(0, wide))
    gl.store(out[:, None] + columns[None, :], q_main.load(wide), mask=(tokens < block.query_end)[:, None])


@gluon.constexpr_function
def of_partitions(attending: int, loading: int, warpgroups: int, boxed: bool) -> list[int]:
    """A number of each partition but the first one, which attends: the others that do, then those that load."""
    return [attending] * (warpgroups - 1) + [loading] * (2 if boxed else 1)


@gluon.jit(
    do_not_specialize=[
        "tokens",
        "rows",
        "packs",
        "together",
        "pages",
        "table_stride",
        "lse_token_stride",
        "lse_head_stride",
    ],
    do_not_specialize_on_alignment=["lengths"],  # a chunk's begin anywhere in a table of all chunks
)
def taut_prefill(
    query: gl.tensor,  # [T, Hq, D]
    key: gl.tensor,  # [N, P, Hk, D] if gathered, else a descriptor of [N, Hk, P, D]; contiguous: of [1, Hk, K, D]
    value: gl.tensor,
    out: gl.tensor,  # [T, Hq, V]
    lse: gl.tensor,  # [T, Hq] or None
    sinks: gl.tensor,  # [Hq] or None
    slopes: gl.tensor,  # [Hq] or None
    query_starts: gl.tensor,  # [R + 1]
    lengths: gl.tensor,  # [R]; contiguous: key_starts [R + 1]
    table: gl.tensor,  # [*, pages], or None
    table_rows: gl.tensor,  # [R], or None
    tokens: gl.tensor,
    rows: gl.tensor,
    packs: gl.tensor,  # packs of heads
    together: gl.tensor,  # of them, how many run side by side
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
    GROUP: gl.constexpr,  # query heads of one key-value head
    PACK: gl.constexpr,  # of them, how many share a program; a power of two that divides GROUP
    MORE_THAN: gl.constexpr,  # rows with no more queries than this are left to another kernel
    CAUSAL: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    HAS_SOFT_CAP: gl.constexpr,
    PAGED: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    BOX: gl.constexpr,  # keys of a box of the copy engine, 0 where the keys are gathered
    BLOCK_N: gl.constexpr,
    HEAD_MAIN: gl.constexpr,
    HEAD_TAIL: gl.constexpr,
    WARPGROUPS: gl.constexpr,  # that attend, of 64 rows each; two, or where scores run ahead three
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,  # of a thread that attends
    LOAD_REGISTERS: gl.constexpr,  # of a thread that loads
) -> None:
    """One program attends for one block of queries of a row and PACK of its heads; see `hopper_launch.prefill`."""
    AHEAD: gl.constexpr = HEAD_MAIN == 64
    gl.static_assert(WARPGROUPS == 2 or AHEAD, "three warpgroups cannot attend by turns")
    BLOCK_M: gl.constexpr = WARPGROUP_M * WARPGROUPS
    QUERIES: gl.constexpr = BLOCK_M // PACK
    PACKS: gl.constexpr = GROUP // PACK
    pack, block_number = place_of(gl.program_id(0), packs, together, gl.num_programs(0) // packs)
    kv_head = pack // PACKS
    first_head = kv_head * GROUP + pack % PACKS * PACK
    row, first_block = row_of_block(query_starts, rows, block_number, QUERIES)
    row_start = gl.load(query_starts + row)
    row_end = tokens
    length = tokens * 0
    first_slot = tokens * 0
    if row < rows:
        row_end = gl.load(query_starts + row + 1)
        length = gl.load(lengths + row)
        if not PAGED:
            first_slot = length
            length = gl.load(lengths + row + 1) - length
    first_query = row_start + (block_number - first_block) * QUERIES
    if first_query >= row_end:
        return
    if (row < rows) & (row_end - row_start <= MORE_THAN):
        return
    first_position = length - (row_end - first_query)
    count = gl.minimum(row_end - first_query, QUERIES)
    row_pages = query_starts  # of no meaning without a table
    if PAGED:
        row_pages = table
        if row < rows:
            row_pages = pages_of_row(Table(table, table_rows, table_stride), row)

    mask = Mask(left, right, CAUSAL, HAS_LEFT, HAS_RIGHT)
    first_seen, end_seen, first_common, end_common = key_range(mask, first_position, count, length)
    # Tiles: some keys hidden from some query (only with a window), then all seen by all, then some hidden again. At
    # least one, in which nothing may be seen: then what is written is what a row without keys gets.
    start = first_seen // BLOCK_N * BLOCK_N
    tiles = gl.maximum(gl.cdiv(end_seen - start, BLOCK_N), 1)
    common_start = gl.cdiv(first_common - start, BLOCK_N)
    common_end = gl.maximum(end_common // BLOCK_N - start // BLOCK_N, common_start)
    common_start = gl.minimum(common_start, tiles)
    common_end = gl.minimum(common_end, tiles)
    block = Block(
        first_head, first_query, row_end, first_position, length, start, tiles, common_start, common_end,
        PACK, HAS_LEFT,
    )  # fmt: skip

    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    DTYPE: gl.constexpr = out.dtype.element_ty
    q = gl.allocate_shared_memory(DTYPE, [WARPGROUPS, WARPGROUP_M, HEAD_MAIN], layout)
    k = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, HEAD_MAIN], layout)
    v = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, HEAD_MAIN], layout)
    q_tail = q
    k_tail = k
    if HEAD_TAIL:
        q_tail = gl.allocate_shared_memory(DTYPE, [WARPGROUPS, WARPGROUP_M, HEAD_TAIL], layout)
        k_tail = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, HEAD_TAIL], layout)
    ring = make_ring(k, k_tail, v, HEAD_TAIL, BOX, WARPGROUPS, AHEAD, AHEAD)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for warpgroup in gl.static_range(2):
        mbarrier.init(turns.index(warpgroup), count=1)
    landed = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(landed.index(0), count=1)
    fence_async_shared()
    thread_barrier()

    scoring = scoring_of(scale, soft_cap, sinks, slopes, HAS_SOFT_CAP)
    queries = Queries(query, query_token_stride, query_head_stride)
    output = Output(out, lse, out_token_stride, out_head_stride, lse_token_stride, lse_head_stride)
    keys = half_of(
        key, key_page_stride, key_token_stride, key_head_stride, kv_head, ring.k, ring.k_tail, ring.k_full,
        ring.k_empty, BOX, HEAD_TAIL,
    )  # fmt: skip
    values = half_of(
        value, value_page_stride, value_token_stride, value_head_stride, kv_head, ring.v, ring.v, ring.v_full,
        ring.v_empty, BOX, 0,
    )  # fmt: skip
    cache = Cache(keys, values, pages, PAGED, PAGE_SIZE, BOX, BLOCK_N, HEAD_MAIN, STAGES, AHEAD)
    in_cache = Row(row_pages, kv_head, first_slot, first_seen, end_seen)
    gl.warp_specialize(
        [
            (attend, (Role(0, AHEAD), q, q_tail, ring, turns, queries, output, block, mask, scoring)),
            (attend, (Role(1, AHEAD), q, q_tail, ring, turns, queries, output, block, mask, scoring)),
        ]
        + (
            [(attend, (Role(2, AHEAD), q, q_tail, ring, turns, queries, output, block, mask, scoring))]
            if WARPGROUPS == 3
            else []
        )
        + (
            [(load_keys, (block, in_cache, cache)), (load_values, (block, in_cache, cache, as_pieces(v), landed))]
            if BOX
            else [(gather_tiles, (block, cache, in_cache))]
        ),
        of_partitions(4, 1 if BOX else GATHERING_WARPS, WARPGROUPS, BOX > 0),
        of_partitions(REGISTERS, LOAD_REGISTERS, WARPGROUPS, BOX > 0),
    )
