"""The SGLang adapter without an engine: what it does per step and per layer, counted; and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("sglang", reason="needs SGLang's classes: make sglang")

from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.speculative.spec_info import SpecInputType

from taut.adapters.engine import Selection
from taut.adapters.sglang import backend, selection
from taut.adapters.sglang.batch import batch_of
from taut.adapters.sglang.builder import Steps
from taut.common_kernels import reference

HEADS, KV_HEADS, SIZE, SLOTS, CONTEXT, REQUESTS = 6, 2, 32, 96, 40, 5


class Operations(TorchDispatchMode):
    """Every aten operation that runs inside, by name; views leave the data where it is and do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(argument.alias_info for argument in func._schema.returns) or func._schema.is_mutable:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_state", selection._State(Selection("on")))


class Pool:
    """A pool of SGLang's: [slots, heads, size] for each layer, poisoned."""

    def __init__(self, heads: int, size: int, dtype: torch.dtype = torch.float32) -> None:
        self.keys, self.values = (torch.full((SLOTS, heads, size), torch.nan).to(dtype) for _ in range(2))

    def get_key_buffer(self, _layer: int) -> torch.Tensor:
        return self.keys

    def get_value_buffer(self, _layer: int) -> torch.Tensor:
        return self.values


class HybridPool(Pool):
    """A pool that keeps the keys of windowed layers apart, in slots of their own: the mirrored ones."""

    def __init__(self) -> None:
        super().__init__(KV_HEADS, SIZE)
        self.layers_mapping = {0: (0, True)}
        self.full_to_swa_index_mapping = torch.arange(SLOTS - 1, -1, -1)


def layer(**different: Any) -> RadixAttention:
    usual = {"num_heads": HEADS, "head_dim": SIZE, "scaling": SIZE**-0.5, "num_kv_heads": KV_HEADS, "layer_id": 0}
    return RadixAttention(**(usual | different))


def runner(*layers: RadixAttention, pool: Pool | None = None, mla: bool = False, **arguments: Any) -> Any:
    model = torch.nn.ModuleList(layers)
    pool = pool or Pool(KV_HEADS, SIZE)
    table = torch.full((REQUESTS, CONTEXT), 2**30, dtype=torch.int32)
    return SimpleNamespace(
        model=model, token_to_kv_pool=pool, req_to_token_pool=SimpleNamespace(req_to_token=table, size=REQUESTS - 1),
        device="cpu", dtype=torch.float32, kv_cache_dtype=pool.keys.dtype, use_mla_backend=mla,
        sliding_window_size=None,
        server_args=SimpleNamespace(chunked_prefill_size=64, **arguments), is_draft_worker=False,
    )  # fmt: skip


def batch(made: Any, mode: ForwardMode, lengths: list[int], queries: list[int], **more: Any) -> Any:
    """A batch over requests 3, 1, ...: `lengths` tokens each, the last `queries` of them new; slots from the end."""
    rows = [3, 1, 4][: len(lengths)]
    table, slots, free = made.req_to_token_pool.req_to_token, [], SLOTS - 1
    for row, length, new in zip(rows, lengths, queries, strict=True):
        table[row] = torch.where(torch.arange(CONTEXT) < length, free - torch.arange(CONTEXT, dtype=torch.int32), 0)
        slots += table[row, length - new : length].tolist()
        free -= 30
    verify = mode == ForwardMode.TARGET_VERIFY
    seq_lens = [length - new for length, new in zip(lengths, queries, strict=True)] if verify else lengths
    return SimpleNamespace(
        forward_mode=mode, batch_size=len(lengths), req_pool_indices=torch.tensor(rows),
        seq_lens=torch.tensor(seq_lens),
        input_ids=torch.zeros(sum(queries), dtype=torch.int64), out_cache_loc=torch.tensor(slots),
        extend_seq_lens=torch.tensor(queries, dtype=torch.int32), extend_seq_lens_cpu=queries,
        extend_prefix_lens_cpu=[n - q for n, q in zip(lengths, queries, strict=True)],
        spec_info=SimpleNamespace(draft_token_num=queries[0]) if verify else None, **more,
    )  # fmt: skip


