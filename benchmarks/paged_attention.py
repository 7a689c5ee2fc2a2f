"""Dense attention, paged and contiguous, beside FlashAttention 3 and the unified Triton kernel of an installed vLLM.

    python -m benchmarks.paged_attention [FOLDER]      keeps paged_attention.json in FOLDER, or in benchmarks/results

Each row: query heads, key-value heads, sizes of keys and values, rows, tokens of each, and how many of them are new;
causal, bfloat16; pages of 16 tokens, shuffled, or page 0 where keys are contiguous.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from benchmarks.harness import RESULTS, Row, measure_ceilings, microseconds, peers_are_here, relative_error, report
from taut.common_kernels import portable
from taut.common_kernels.problem import Problem
from taut.common_kernels.step import Mask, PageTable, Step
from taut.common_kernels.targets import target_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class Shape(NamedTuple):
    q_heads: int
    kv_heads: int
    key: int
    value: int
    rows: int
    context: int
    queries: int
    page: int = 16


SHAPES = [
    Shape(32, 8, 128, 128, 1, 1024, 1),
    Shape(32, 8, 128, 128, 1, 32768, 1),
    Shape(32, 8, 128, 128, 1, 131072, 1),
    Shape(32, 8, 128, 128, 8, 8192, 1),
    Shape(32, 8, 128, 128, 64, 4096, 1),
    Shape(32, 8, 128, 128, 256, 1024, 1),
    Shape(64, 8, 128, 128, 32, 8192, 1),
    Shape(32, 8, 128, 128, 1, 8192, 8192),
    Shape(32, 8, 128, 128, 4, 4096, 4096),
    Shape(32, 8, 128, 128, 1, 16384, 2048),
    Shape(32, 8, 128, 128, 1, 8192, 8192, page=0),
    Shape(32, 8, 128, 128, 1, 16384, 2048, page=0),
    Shape(128, 128, 192, 128, 1, 4096, 4096, page=0),
    Shape(16, 16, 192, 128, 4, 8192, 8192, page=0),
]


class Inputs(NamedTuple):
    """Query [T, Hq, D]; keys and values [pages, page, Hk, *], or [K, Hk, *] with `key_starts`; the step."""

    query: Tensor
    key: Tensor
    value: Tensor
    step: Step
    key_starts: Tensor


def inputs(shape: Shape) -> Inputs:
    """Random tensors of a shape, ready on the device."""
    pages = math.ceil(shape.context / max(shape.page, 1))
    slots = (shape.rows * pages, shape.page) if shape.page else (shape.rows * pages,)
    key, value = (
        torch.randn(*slots, shape.kv_heads, size, device="cuda", dtype=torch.bfloat16)
        for size in (shape.key, shape.value)
    )
    table = torch.randperm(shape.rows * pages, device="cuda").view(shape.rows, pages).int()
    lengths = torch.full((shape.rows,), shape.context, device="cuda", dtype=torch.int32)
    counted = torch.arange(shape.rows + 1, device="cuda", dtype=torch.int32)
    query = torch.randn(shape.rows * shape.queries, shape.q_heads, shape.key, device="cuda", dtype=torch.bfloat16)
    pages_of = PageTable(table, max(shape.page, 1))
    step = Step(counted * shape.queries, lengths, pages_of, shape.queries, shape.context)
    torch.cuda.synchronize()  # what is timed runs in another stream
    return Inputs(query, key, value, step, counted * shape.context)


def ours(shape: Shape, given: Inputs) -> Callable[[], Tensor]:
    """This project's call; its schedule, once a step for all layers, is not in it."""
    query, key, value, step, key_starts = given
    out = query.new_full((len(query), shape.q_heads, shape.value), math.nan)
    scale = shape.key**-0.5
    if not shape.page:

        def ragged() -> Tensor:
            portable.ragged_attention(
                query, key, value, step.query_starts, key_starts, Mask(), out,
                scale=scale, max_query=shape.queries, max_length=shape.context,
            )  # fmt: skip
            return out

        return ragged
    problem = Problem(
        "paged_attention", target_of(query.device), "bfloat16", "bfloat16", shape.q_heads, shape.kv_heads,
        shape.key, shape.value, shape.page, shape.queries, frozenset({"causal"}),
    )  # fmt: skip
    workspace = portable.workspace(problem, shape.rows, len(query), "cuda:0")
    workspace.prepare(step)
    torch.cuda.synchronize()

    def paged() -> Tensor:
        portable.paged_attention(query, key, value, step, Mask(), out, scale=scale, workspace=workspace)
        return out

    return paged


