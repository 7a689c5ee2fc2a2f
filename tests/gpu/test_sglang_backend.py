"""SGLang's backend on a GPU without its engine: nothing waits, graphs serve later batches, scratch stays small."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

pytest.importorskip("sglang", reason="needs SGLang beside a GPU")

from adapters.test_sglang_backend import (
    CONTEXT,
    HEADS,
    KV_HEADS,
    SIZE,
    HybridPool,
    Pool,
    batch,
    layer,
    runner,
)
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from taut.adapters.engine import Selection
from taut.adapters.sglang import backend, selection

if TYPE_CHECKING:
    from collections.abc import Iterator

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANK, ROPE = 128, 64
WINDOW = 4


@pytest.fixture(autouse=True)
def _told(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(selection, "_state", selection._State(Selection("on")))
    monkeypatch.setattr(backend.TautBackend, "warm_up", lambda _: None)  # each test compiles what it needs
    with torch.device(DEVICE):
        yield


def built(kind: str) -> tuple[Any, Any, backend.TautBackend]:
    """A layer, SGLang's runner, and our backend: dense, windowed in a pool of its own, float8, or latent."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    cache = torch.float8_e4m3fn if kind == "float8" else dtype
    if kind == "latent":
        attention = layer(num_heads=16, head_dim=RANK + ROPE, num_kv_heads=1, v_head_dim=RANK)
        made = runner(attention, pool=Pool(1, RANK + ROPE, cache), mla=True, speculative_num_draft_tokens=3)
    elif kind == "windowed":
        attention = layer(sliding_window_size=WINDOW)
        pool = HybridPool()
        pool.keys, pool.values = pool.keys.to(cache), pool.values.to(cache)
        made = runner(attention, pool=pool, speculative_num_draft_tokens=3)
    else:
        attention = layer()
        made = runner(attention, pool=Pool(KV_HEADS, SIZE, cache), speculative_num_draft_tokens=3)
    made.device, made.dtype = DEVICE, dtype
    made.token_to_kv_pool.keys.zero_()  # whatever a batch sees was stored before: by nobody, here
    made.token_to_kv_pool.values.zero_()
    return attention, made, backend.TautBackend(made)


def inputs(kind: str, tokens: int, dtype: torch.dtype) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """Queries, keys and values of so many tokens, and what is given by name."""
    if kind == "latent":
        query, key = torch.randn(tokens, 16, RANK + ROPE).to(dtype), torch.randn(tokens, 1, RANK + ROPE).to(dtype)
        parts = {"q_rope": query[..., RANK:], "k_rope": key[..., RANK:]}
        return (query[..., :RANK].contiguous(), key[..., :RANK], key[..., :RANK]), parts
    query, key, value = (torch.randn(tokens, heads, SIZE).to(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return (query.flatten(1), key, value), {}


KINDS = ("dense", "windowed", "float8", "latent")
STEPS = (
    (ForwardMode.EXTEND, [9, 7], [9, 7]),
    (ForwardMode.EXTEND, [15, 8], [6, 1]),
    (ForwardMode.DECODE, [16, 9], [1, 1]),
    (ForwardMode.TARGET_VERIFY, [19, 12], [3, 3]),
)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_device(kind: str) -> None:
    """Metadata and a layer of each kind of step, with torch's check for waits set to raise."""
    attention, made, ours = built(kind)
    for mode, lengths, queries in STEPS:
        forward = batch(made, mode, lengths, queries)
        (query, key, value), parts = inputs(kind, sum(queries), made.dtype)
        ours.init_forward_metadata(forward)
        ours.forward(query, key, value, attention, forward, **parts)  # compiles, and asks the device what it is
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            ours.init_forward_metadata(forward)
            out = ours.forward(query, key, value, attention, forward, **parts)
        finally:
            if DEVICE == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        assert out.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [ForwardMode.DECODE, ForwardMode.TARGET_VERIFY])
def test_a_graph_serves_other_rows_and_lengths(kind: str, mode: ForwardMode) -> None:
    """Captured over the shortest rows, replayed over others: the numbers of a step that no graph holds."""
    attention, made, ours = built(kind)
    ours.init_cuda_graph_state(3, 9)
    queries = 1 if mode == ForwardMode.DECODE else 3
    captured = batch(made, mode, [queries + 1] * 3, [queries] * 3)
    (query, key, value), parts = inputs(kind, 3 * queries, made.dtype)

    def step() -> torch.Tensor:
        ours.init_forward_metadata_in_graph(captured)
        return ours.forward(query, key, value, attention, captured, **parts)

    ours.init_forward_metadata_out_graph(captured, in_capture=True)
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    lengths = [CONTEXT - 8, 5, 17]
    replayed = batch(made, mode, lengths, [queries] * 3)
    made.token_to_kv_pool.keys.copy_(torch.randn(made.token_to_kv_pool.keys.shape).to(made.token_to_kv_pool.keys.dtype))
    made.token_to_kv_pool.values.copy_(
        torch.randn(made.token_to_kv_pool.values.shape).to(made.token_to_kv_pool.values.dtype)
    )
    for name in ("req_pool_indices", "seq_lens", "out_cache_loc"):
        getattr(captured, name).copy_(getattr(replayed, name))
    ours.init_forward_metadata_out_graph(captured)
    held = torch.cuda.memory_allocated()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == held
    ours.init_forward_metadata(replayed)
    expected = ours.forward(query, key, value, attention, replayed, **parts)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


def test_scratch_is_mebibytes() -> None:
    """128 heads over latent vectors of 512, for 256 requests: one workspace for decode, one for other steps."""
    attention = layer(num_heads=128, head_dim=576, num_kv_heads=1, v_head_dim=512)
    made = runner(attention, pool=Pool(1, 576, torch.bfloat16), mla=True)
    made.device, made.dtype, made.req_to_token_pool.size = DEVICE, torch.bfloat16, 255
    ours = backend.TautBackend(made)
    ours.init_cuda_graph_state(256, 256)
    sizes = {key[0].max_query: workspace.size_in_bytes for key, workspace in ours.builder.workspaces.items()}
    print({queries: f"{size / 2**20:.0f} MiB" for queries, size in sizes.items()})  # noqa: T201 - for whoever runs -s
    assert sum(sizes.values()) < 512 << 20