def test_a_step_costs_two_launches_and_a_decode_step_one() -> None:
    made = runner()
    steps = Steps(made.req_to_token_pool.req_to_token, REQUESTS)
    for mode, queries, expected in (
        (ForwardMode.DECODE, [1, 1], ["aten.add.out"]),
        (ForwardMode.EXTEND, [4, 2], ["aten.add.out", "aten.cumsum.out"]),
    ):
        forward = batch(made, mode, [9, 7], queries)
        with Operations() as seen:
            metadata = steps.metadata(batch_of(forward, in_graph=False))
            steps.fill(metadata)
        assert seen.names == expected
        assert metadata.step.pages.table is made.req_to_token_pool.req_to_token
        assert metadata.step.lengths.tolist() == [9, 7]
        assert metadata.step.query_starts.tolist() == [0, queries[0], sum(queries)]


@pytest.mark.parametrize("offered", [False, True])
def test_a_layer_costs_its_kernels_and_nothing_else(offered: bool) -> None:
    """With kernels that do nothing: no fill, no copy; a new tensor only where SGLang offers none, and that once."""
    attention = layer()
    made = runner(attention)
    ours = backend.TautBackend(made)
    calls: list[str] = []
    ours.services[attention, 1] = replace(
        ours.services[attention, 1],
        kernels=SimpleNamespace(
            workspace=reference.workspace,
            store_kv=lambda *_, **__: calls.append("store_kv"),
            paged_attention=lambda *_, **__: calls.append("paged_attention"),
        ),
    )
    forward = batch(made, ForwardMode.DECODE, [9, 7], [1, 1])
    ours.init_forward_metadata(forward)
    query, key = torch.randn(2, HEADS * SIZE), torch.randn(2, KV_HEADS, 3 * SIZE)[..., :SIZE]
    out = torch.full((2, HEADS * SIZE), torch.nan)
    if offered:
        forward._attn_output = out
    with Operations() as seen:
        given = ours.forward(query, key, key, attention, forward)
    assert calls == ["store_kv", "paged_attention"]
    assert seen.names == ([] if offered else ["aten.new_empty.default"])
    assert (given is out) == offered
    assert not offered or forward._attn_output is None
    assert ours.forward(query, key, key, attention, forward) is not out


def test_a_tensor_that_is_not_this_layers_is_left_alone() -> None:
    """Releases before 0.5.23 leave the tensor of the last captured layer behind, whatever layer comes next."""
    attention = layer()
    made = runner(attention)
    ours = backend.TautBackend(made)
    query, key = torch.randn(2, HEADS * SIZE), torch.randn(2, KV_HEADS, SIZE)
    for stale in (torch.zeros(3, HEADS * SIZE), torch.zeros(2, HEADS * SIZE, dtype=torch.bfloat16)):
        forward = batch(made, ForwardMode.DECODE, [1, 1], [1, 1])
        forward._attn_output = stale
        ours.init_forward_metadata(forward)
        out = ours.forward(query, key, key, attention, forward)
        assert (out.shape, out.dtype) == ((2, HEADS * SIZE), torch.float32)
        assert not stale.any()
    room = torch.full((3, HEADS * SIZE), torch.nan)  # of padded tokens, of which two are tokens
    forward._attn_output = mine = room[:2]
    assert ours.forward(query, key, key, attention, forward) is mine
    assert room[:2].isfinite().all()
    assert room[2].isnan().all()


@pytest.mark.parametrize("window", [-1, 4])
@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("mode", [ForwardMode.DECODE, ForwardMode.TARGET_VERIFY])
def test_prefill_then_more(window: int, hybrid: bool, mode: ForwardMode) -> None:
    """Through a poisoned pool, against torch's own attention over all keys; the radius of a window is inclusive."""
    if hybrid and window < 0:
        pytest.skip("a hybrid pool is for windowed layers")
    torch.manual_seed(0)
    attention = layer(sliding_window_size=window)
    made = runner(attention, pool=HybridPool() if hybrid else None)
    ours = backend.TautBackend(made)
    new = [1, 1] if mode == ForwardMode.DECODE else [3, 3]
    keys = [torch.empty(0, KV_HEADS, SIZE) for _ in new]
    values = [torch.empty(0, KV_HEADS, SIZE) for _ in new]
    for kind, lengths, queries in (
        (ForwardMode.EXTEND, [9, 7], [9, 7]),
        (ForwardMode.EXTEND, [15, 8], [6, 1]),
        (mode, [15 + new[0], 8 + new[1]], new),
    ):
        forward = batch(made, kind, lengths, queries)
        ours.init_forward_metadata(forward)
        total = sum(queries)
        query, key, value = (torch.randn(total, heads, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS))
        out = ours.forward(query.flatten(1), key, value, attention, forward).view(total, HEADS, SIZE)
        first = 0
        for row, (length, count) in enumerate(zip(lengths, queries, strict=True)):
            own = slice(first, first + count)
            first += count
            keys[row], values[row] = torch.cat([keys[row], key[own]]), torch.cat([values[row], value[own]])
            distance = torch.arange(length)[None] - torch.arange(length - count, length)[:, None]
            seen = (distance <= 0) & (distance >= -(window if window > 0 else length))
            expected = torch.nn.functional.scaled_dot_product_attention(
                *(t.transpose(0, 1) for t in (query[own], keys[row], values[row])), attn_mask=seen, enable_gqa=True
            ).transpose(0, 1)
            torch.testing.assert_close(out[own], expected, rtol=1e-5, atol=1e-5)


