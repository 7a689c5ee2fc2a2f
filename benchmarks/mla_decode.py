"""MLA decode, latent 512 and rope 64, beside FlashMLA, FA3-MLA and TRITON_MLA of an installed vLLM.

    python -m benchmarks.mla_decode [FOLDER]        keeps mla_decode.json in FOLDER, by default benchmarks/results

Each row: heads, rows, cached tokens of each; one query token; pages of 64 tokens, shuffled; bfloat16.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.harness import RESULTS, Row, measure_ceilings, microseconds, peers_are_here, relative_error, report
from taut.common_kernels import portable
from taut.common_kernels.problem import Problem
from taut.common_kernels.step import PageTable, Step
from taut.common_kernels.targets import target_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

LATENT, ROPE, PAGE = 512, 64, 64
SCALE = 1 / math.sqrt(192)  # of the unabsorbed heads, 128 + 64
SHAPES = [
    (128, 1, 4096),
    (128, 1, 32768),
    (128, 1, 131072),
    (128, 8, 8192),
    (128, 32, 4096),
    (128, 64, 4096),
    (128, 128, 4096),
    (16, 1, 1024),
    (16, 1, 8192),
    (16, 1, 131072),
    (16, 32, 8192),
    (16, 128, 4096),
]


def inputs(heads: int, rows: int, context: int) -> tuple[Tensor, Tensor, Step]:
    """Queries [rows, heads, 576], a cache [pages, 64, 576] whose pages are shuffled, and the step."""
    pages = math.ceil(context / PAGE)
    cache = (torch.randn(rows * pages, PAGE, LATENT + ROPE, device="cuda") * 0.5).bfloat16()
    table = torch.randperm(rows * pages, device="cuda").view(rows, pages).int()
    lengths = torch.full((rows,), context, device="cuda", dtype=torch.int32)
    starts = torch.arange(rows + 1, device="cuda", dtype=torch.int32)
    query = torch.randn(rows, heads, LATENT + ROPE, device="cuda").bfloat16()
    return query, cache, Step(starts, lengths, PageTable(table, PAGE), 1, context)


def peers(query: Tensor, cache: Tensor, step: Step) -> dict[str, Callable[[], Tensor]]:
    """vLLM's kernels as calls that may be captured in a graph; each returns [rows, heads, 512]."""
    from vllm.v1.attention.backends.mla.triton_mla import _compute_num_kv_splits
    from vllm.v1.attention.ops.flashmla import flash_mla_with_kvcache, get_mla_metadata
    from vllm.v1.attention.ops.triton_decode_attention import decode_attention_fwd
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    rows, heads = query.shape[:2]
    table, lengths, context = step.pages.table, step.lengths, step.max_length
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    splits: Any = _compute_num_kv_splits(context, multiprocessors)
    out = query.new_empty(rows, heads, LATENT)
    lse = query.new_empty(rows, heads)
    partials = torch.empty(rows, heads, splits, LATENT + 1, device="cuda")
    one = torch.ones((), device="cuda")
    head_cache = cache.unsqueeze(2)
    metadata, _ = get_mla_metadata()

    def triton_mla() -> Tensor:
        decode_attention_fwd(
            query, head_cache, head_cache[..., :LATENT], out, lse, table, lengths, partials, splits, SCALE, PAGE,
            k_scale=one, v_scale=one, is_mla=True,
        )  # fmt: skip
        return out

    def flashmla() -> Tensor:
        answer = flash_mla_with_kvcache(
            query.unsqueeze(1), head_cache, table, lengths, LATENT, metadata, softmax_scale=SCALE, causal=False
        )[0]
        return answer.view(rows, heads, LATENT)

    def fa3_mla() -> Tensor:
        answer: Tensor = flash_attn_varlen_func(
            q=query[..., LATENT:], k=head_cache[..., LATENT:], v=head_cache[..., :LATENT], q_v=query[..., :LATENT],
            max_seqlen_q=1, cu_seqlens_q=step.query_starts, max_seqlen_k=context, seqused_k=lengths, block_table=table,
            softmax_scale=SCALE, causal=True, fa_version=3,
        )  # fmt: skip
        return answer

    return {"TRITON_MLA": triton_mla, "FlashMLA": flashmla, "FA3-MLA": fa3_mla}


def measure(heads: int, rows: int, context: int, with_peers: bool) -> Row:
    """One line of the table; the errors are held against TRITON_MLA."""
    query, cache, step = inputs(heads, rows, context)
    out = query.new_full((rows, heads, LATENT), math.nan)
    problem = Problem(
        "mla_decode", target_of(query.device), "bfloat16", "bfloat16", heads, 1, LATENT + ROPE, LATENT, PAGE, 1
    )
    workspace = portable.workspace(problem, rows, rows, "cuda:0")
    workspace.prepare(step)

    def ours() -> Tensor:
        portable.mla_decode(
            query[..., :LATENT], query[..., LATENT:], cache, step, out, scale=SCALE, workspace=workspace
        )
        return out

    row = Row(
        shape={"heads": heads, "rows": rows, "context": context},
        bytes=2 * (cache.numel() + rows * heads * (2 * LATENT + ROPE)),
        flops=2 * rows * heads * context * (2 * LATENT + ROPE),
        ours=microseconds(ours),
    )
    if with_peers:
        calls = peers(query, cache, step)
        row.against = "TRITON_MLA"
        right = calls["TRITON_MLA"]().clone()
        row.errors = {name: relative_error(call(), right) for name, call in {**calls, "taut": ours}.items()}
        row.peers = {name: microseconds(call) for name, call in calls.items()}
    return row


def schedule_times() -> dict[str, float]:
    """Microseconds of the schedule, once a step, by rows."""
    times = {}
    for heads, rows in ((128, 1), (128, 64), (128, 256), (16, 256), (16, 1024)):
        query, _, step = inputs(heads, rows, 1024)
        problem = Problem(
            "mla_decode", target_of(query.device), "bfloat16", "bfloat16", heads, 1, LATENT + ROPE, LATENT, PAGE, 1
        )
        workspace = portable.workspace(problem, rows, rows, "cuda:0")
        times[f"schedule us, {heads} heads, {rows} rows"] = microseconds(lambda w=workspace, s=step: w.prepare(s))  # type: ignore[misc]
    return times


def main() -> None:
    with_peers = peers_are_here()
    torch.manual_seed(0)
    ceilings = measure_ceilings()
    rows = [measure(*shape, with_peers) for shape in SHAPES]
    extra = schedule_times()
    if with_peers:
        ratios = [row.peers["TRITON_MLA"] / row.ours for row in rows]
        extra["times faster than TRITON_MLA, geometric mean"] = math.exp(sum(map(math.log, ratios)) / len(ratios))
        extra["largest error"] = max(max(row.errors.values()) for row in rows)
    report("mla_decode", rows, ceilings, extra, Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)


if __name__ == "__main__":
    main()