def peers(shape: Shape, given: Inputs) -> dict[str, Callable[[], Tensor]]:
    """vLLM's kernels as calls that may be captured in a graph; each returns [T, Hq, V]."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    query, key, value, step, key_starts = given
    out = query.new_empty(len(query), shape.q_heads, shape.value)
    scale = shape.key**-0.5

    def fa3() -> Tensor:
        where = (
            {"seqused_k": step.lengths, "block_table": step.pages.table} if shape.page else {"cu_seqlens_k": key_starts}
        )
        answer: Tensor = flash_attn_varlen_func(
            q=query, k=key, v=value, max_seqlen_q=shape.queries, cu_seqlens_q=step.query_starts,
            max_seqlen_k=shape.context, softmax_scale=scale, causal=True, fa_version=3, **where,
        )  # fmt: skip
        return answer

    if not shape.page:
        return {"FA3": fa3}
    # It splits rows only for one query each and few rows, into 16, and then needs room for them.
    partials = torch.empty(len(query) if shape.queries == 1 else 1, shape.q_heads, 16, shape.value, device="cuda")
    maxima, sums = (torch.empty(partials.shape[:3], device="cuda") for _ in range(2))

    def unified() -> Tensor:
        unified_attention(
            q=query, k=key, v=value, out=out, cu_seqlens_q=step.query_starts, max_seqlen_q=shape.queries,
            seqused_k=step.lengths, max_seqlen_k=shape.context, softmax_scale=scale, causal=True, window_size=(-1, -1),
            block_table=step.pages.table, softcap=0, q_descale=None, k_descale=None, v_descale=None,
            seq_threshold_3D=128 // shape.kv_heads, num_par_softmax_segments=16, softmax_segm_output=partials,
            softmax_segm_max=maxima, softmax_segm_expsum=sums,
        )  # fmt: skip
        return out

    return {"FA3": fa3, "unified": unified}


def measure(shape: Shape, with_peers: bool) -> Row:
    """One line of the table; the errors are held against FlashAttention 3."""
    given = inputs(shape)
    call = ours(shape, given)
    seen = shape.queries * shape.context - shape.queries * (shape.queries - 1) // 2  # keys of all queries of a row
    elements = given.key.numel() + given.value.numel() + len(given.query) * shape.q_heads * (shape.key + shape.value)
    row = Row(
        shape=shape._asdict(),
        bytes=2 * elements,
        flops=2 * shape.rows * shape.q_heads * seen * (shape.key + shape.value),
        ours=microseconds(call),
    )
    if with_peers:
        calls = peers(shape, given)
        row.against = "FA3"
        right = calls["FA3"]().clone()
        row.errors = {name: relative_error(peer(), right) for name, peer in {**calls, "taut": call}.items()}
        row.peers = {name: microseconds(peer) for name, peer in calls.items()}
    return row


def main() -> None:
    with_peers = peers_are_here()
    torch.manual_seed(0)
    ceilings = measure_ceilings()
    rows = [measure(shape, with_peers) for shape in SHAPES]
    extra = {}
    if with_peers:
        ratios = [row.peers["unified"] / row.ours for row in rows if row.shape["queries"] == 1]
        extra["decode, times faster than unified, geometric mean"] = math.exp(sum(map(math.log, ratios)) / len(ratios))
        extra["largest error"] = max(max(row.errors.values()) for row in rows)
    report("paged_attention", rows, ceilings, extra, Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)


if __name__ == "__main__":
    main()