def test_captured_metadata_of_both_kinds() -> None:
    """A graph's step reads the same tensors later, with other lengths; the older hooks fill them at each replay."""
    attention = layer()
    made = runner(attention)
    ours = backend.TautBackend(made)
    forward = batch(made, ForwardMode.DECODE, [9, 7], [1, 1])
    ours.init_forward_metadata_out_graph(forward, in_capture=True)
    ours.init_forward_metadata_in_graph(forward)
    assert ours.forward_metadata is not None
    step = ours.forward_metadata.step
    assert step.lengths.tolist() == [9, 7]
    forward.seq_lens.copy_(torch.tensor([10, 8]))
    ours.init_forward_metadata_in_graph(forward)  # what a replay runs again
    assert step.lengths.tolist() == [10, 8]
    arguments = (forward.req_pool_indices, forward.seq_lens)
    ours.init_forward_metadata_capture_cuda_graph(2, 2, *arguments, None, ForwardMode.DECODE, None)
    older = ours.forward_metadata.step
    forward.seq_lens.copy_(torch.tensor([11, 9]))
    ours.init_forward_metadata_replay_cuda_graph(2, *arguments, 20, None, ForwardMode.DECODE, None, None)
    assert older.lengths.tolist() == [11, 9]
    with pytest.raises(ValueError, match="cannot be captured in a CUDA graph"):
        ours.init_cuda_graph_state(8, 8)  # the reference


def test_older_hooks_fill_the_windowed_pages_where_a_graph_reads_them() -> None:
    attention = layer(sliding_window_size=4)
    made = runner(attention, pool=HybridPool())
    ours = backend.TautBackend(made)
    forward = batch(made, ForwardMode.DECODE, [9, 7], [1, 1])
    arguments = (forward.req_pool_indices, forward.seq_lens)
    ours.init_forward_metadata_capture_cuda_graph(2, 2, *arguments, None, ForwardMode.DECODE, None)
    assert ours.forward_metadata is not None
    captured = ours.forward_metadata.windowed
    assert captured is not None
    assert captured.lengths.tolist() == [5, 5]
    table, lengths = captured.pages.table, captured.lengths
    forward.seq_lens.copy_(torch.tensor([3, 8]))
    ours.init_forward_metadata_replay_cuda_graph(2, *arguments, 11, None, ForwardMode.DECODE, None, None)
    assert ours.forward_metadata.windowed is captured
    assert lengths.tolist() == [3, 5]
    slots = made.req_to_token_pool.req_to_token[3, :3].long()
    assert table[0, :3].tolist() == made.token_to_kv_pool.full_to_swa_index_mapping[slots].tolist()


def test_a_graph_reads_the_table_to_its_end() -> None:
    """From 0.5.18 on SGLang asks when its scheduler may write to `req_to_token` again."""
    base = pytest.importorskip("sglang.srt.layers.attention.base_attn_backend")
    if not hasattr(base, "SharedReadEnds"):
        pytest.skip("from 0.5.18 on")
    ours, ends = backend.TautBackend(runner(layer())), base.SharedReadEnds
    assert ours.shared_read_ends(ForwardMode.DECODE) is ends.POST_REPLAY
    assert ours.shared_read_ends(ForwardMode.TARGET_VERIFY) is ends.POST_REPLAY
    assert ours.shared_read_ends(ForwardMode.EXTEND) is ends.UNKNOWN


