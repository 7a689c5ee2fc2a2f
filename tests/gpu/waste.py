"""What a decode step of vLLM makes a GPU do inside our attention, counted. Run in a process of its own.

    python tests/gpu/waste.py MODEL_FOLDER COUNTS.json

The engine runs eagerly, so that each operation can be told from its neighbours. Every call of our implementations in
one decode step is counted twice over: what PyTorch launched, copied, filled or waited for meanwhile, as its profiler
saw it on the CPU's side, and what its allocator handed out.
"""

from __future__ import annotations

import functools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

MARK = "taut.attention"
KINDS = {
    "launches": ("LaunchKernel",),
    "copies": ("Memcpy",),
    "fills": ("Memset",),
    "syncs": ("Synchronize", "StreamQuery", "EventQuery"),
}
FILLS = ("aten::fill_", "aten::zero_", "aten::zeros", "aten::full", "aten::new_zeros", "aten::ones")
COPIES = ("aten::copy_", "aten::cat", "aten::contiguous", "aten::clone", "aten::to")

allocations: list[int] = []


def counted(method: Any) -> Any:
    """The method, with its allocations counted and its time marked."""

    @functools.wraps(method)
    def call(*arguments: Any, **named: Any) -> Any:
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        with record_function(MARK):
            answer = method(*arguments, **named)
        allocations.append(torch.cuda.memory_stats()["allocation.all.allocated"] - before)
        return answer

    return call


def mark_ours() -> None:
    from taut.adapters.vllm import dense, mla

    for implementation, names in (
        (dense.TautImplementation, ("do_kv_cache_update", "forward")),
        (mla.TautMLAImplementation, ("do_kv_cache_update", "forward_mqa")),
    ):
        for name in names:
            setattr(implementation, name, counted(getattr(implementation, name)))


def count(events: list[Any]) -> dict[str, int]:
    """Events inside our marks, by kind."""
    marks = [
        (e.time_range.start, e.time_range.end) for e in events if e.name == MARK and e.device_type == DeviceType.CPU
    ]
    counts: Counter[str] = Counter(calls=len(marks))
    for event in events:
        if event.device_type != DeviceType.CPU or event.name == MARK:
            continue
        if not any(start <= event.time_range.start <= end for start, end in marks):
            continue
        for kind, words in KINDS.items():
            counts[kind] += any(word in event.name for word in words)
        counts["torch_fills"] += event.name in FILLS
        counts["torch_copies"] += event.name in COPIES
    return dict(counts)


def main(model: str, target: Path) -> None:
    from vllm import LLM, SamplingParams

    mark_ours()
    engine = LLM(
        model, load_format="dummy", skip_tokenizer_init=True, max_model_len=4096, enforce_eager=True,
        gpu_memory_utilization=0.3, dtype="bfloat16", enable_prefix_caching=False,
    )  # fmt: skip
    core = engine.llm_engine
    for i in range(4):
        parameters = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
        core.add_request(str(i), {"prompt_token_ids": [5 + i + j % 90 for j in range(300 * (i + 1))]}, parameters)
    for _ in range(10):  # prefill, then decode until nothing compiles any more
        core.step()
    allocations.clear()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        core.step()
        torch.cuda.synchronize()
    kernels = Counter(e.name for e in trace.events() if e.device_type == DeviceType.CUDA)
    answer = count(list(trace.events())) | {"allocations": sum(allocations), "kernels": dict(kernels)}
    target.write_text(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
