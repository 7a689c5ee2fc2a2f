"""The kernels of others that are installed here, as calls that may be captured in a CUDA graph.

Each is called as its own project calls it, on the tensors of a task; what it plans once a step is planned beforehand,
as our schedule is. A peer that cannot serve a shape, or whose release is called otherwise, raises: it is then left out
of that row, and the reason is kept. The calls were written for vLLM 0.26.0, SGLang 0.5.17 and FlashInfer's wrappers.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from taut.benchmarks.operations import LATENT

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from taut.benchmarks.tasks import Call, Merge, MlaDecode, Paged, Ragged, Store


@dataclass(frozen=True)
class Peer:
    """A kernel of another project.

    Args:
        name: as its table has it.
        module: what must be importable.
        operations: what it can be measured for.
        build: from a task to the call; raises where it cannot serve.
    """

    name: str
    module: str
    operations: tuple[str, ...]
    build: Callable[[Any], Call]


def peers_for(operation: str) -> list[Peer]:
    """Every peer of an operation whose project is installed."""
    return [peer for peer in PEERS if operation in peer.operations and _installed(peer.module)]


def projects() -> dict[str, bool]:
    """The projects whose kernels are known here, and whether each is installed."""
    return {peer.module: _installed(peer.module) for peer in PEERS}


def _installed(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def _plain_cache(task: MlaDecode | Paged | Store) -> None:
    if task.shape["float8"]:
        raise ValueError("is called here with caches of bfloat16 only")


# vLLM


def _vllm_triton_mla(task: MlaDecode) -> Call:
    from vllm.v1.attention.backends.mla.triton_mla import _compute_num_kv_splits
    from vllm.v1.attention.ops.triton_decode_attention import decode_attention_fwd

    _plain_cache(task)
    _one_query(task)
    query, step, page = task.query, task.step, task.shape["page"]
    rows, heads = query.shape[:2]
    multiprocessors = torch.cuda.get_device_properties(query.device).multi_processor_count
    splits = _compute_num_kv_splits(step.max_length, multiprocessors)
    out, lse = query.new_empty(rows, heads, LATENT), query.new_empty(rows, heads)
    partials = torch.empty(rows, heads, splits, LATENT + 1, device=query.device)
    one = torch.ones((), device=query.device)
    cache = task.cache.unsqueeze(2)

    def run() -> Tensor:
        decode_attention_fwd(
            query, cache, cache[..., :LATENT], out, lse, step.pages.table, step.lengths, partials, splits, task.scale,
            page, k_scale=one, v_scale=one, is_mla=True,
        )  # fmt: skip
        return out

    return run


def _vllm_flashmla(task: MlaDecode) -> Call:
    from vllm.v1.attention.ops.flashmla import flash_mla_with_kvcache, get_mla_metadata

    _plain_cache(task)
    metadata, _ = get_mla_metadata()
    rows, queries = task.shape["rows"], task.shape["queries"]
    query = task.query.view(rows, queries, *task.query.shape[1:])
    cache, step = task.cache.unsqueeze(2), task.step

    def run() -> Tensor:
        answer: Tensor = flash_mla_with_kvcache(
            query, cache, step.pages.table, step.lengths, LATENT, metadata, softmax_scale=task.scale, causal=queries > 1
        )[0]
        return answer.view(task.out.shape)

    return run


def _vllm_fa3_mla(task: MlaDecode) -> Call:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    _plain_cache(task)
    query, cache, step = task.query, task.cache.unsqueeze(2), task.step

    def run() -> Tensor:
        answer: Tensor = flash_attn_varlen_func(
            q=query[..., LATENT:], k=cache[..., LATENT:], v=cache[..., :LATENT], q_v=query[..., :LATENT],
            max_seqlen_q=step.max_query, cu_seqlens_q=step.query_starts, max_seqlen_k=step.max_length,
            seqused_k=step.lengths, block_table=step.pages.table, softmax_scale=task.scale, causal=True, fa_version=3,
        )  # fmt: skip
        return answer

    return run


def _vllm_fa3(task: Paged) -> Call:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    _plain_cache(task)
    step = task.step

    def run() -> Tensor:
        answer: Tensor = flash_attn_varlen_func(
            q=task.query, k=task.keys, v=task.values, max_seqlen_q=step.max_query, cu_seqlens_q=step.query_starts,
            max_seqlen_k=step.max_length, seqused_k=step.lengths, block_table=step.pages.table,
            softmax_scale=task.scale, causal=True, fa_version=3,
        )  # fmt: skip
        return answer

    return run


def _vllm_fa3_ragged(task: Ragged) -> Call:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    def run() -> Tensor:
        answer: Tensor = flash_attn_varlen_func(
            q=task.query, k=task.keys, v=task.values, max_seqlen_q=task.shape["queries"],
            cu_seqlens_q=task.query_starts, max_seqlen_k=task.shape["context"], cu_seqlens_k=task.key_starts,
            softmax_scale=task.scale, causal=True, fa_version=3,
        )  # fmt: skip
        return answer

    return run


def _vllm_unified(task: Paged) -> Call:
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    _plain_cache(task)
    query, step = task.query, task.step
    out = torch.empty_like(task.out)
    # It splits rows only for one query each and few rows, into 16, and then needs room for them.
    split_rows = len(query) if step.max_query == 1 else 1
    partials = torch.empty(split_rows, query.shape[1], 16, task.shape["value"], device=query.device)
    maxima, sums = (torch.empty(partials.shape[:3], device=query.device) for _ in range(2))

    def run() -> Tensor:
        unified_attention(
            q=query, k=task.keys, v=task.values, out=out, cu_seqlens_q=step.query_starts, max_seqlen_q=step.max_query,
            seqused_k=step.lengths, max_seqlen_k=step.max_length, softmax_scale=task.scale, causal=True,
            window_size=(-1, -1), block_table=step.pages.table, softcap=0, q_descale=None, k_descale=None,
            v_descale=None, seq_threshold_3D=128 // task.shape["kv_heads"], num_par_softmax_segments=16,
            softmax_segm_output=partials, softmax_segm_max=maxima, softmax_segm_expsum=sums,
        )  # fmt: skip
        return out

    return run


def _vllm_store(task: Store) -> Call:
    from vllm._custom_ops import reshape_and_cache_flash

    kind = "fp8_e4m3" if task.shape["float8"] else "auto"
    caches = [c.view(torch.uint8) if task.shape["float8"] else c for c in (task.first_cache, task.second_cache)]

    def run() -> Tensor:
        reshape_and_cache_flash(task.first, task.second, *caches, task.slots, kind, task.one, task.one)
        return task.first_cache

    return run


def _vllm_store_mla(task: Any) -> Call:
    from vllm._custom_ops import concat_and_cache_mla

    kind = "fp8_e4m3" if task.shape["float8"] else "auto"
    cache = task.cache.view(torch.uint8) if task.shape["float8"] else task.cache

    def run() -> Tensor:
        concat_and_cache_mla(task.first, task.second, cache, task.slots, kind, task.one)
        whole: Tensor = task.cache
        return whole

    return run


def _vllm_merge(task: Merge) -> Call:
    from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

    _two_parts(task)
    lses = task.lses.transpose(1, 2).contiguous()  # [S, heads, tokens]

    def run() -> Tensor:
        merge_attn_states(task.out, task.parts[0], lses[0], task.parts[1], lses[1])
        return task.out

    return run


# SGLang


def _sglang_decode(task: MlaDecode | Paged) -> Call:
    import triton
    from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd
    from sglang.kernels.ops.attention.metadata import get_num_kv_splits_triton

    _plain_cache(task)
    _one_query(task)
    indptr, indices = _slots(task)
    latent = "cache" in vars(task)
    keys = vars(task)["cache"].flatten(0, 1).unsqueeze(1) if latent else vars(task)["keys"].flatten(0, 1)
    values = keys[..., :LATENT] if latent else vars(task)["values"].flatten(0, 1)
    rows, heads = task.query.shape[:2]
    multiprocessors = torch.cuda.get_device_properties(task.device).multi_processor_count
    # Its server's default, and for MLA its backend's for a model of long context.
    most = triton.next_power_of_2(multiprocessors) if latent else 8
    splits = torch.empty(rows, dtype=torch.int32, device=task.device)
    get_num_kv_splits_triton[(1,)](
        splits, task.step.lengths, rows, 1, heads, keys.shape[1], most, multiprocessors,
        MAX_NUM_SEQ=max(256, triton.next_power_of_2(rows)),
    )  # fmt: skip
    partials = torch.empty(rows, heads, most, values.shape[-1], device=task.device)
    lses = torch.empty(rows, heads, most, device=task.device)
    out = torch.empty_like(task.out)

    def run() -> Tensor:
        decode_attention_fwd(
            task.query, keys, values, out, indptr, indices, partials, lses, splits, most, task.scale, 1.0, 1.0,
            has_mla=latent,
        )  # fmt: skip
        return out

    return run


# FlashInfer


def _flashinfer_decode(task: Paged) -> Call:
    import flashinfer

    _plain_cache(task)
    _one_query(task)
    shape, step = task.shape, task.step
    if shape["key"] != shape["value"]:
        raise ValueError("is called here with keys and values of one size only")
    per_row = math.ceil(step.max_length / shape["page"])
    indptr = torch.arange(step.rows + 1, dtype=torch.int32, device=task.device) * per_row
    last = torch.full_like(step.lengths, (step.max_length - 1) % shape["page"] + 1)
    room = torch.empty(256 << 20, dtype=torch.uint8, device=task.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(room, "NHD", use_tensor_cores=True)
    wrapper.plan(
        indptr, step.pages.table.flatten(), last, shape["q_heads"], shape["kv_heads"], shape["key"], shape["page"],
        q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
    )  # fmt: skip
    out = torch.empty_like(task.out)

    def run() -> Tensor:
        wrapper.run(task.query, (task.keys, task.values), out=out)
        return out

    return run


def _slots(task: MlaDecode | Paged) -> tuple[Tensor, Tensor]:
    """The slots of every row's tokens, row after row, as SGLang keeps them: [rows + 1], [tokens], int32 and int64."""
    step, page = task.step, task.shape["page"]
    positions = torch.arange(step.max_length, device=task.device)
    slots = step.pages.table.long()[:, positions // page] * page + positions % page
    indptr = torch.arange(step.rows + 1, dtype=torch.int32, device=task.device) * step.max_length
    return indptr, slots.flatten()


def _one_query(task: MlaDecode | Paged) -> None:
    if task.step.max_query != 1:
        raise ValueError("takes one new token a row")


def _two_parts(task: Merge) -> None:
    if task.shape["parts"] != 2:
        raise ValueError("merges two parts")


PEERS: tuple[Peer, ...] = (
    Peer("TRITON_MLA", "vllm", ("mla_decode",), _vllm_triton_mla),
    Peer("FlashMLA", "vllm", ("mla_decode",), _vllm_flashmla),
    Peer("FA3-MLA", "vllm", ("mla_decode",), _vllm_fa3_mla),
    Peer("FA3", "vllm", ("paged_decode", "paged_extend"), _vllm_fa3),
    Peer("FA3", "vllm", ("ragged_prefill",), _vllm_fa3_ragged),
    Peer("unified", "vllm", ("paged_decode", "paged_extend"), _vllm_unified),
    Peer("vLLM", "vllm", ("store_kv",), _vllm_store),
    Peer("vLLM", "vllm", ("store_mla_kv",), _vllm_store_mla),
    Peer("vLLM", "vllm", ("merge",), _vllm_merge),
    Peer("SGLang triton", "sglang", ("mla_decode", "paged_decode"), _sglang_decode),
    Peer("FlashInfer", "flashinfer", ("paged_decode",), _flashinfer_decode),
)