def test_a_replay_reads_the_batch_it_is_given() -> None:
    """Not the one that was captured, whose tensors may be others: with other rows and other lengths."""
    attention = layer()
    made = runner(attention)
    ours = backend.TautBackend(made)
    captured = batch(made, ForwardMode.DECODE, [2, 1], [1, 1])
    ours.init_forward_metadata_out_graph(captured, in_capture=True)
    ours.init_forward_metadata_in_graph(captured)
    replayed = batch(made, ForwardMode.DECODE, [9, 7], [1, 1])
    replayed.req_pool_indices = torch.tensor([1, 4])
    ours.init_forward_metadata_out_graph(replayed)
    ours.init_forward_metadata_in_graph(replayed)
    assert ours.forward_metadata is not None
    assert ours.forward_metadata.step.lengths.tolist() == [9, 7]
    assert ours.forward_metadata.step.pages.rows.tolist() == [1, 4]


def test_a_captured_prompt_is_made_ready_before_each_replay() -> None:
    """Its graph holds the layers alone: lengths and starts must lie where the graph reads them."""
    made = runner(layer())
    ours = backend.TautBackend(made)
    ours.init_forward_metadata_out_graph(batch(made, ForwardMode.EXTEND, [4, 2], [4, 2]), in_capture=True)
    assert ours.forward_metadata is not None
    step = ours.forward_metadata.step
    ours.init_forward_metadata_out_graph(batch(made, ForwardMode.EXTEND, [9, 7], [5, 1]))
    assert step.lengths.tolist() == [9, 7]
    assert step.query_starts.tolist() == [0, 5, 6]


def test_kernels_are_made_for_the_queries_of_a_row() -> None:
    """One for decode, as many as are verified, and any number for prompts; each with a workspace of its own."""
    attention = layer(sliding_window_size=4)
    ours = backend.TautBackend(runner(attention, speculative_num_draft_tokens=3))
    problems = {queries: ours.services[attention, queries].problem for queries in (0, 1, 3)}
    assert {queries: problem.max_query for queries, problem in problems.items()} == {0: 0, 1: 1, 3: 3}
    assert all(problem.left == 4 for problem in problems.values())
    assert {problem.max_query for problem, _ in ours.builder.workspaces} == {0, 1, 3}
    made = runner(attention, speculative_num_draft_tokens=3)
    for mode, queries in (
        (ForwardMode.DECODE, [1, 1]),
        (ForwardMode.TARGET_VERIFY, [3, 3]),
        (ForwardMode.EXTEND, [4, 2]),
    ):
        ours.init_forward_metadata(batch(made, mode, [9, 7], queries))
        assert ours.forward_metadata is not None
        assert {problem.max_query for problem, _ in ours.forward_metadata.prepared} == {
            queries[0] if mode != ForwardMode.EXTEND else 0
        }


def test_warm_up_runs_every_kind_of_step_and_leaves_the_cache_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = layer()
    made = runner(attention, layer(), speculative_num_draft_tokens=3)
    ours = backend.TautBackend(made)
    steps: list[tuple[int, int, int]] = []

    def attend(query: torch.Tensor, _keys: Any, _values: Any, step: Any, *_: Any, **__: Any) -> None:
        steps.append((step.rows, query.shape[0], step.max_query))

    monkeypatch.setattr(reference, "paged_attention", attend)
    ours.warm_up()
    decode = [(rows, rows, 1) for rows in (1, 2, 4)]
    verify = [(rows, 3 * rows, 3) for rows in (1, 2, 4)]
    prompts = [(1, 1, 1 << power) for power in range(ours.builder.max_tokens.bit_length())]
    assert prompts[-1][2] == ours.builder.max_tokens
    assert sorted(steps) == sorted([*decode, *verify, *prompts, (4, 4, 1)])
    assert made.token_to_kv_pool.keys.isnan().all()
    assert ours.forward_metadata is None
    assert "step" not in selection._state.said  # no step of SGLang's
    monkeypatch.undo()
    backend.TautBackend(runner(layer())).warm_up()  # the reference runs them, too: rows without keys
    windowed = runner(layer(sliding_window_size=4), pool=HybridPool())  # whose `req_to_token` holds no slots as yet
    backend.TautBackend(windowed).warm_up()


@pytest.mark.parametrize("encoder", [False, True])
def test_soft_cap_and_sinks(encoder: bool) -> None:
    torch.manual_seed(0)
    kind = AttentionType.ENCODER_ONLY if encoder else AttentionType.DECODER
    attention = layer(logit_cap=5.0, attn_type=kind)
    made = runner(attention)
    ours = backend.TautBackend(made)
    forward = batch(made, ForwardMode.EXTEND, [5, 3], [5, 3])
    ours.init_forward_metadata(forward)
    query, key, value = (torch.randn(8, heads, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS))
    sinks = torch.randn(HEADS, dtype=torch.float64)
    out = ours.forward(query.flatten(1), key, value, attention, forward, sinks=sinks).view(8, HEADS, SIZE)
    for own in (slice(0, 5), slice(5, 8)):
        keys, values = (t[own].repeat_interleave(HEADS // KV_HEADS, 1) for t in (key, value))
        scores = 5.0 * torch.tanh(torch.einsum("qhd,khd->hqk", query[own], keys) * SIZE**-0.5 / 5.0)
        if not encoder:
            scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
        weights = torch.cat([scores, sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)], -1).softmax(-1)
        expected = torch.einsum("hqk,khd->qhd", weights[..., :-1], values)
        torch.testing.assert_close(out[own], expected, rtol=1e-5, atol=1e-5)


def test_sinks_are_converted_once() -> None:
    attention = layer()
    ours = backend.TautBackend(runner(attention))
    sinks = torch.randn(HEADS, dtype=torch.bfloat16)
    kept = ours.attention._float_sinks(attention, sinks)
    assert ours.attention._float_sinks(attention, sinks) is kept
    sinks.add_(1)  # as when weights are loaded anew
    assert torch.equal(ours.attention._float_sinks(attention, sinks), sinks.float())


def test_a_float8_cache_is_read_with_its_scales_and_never_cast() -> None:
    torch.manual_seed(0)
    attention = layer()
    attention.k_scale, attention.v_scale = torch.tensor([0.5]), 0.25
    made = runner(attention, pool=Pool(KV_HEADS, SIZE, torch.float8_e4m3fn))
    ours = backend.TautBackend(made)
    forward = batch(made, ForwardMode.EXTEND, [5], [5])
    ours.init_forward_metadata(forward)
    query, key, value = (torch.randn(5, heads, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS))
    before = key.clone(), value.clone()
    out = ours.forward(query.flatten(1), key, value, attention, forward).view(5, HEADS, SIZE)
    assert torch.equal(key, before[0])  # SGLang's own pool divides them in place
    assert torch.equal(value, before[1])
    stored = [(t / s).to(torch.float8_e4m3fn).float() * s for t, s in ((key, 0.5), (value, 0.25))]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(0, 1) for t in (query, *stored)), is_causal=True, enable_gqa=True
    ).transpose(0, 1)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(made.token_to_kv_pool.keys[forward.out_cache_loc].float() * 0.5, stored[0])


def test_a_layer_without_keys_reads_those_of_the_layer_it_shares_them_with() -> None:
    torch.manual_seed(0)
    attention = layer()
    made = runner(attention)
    ours = backend.TautBackend(made)
    forward = batch(made, ForwardMode.EXTEND, [5], [5])
    ours.init_forward_metadata(forward)
    query, key, value = (torch.randn(5, heads, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS))
    first = ours.forward(query.flatten(1), key, value, attention, forward)
    assert torch.equal(ours.forward(query.flatten(1), None, None, attention, forward), first)
    kept = made.token_to_kv_pool.keys.clone()
    ours.forward(query.flatten(1), key + 1, value, attention, forward, save_kv_cache=False)
    torch.testing.assert_close(made.token_to_kv_pool.keys, kept, equal_nan=True)
    with pytest.raises(ValueError, match="keys without values"):
        ours.forward(query.flatten(1), key, None, attention, forward)


def test_a_pool_that_sglang_exchanges_is_read_from_then_on() -> None:
    """As drafts over the keys of the model that they draft for: SGLang sets the attribute, and sets it back."""
    attention, own, other = layer(), Pool(KV_HEADS, SIZE), Pool(KV_HEADS, SIZE)
    for number, pool in enumerate((own, other)):
        pool.keys.zero_()
        pool.values.fill_(number)
    made = runner(attention, pool=own)
    ours = backend.TautBackend(made)
    forward = batch(made, ForwardMode.DECODE, [5], [1])
    ours.init_forward_metadata(forward)
    query = torch.randn(1, HEADS * SIZE)
    for pool in (own, other, own):
        ours.token_to_kv_pool = pool
        out = ours.forward(query, None, None, attention, forward, save_kv_cache=False)
        torch.testing.assert_close(out, torch.full_like(out, float(pool is other)))


def test_what_is_not_known_is_refused_by_name() -> None:
    attention = layer()
    made = runner(attention)
    ours = backend.TautBackend(made)
    forward = batch(made, ForwardMode.DECODE, [9], [1])
    ours.init_forward_metadata(forward)
    query, key = torch.randn(1, HEADS * SIZE), torch.randn(1, KV_HEADS, SIZE)
    with pytest.raises(ValueError, match="argument score_mod is not supported"):
        ours.forward(query, key, key, attention, forward, score_mod=len)
    ours.forward(query, key, key, attention, forward, score_mod=None)
    assert ours.forward_metadata is not None
    with pytest.raises(ValueError, match="custom_mask"):
        ours.forward_metadata.custom_mask = torch.ones(1)
    with pytest.raises(ValueError, match=r"in two parts \(q_rope, k_rope\) for a layer without MLA"):
        ours.forward(query, key, key, attention, forward, q_rope=query)


def test_the_mask_of_drafts_is_small_and_never_filled() -> None:
    """Without one of ours SGLang fills as many bytes as all contexts have tokens, each time drafts are verified."""
    pytest.importorskip("sglang.srt.layers.attention.verify_mask", reason="from 0.5.17 on")
    assert backend.TautBackend(runner(layer())).verify_mask is None
    ours = backend.TautBackend(runner(layer(), speculative_num_draft_tokens=3))
    assert not ours.verify_mask.is_read
    assert ours.verify_mask.fits(REQUESTS - 1)
    assert ours.verify_mask.buffer.numel() == (REQUESTS - 1) * 3 * 3
    assert ours.max_context_len == CONTEXT  # by which the mask is made that SGLang falls back on


def test_a_tree_of_drafts_is_refused_before_a_number_is_computed() -> None:
    """Whoever builds batches without SGLang's arguments, which were refused before."""
    made = runner(layer())
    ours = backend.TautBackend(made)
    forward = batch(made, ForwardMode.TARGET_VERIFY, [9, 7], [3, 3])
    forward.spec_info.topk = 1
    ours.init_forward_metadata(forward)
    for tree in ({"topk": 2}, {"spec_input_type": SpecInputType.NGRAM_VERIFY}):
        forward.spec_info = SimpleNamespace(draft_token_num=3, **tree)
        with pytest.raises(ValueError, match="verifies a tree of drafts"):
            ours.init_forward_metadata(forward)
        with pytest.raises(ValueError, match="verifies a tree of drafts"):
            ours.init_forward_metadata_out_graph(forward, in_capture=True)


@pytest.mark.parametrize(
    ("different", "arguments", "says"),
    [
        ({"is_cross_attention": True}, {}, "is_cross_attention"),
        ({"attn_type": AttentionType.DECODER_BIDIRECTIONAL}, {"chunked_prefill_size": -1}, "DECODER_BIDIRECTIONAL"),
        ({}, {"kv_cache_dtype": "fp4_e2m1"}, "--kv-cache-dtype fp4_e2m1"),
        ({}, {"speculative_algorithm": "NGRAM", "speculative_ngram_max_bfs_breadth": 1}, "verifies trees"),
        ({}, {"speculative_algorithm": "EAGLE", "speculative_eagle_topk": 4}, "verifies trees"),
        ({}, {"speculative_algorithm": "DFLASH"}, "drafts of --speculative-algorithm DFLASH is not supported"),
        ({"logit_cap": 30.0, "logit_capping_method": "sigmoid"}, {}, "logit_capping_method=sigmoid"),
        ({"pos_encoding_mode": "ALIBI"}, {}, "pos_encoding_mode=ALIBI"),
        ({}, {"dcp_size": 2}, "context parallelism"),
        ({}, {"enable_deterministic_inference": True}, "do not depend on the batch"),
    ],
)
def test_what_cannot_be_served_is_refused_before_it_is(
    different: dict[str, Any], arguments: dict[str, Any], says: str
) -> None:
    made = runner(layer(**different))
    for name, value in arguments.items():
        setattr(made.server_args, name, value)
    with pytest.raises(ValueError, match=says):
        backend.TautBackend(made)


def test_every_layers_reason_is_named_once() -> None:
    both = layer(pos_encoding_mode="ALIBI"), layer(pos_encoding_mode="ALIBI"), layer(is_cross_attention=True)
    with pytest.raises(ValueError, match=r"^[^;]*: pos_encoding_mode=ALIBI [^;]*; cross attention [^;]*$"):
        backend.TautBackend(runner(*both))


def test_a_temperature_by_position_is_refused() -> None:
    attention = layer()
    attention.xai_temperature_len = 1024
    with pytest.raises(ValueError, match="xai_temperature_len=1024"):
        backend.TautBackend(runner(attention))
