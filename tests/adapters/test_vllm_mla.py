"""Latent attention in the vLLM adapter without an engine: what it computes, what it costs, and what it refuses."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

vllm = pytest.importorskip("vllm", reason="the adapter's tests need vLLM's classes; `make test` installs them")

from vllm.model_executor.layers.attention import mla_attention  # noqa: E402
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata  # noqa: E402

from adapters.test_vllm_dense import Operations  # noqa: E402
from taut.adapters.engine import Selection  # noqa: E402
from taut.adapters.vllm import bridge, members, selection  # noqa: E402
from taut.adapters.vllm.mla import layer as mla_layer  # noqa: E402
from taut.adapters.vllm.mla.builder import TautMLAMetadataBuilder  # noqa: E402
from taut.adapters.vllm.mla.layer import TautMLAImplementation  # noqa: E402
from taut.adapters.vllm.mla.prefill import Prefill  # noqa: E402
from taut.common_kernels import reference  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

# vLLM knows few sizes of cached tokens; heads are small, so that the oracle is quick.
HEADS, RANK, ROPE, NOPE, VALUE, PAGE, PAGES = 3, 512, 64, 32, 48, 16, 24
SCALE = (NOPE + ROPE) ** -0.5


class Layer:
    """What vLLM's layer knows: its projections, here random, and the scale of its cache."""

    def __init__(self, scale: float = 1.0) -> None:
        torch.manual_seed(1)
        self.up = torch.randn(RANK, HEADS, NOPE + VALUE) / RANK**0.5
        self._k_scale = torch.tensor(scale)

    def kv_b_proj(self, latent: torch.Tensor) -> tuple[torch.Tensor, None]:
        return latent @ self.up.flatten(1), None

    def absorbed(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The two parts of a decoding query, as vLLM hands them over."""
        nope = torch.einsum("thp,rhp->htr", query[..., :NOPE], self.up[..., :NOPE])
        return nope.transpose(0, 1), query[..., NOPE:]

    def up_projected(self, out: torch.Tensor) -> torch.Tensor:
        return torch.einsum("thr,rhv->thv", out, self.up[..., NOPE:])

    def oracle(self, query: torch.Tensor, cached: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of the last queries of one row over all that it has cached [n, C + E], and the log-sum-exp."""
        both = torch.einsum("nr,rhd->nhd", cached[:, :RANK], self.up)
        rope = cached[:, None, RANK:].expand(-1, HEADS, -1)
        keys, values = torch.cat([both[..., :NOPE], rope], -1), both[..., NOPE:]
        new, length = len(query), len(cached)
        hidden = torch.arange(length)[None] > torch.arange(length - new, length)[:, None]
        scores = torch.einsum("thd,nhd->htn", query, keys) * SCALE
        scores = scores.masked_fill(hidden, -torch.inf)
        return torch.einsum("htn,nhv->thv", scores.softmax(-1), values), scores.logsumexp(-1).t()


@pytest.fixture(autouse=True)
def _chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(selection._state, "selection", Selection("on"))
    monkeypatch.setattr(selection._state, "walk", {})
    parallel = SimpleNamespace(decode_context_parallel_size=1, cp_kv_cache_interleave_size=1)
    monkeypatch.setattr(mla_attention, "get_current_vllm_config", lambda: SimpleNamespace(parallel_config=parallel))
    yield
    selection._state.walk.clear()


def implementation(layer: Layer, **different: Any) -> TautMLAImplementation:
    arguments = {
        "num_heads": HEADS, "head_size": RANK + ROPE, "scale": SCALE, "num_kv_heads": 1, "alibi_slopes": None,
        "sliding_window": None, "kv_cache_dtype": "auto", "logits_soft_cap": None, "attn_type": AttentionType.DECODER,
        "kv_sharing_target_layer_name": None, "q_lora_rank": None, "kv_lora_rank": RANK, "qk_nope_head_dim": NOPE,
        "qk_rope_head_dim": ROPE, "qk_head_dim": NOPE + ROPE, "v_head_dim": VALUE, "kv_b_proj": layer.kv_b_proj,
        "indexer": None,
    }  # fmt: skip
    return TautMLAImplementation(**(arguments | different))


def builder(
    made: TautMLAImplementation, monkeypatch: pytest.MonkeyPatch, *, workspace: int = 4096, drafts: int = 0
) -> TautMLAMetadataBuilder:
    """A builder of one layer, whose workspace holds so many tokens of context."""
    layer = SimpleNamespace(
        impl=made, num_heads=HEADS, q_lora_rank=None, kv_lora_rank=RANK, qk_nope_head_dim=NOPE, qk_rope_head_dim=ROPE,
        v_head_dim=VALUE, prefill_backend=SimpleNamespace(clone=lambda: None), non_causal_multi_token_decode=False,
        _k_scale=torch.ones(()),
    )  # fmt: skip
    monkeypatch.setattr(bridge, "layers", lambda _config, _names: [layer])
    monkeypatch.setattr(mla_attention, "get_num_attention_heads_from_layers", lambda *_: HEADS)
    monkeypatch.setattr(
        TautMLAMetadataBuilder, "determine_chunked_prefill_workspace_size", staticmethod(lambda _: workspace)
    )
    parallel = SimpleNamespace(
        prefill_context_parallel_size=1, decode_context_parallel_size=1, cp_kv_cache_interleave_size=1
    )
    speculative = SimpleNamespace(num_speculative_tokens=drafts, method="ngram", parallel_drafting=False)
    config = SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.float32, max_model_len=256, get_head_size=lambda: RANK + ROPE),
        compilation_config=SimpleNamespace(static_forward_context={"layer": layer}),
        parallel_config=parallel,
        cache_config=SimpleNamespace(cache_dtype="auto", block_size=PAGE),
        scheduler_config=SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=256),
        speculative_config=speculative if drafts else None,
    )
    spec = SimpleNamespace(block_size=PAGE, head_size=RANK + ROPE)
    return TautMLAMetadataBuilder(spec, ["layer"], config, torch.device("cpu"))


def batch(lengths: list[int], queries: list[int]) -> CommonAttentionMetadata:
    """A step of vLLM's: `lengths` cached tokens a row, the last `queries` of them new; pages in reverse order."""
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)
    table = torch.full((len(lengths), 16), 2**30, dtype=torch.int32)
    slots, next_page = [], PAGES - 1
    for row, length in enumerate(lengths):
        pages = -(-length // PAGE)
        table[row, :pages] = torch.arange(next_page, next_page - pages, -1, dtype=torch.int32)
        next_page -= pages
        slots += [int(table[row, p // PAGE]) * PAGE + p % PAGE for p in range(length)]
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        num_reqs=len(lengths),
        num_actual_tokens=sum(queries),
        max_query_len=max(queries),
        max_seq_len=max(lengths),
        block_table_tensor=table,
        slot_mapping=torch.tensor(slots, dtype=torch.int64),  # of everything cached: the tests store it all at once
    )
    common.seq_lens_cpu_upper_bound = common.seq_lens
    return common


def stored(
    made: TautMLAImplementation, layer: Layer, common: CommonAttentionMetadata, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random vectors of all cached tokens, row after row, and the cache that holds them; all else of it is NaN."""
    torch.manual_seed(2)
    vectors = torch.randn(len(common.slot_mapping), RANK + ROPE)
    cache = torch.full((PAGES, PAGE, RANK + ROPE), torch.nan).to(dtype)
    as_vllm_keeps_it = cache.view(torch.uint8) if dtype.itemsize == 1 else cache
    made.do_kv_cache_update(
        vectors[:, :RANK], vectors[:, None, RANK:], as_vllm_keeps_it, common.slot_mapping, "auto", layer._k_scale, False
    )
    return vectors, cache


# Decoding rows come first. A budget of 32 tokens of context splits rows and puts several into one chunk.
MIXED = ([19, 40, 33, 70, 12, 50], [1, 1, 33, 6, 12, 5])


@pytest.mark.parametrize("workspace", [4096, 48, 32])
@pytest.mark.parametrize(("lengths", "queries"), [MIXED, ([64, 80], [32, 3]), ([20, 5], [20, 5])])
def test_rows_that_decode_beside_rows_that_prefill(
    lengths: list[int], queries: list[int], workspace: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row of a step against plain attention over all that the row has cached."""
    layer = Layer()
    made, common = implementation(layer), batch(lengths, queries)
    metadata = builder(made, monkeypatch, workspace=workspace).build(0, common)
    vectors, cache = stored(made, layer, common)
    query = torch.randn(sum(queries), HEADS, NOPE + ROPE)
    decoded = metadata.num_decode_tokens
    assert decoded == sum(new for new in queries if new == 1)
    parts = []
    if decoded:
        out, lse = made.forward_mqa(layer.absorbed(query[:decoded]), cache, metadata, layer)
        assert lse is None
        parts.append(layer.up_projected(out))
    if decoded < sum(queries):
        output = torch.full((sum(queries) - decoded, HEADS * VALUE), torch.nan)
        new = torch.cat([row[-n:] for row, n in zip(vectors.split(lengths), queries, strict=True)])[decoded:]
        made.forward_mha(
            query[decoded:], new[:, :RANK], new[:, None, RANK:], cache, metadata, layer._k_scale, output=output
        )
        parts.append(output.view(-1, HEADS, VALUE))
    expected = [
        layer.oracle(asked, row)[0] for asked, row in zip(query.split(queries), vectors.split(lengths), strict=True)
    ]
    torch.testing.assert_close(torch.cat(parts), torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_verification_rows_decode_each_with_its_own_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer()
    made = implementation(layer)
    lengths, queries = [19, 40, 33], [4, 1, 3]
    common = batch(lengths, queries)
    metadata = builder(made, monkeypatch, drafts=3).build(0, common)
    assert metadata.num_decodes == 3
    vectors, cache = stored(made, layer, common)
    query = torch.randn(8, HEADS, NOPE + ROPE)
    out, _ = made.forward_mqa(layer.absorbed(query), cache, metadata, layer)
    expected = [
        layer.oracle(asked, row)[0] for asked, row in zip(query.split(queries), vectors.split(lengths), strict=True)
    ]
    torch.testing.assert_close(layer.up_projected(out), torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_context_parallelism_gets_the_natural_lse_of_every_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM then hands the query over in one piece, and merges the shards of the context by this LSE."""
    layer = Layer()
    made, common = implementation(layer), batch([19, 40], [1, 1])
    made.need_to_return_lse_for_decode = True
    metadata = builder(made, monkeypatch).build(0, common)
    vectors, cache = stored(made, layer, common)
    query = torch.randn(2, HEADS, NOPE + ROPE)
    whole = torch.cat(layer.absorbed(query), dim=-1)
    kept = whole.clone()
    out, lse = made.forward_mqa(whole, cache, metadata, layer)
    results = [layer.oracle(query[row : row + 1], part) for row, part in enumerate(vectors.split([19, 40]))]
    torch.testing.assert_close(layer.up_projected(out), torch.cat([r[0] for r in results]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse, torch.cat([r[1] for r in results]), rtol=1e-5, atol=1e-5)
    assert torch.equal(whole, kept)


def test_a_float8_cache_is_written_and_read_with_the_layers_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode and context alike; vectors as large as these saturate unless they are scaled."""
    layer = Layer(scale=0.01)
    made = implementation(layer, kv_cache_dtype="fp8")
    lengths, queries = [40, 50], [1, 5]
    common = batch(lengths, queries)
    metadata = builder(made, monkeypatch).build(0, common)
    vectors, cache = stored(made, layer, common, torch.float8_e4m3fn)
    query = torch.randn(6, HEADS, NOPE + ROPE)
    out, _ = made.forward_mqa(layer.absorbed(query[:1]), cache, metadata, layer)
    output = torch.full((5, HEADS * VALUE), torch.nan)
    new = vectors[-5:]
    made.forward_mha(query[1:], new[:, :RANK], new[:, None, RANK:], cache, metadata, layer._k_scale, output=output)
    exact = torch.cat([layer.oracle(query[:1], vectors[:40])[0], layer.oracle(query[1:], vectors[40:])[0]])
    ours = torch.cat([layer.up_projected(out), output.view(-1, HEADS, VALUE)])
    assert (ours - exact).norm() / exact.norm() < 0.1


def test_a_decoding_layer_costs_its_kernels_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """With kernels that do nothing, nothing is left: no fill, no copy, no allocation. Neither in building the step."""
    layer = Layer()
    made, common = implementation(layer), batch([20, 3], [1, 1])
    calls: list[str] = []
    made.kernels = SimpleNamespace(
        workspace=lambda *_: SimpleNamespace(prepare=lambda _step: calls.append("prepare")),
        store_mla_kv=lambda *_, **__: calls.append("store_mla_kv"),
        mla_decode=lambda *_, **__: calls.append("mla_decode"),
    )
    steps = builder(made, monkeypatch)
    pair = layer.absorbed(torch.randn(2, HEADS, NOPE + ROPE))
    cache, new = torch.zeros(PAGES, PAGE, RANK + ROPE), torch.randn(2, RANK + ROPE)
    with Operations() as seen:
        metadata = steps.build(0, common)
        made.do_kv_cache_update(new[:, :RANK], new[:, None, RANK:], cache, common.slot_mapping, "auto", layer._k_scale)
        out, _ = made.forward_mqa(pair, cache, metadata, layer)
    assert seen.names == []
    assert calls == ["prepare", "store_mla_kv", "mla_decode"]
    assert out is pair[0]
    assert metadata.decode.step.lengths.data_ptr() == common.seq_lens.data_ptr()


def test_warm_up_runs_every_number_of_rows_and_every_form_of_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    made = implementation(Layer())
    serving = builder(made, monkeypatch, drafts=3)
    decoded: list[tuple[int, int]] = []
    prefilled: list[tuple[bool, bool]] = []

    def decode(_nope: Any, _rope: Any, _cache: Any, step: Any, *_: Any, **__: Any) -> None:
        decoded.append((step.rows, step.max_query))

    def attend(*given: Any, lse: torch.Tensor | None, **_: Any) -> None:
        prefilled.append((given[5].causal, lse is not None))

    made.kernels = SimpleNamespace(store_mla_kv=lambda *_, **__: None, mla_decode=decode)
    made.prefill_kernels = SimpleNamespace(ragged_attention=attend, merge=lambda *_: None)
    serving.warm_up()
    assert decoded == [(rows, 4) for rows in (1, 2, 4, 8)]
    assert prefilled == [(True, False), (True, True), (False, True)]
    made.kernels = made.prefill_kernels = reference
    serving.warm_up()  # the reference runs them too: rows without keys


def test_a_prefill_without_context_writes_into_the_engines_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel gets vLLM's own buffer; beside it there are only the projection and the keys put together."""
    layer = Layer()
    made, common = implementation(layer), batch([5, 3], [5, 3])
    metadata = builder(made, monkeypatch).build(0, common)
    buffers = []
    made.prefill_kernels = SimpleNamespace(ragged_attention=lambda *args, **_: buffers.append(args[6]))
    output = torch.full((8, HEADS * VALUE), torch.nan)
    new = torch.randn(8, RANK + ROPE)
    query = torch.randn(8, HEADS, NOPE + ROPE)
    with Operations() as seen:
        made.forward_mha(query, new[:, :RANK], new[:, None, RANK:], new, metadata, layer._k_scale, output=output)
    assert buffers[0].data_ptr() == output.data_ptr()
    assert sorted(seen.names) == sorted(
        ["aten.mm.default", "aten.empty.memory_format", "aten.copy_.default", "aten.copy_.default"]
    )


def test_keys_of_one_part_of_a_prefill_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is multiplied out is many times the cache it is made of: the keys before are let go first."""
    layer = Layer()
    made, common = implementation(layer), batch([64, 80], [32, 3])
    metadata = builder(made, monkeypatch, workspace=32).build(0, common)
    vectors, cache = stored(made, layer, common)
    before: list[weakref.ref[torch.Tensor]] = []
    multiplied_out = made._multiplied_out

    def watched(latent: torch.Tensor, rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert [alive() for alive in before] == [None] * len(before)
        key, value = multiplied_out(latent, rope)
        before.extend([weakref.ref(key), weakref.ref(value)])
        return key, value

    monkeypatch.setattr(made, "_multiplied_out", watched)
    new, query = vectors[:35], torch.randn(35, HEADS, NOPE + ROPE)
    output = torch.empty(35, HEADS * VALUE)
    made.forward_mha(query, new[:, :RANK], new[:, None, RANK:], cache, metadata, layer._k_scale, output=output)
    assert len(before) > 4


def test_the_table_that_the_user_named_reaches_the_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    kernels = SimpleNamespace(
        workspace=lambda *asked: asked, ragged_attention=lambda *_, workspace, **__: given.append(workspace)
    )
    monkeypatch.setattr(mla_layer, "serving_kernels", lambda *_: kernels)
    monkeypatch.setattr(mla_layer, "table_path", lambda: "mine.json")
    layer = Layer()
    made, common = implementation(layer), batch([5, 3], [5, 3])
    metadata = builder(made, monkeypatch).build(0, common)
    new, query = torch.randn(8, RANK + ROPE), torch.randn(8, HEADS, NOPE + ROPE)
    output = torch.empty(8, HEADS * VALUE)
    made.forward_mha(query, new[:, :RANK], new[:, None, RANK:], new, metadata, layer._k_scale, output=output)
    metadata.prefill.prefill_backend.run_prefill_new_tokens(query, query, query[..., :VALUE], False)
    assert [asked[0].operation for asked in given] == ["ragged_attention"] * 2
    assert [asked[-1] for asked in given] == ["mine.json"] * 2


def test_vllms_own_callers_of_a_prefill_get_their_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Context parallelism calls the two methods of a prefill backend, and wants the LSE with heads first."""
    layer = Layer()
    made, common = implementation(layer), batch([20, 50], [4, 5])
    metadata = builder(made, monkeypatch).build(0, common)
    prefill = metadata.prefill.prefill_backend
    assert isinstance(prefill, Prefill)
    query, key = torch.randn(9, HEADS, NOPE + ROPE), torch.randn(9, HEADS, NOPE + ROPE)
    value = torch.randn(9, HEADS, VALUE)
    out = torch.full((9, HEADS, VALUE), torch.nan)
    assert prefill.run_prefill_new_tokens(query, key, value, False, out=out) is out
    assert out.isfinite().all()
    chunk = metadata.prefill.chunked_context.chunks[0]
    keys, values = torch.randn(61, HEADS, NOPE + ROPE), torch.randn(61, HEADS, VALUE)
    by_chunk = prefill.run_prefill_context_chunk(chunk=chunk, q=query, k=keys, v=values)
    by_number = prefill.run_prefill_context_chunk(chunk_idx=0, q=query, k=keys, v=values)
    assert by_chunk[0].shape == (9, HEADS, VALUE)
    assert by_chunk[1].shape == (HEADS, 9)
    assert torch.equal(by_chunk[0], by_number[0])


def test_what_is_not_served_is_refused_with_every_reason() -> None:
    with pytest.raises(ValueError, match=r"(?s)ALiBi.*a sparse indexer.*KV cache of fp8_e5m2"):
        implementation(Layer(), alibi_slopes=[1.0], indexer=object(), kv_cache_dtype="fp8_e5m2")
    assert not implementation(Layer()).fused_output_quant_supported(None)


def test_validation_gives_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse model is refused by name; so is one whose layers are not latent."""
    monkeypatch.setattr(bridge, "current_config", lambda: None)
    asked = {
        "head_size": RANK + ROPE, "dtype": torch.float32, "kv_cache_dtype": "auto", "block_size": None, "use_mla": True,
        "has_sink": False, "use_sparse": False, "use_mm_prefix": False, "use_per_head_quant_scales": False,
        "device_capability": None, "attn_type": AttentionType.DECODER, "has_sliding_window": False,
    }  # fmt: skip
    ours = members.backend_for("MLA", "CUSTOM")
    assert ours.validate_configuration(**asked) == []
    assert ours.validate_configuration(**asked | {"use_sparse": True}) == ["sparse not supported"]
    reasons = ours.validate_configuration(**asked | {"has_sliding_window": True, "has_sink": True, "use_mla": False})
    assert len(reasons) == 3


@pytest.mark.parametrize("use_mla", [True, False])
def test_custom_serves_either_kind_of_model(use_mla: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection._state, "selection", Selection(None))
    monkeypatch.setattr(bridge, "validates_layers", lambda: True)
    config = SimpleNamespace(model_config=SimpleNamespace(use_mla=use_mla))
    monkeypatch.setattr(bridge, "current_config", lambda: config)
    ours = members.backend_for("MLA" if use_mla else "dense", "CUSTOM")
    assert members.CUSTOM is ours
    assert members.CUSTOM.get_name() == "CUSTOM"
    module, name = members.CUSTOM.full_cls_name()
    assert module == members.__name__
    assert getattr(members, name) is ours
    assert members.TRITON_MLA is bridge.stock_class("TRITON_MLA")
    assert members.CPU_MLA.__name__ == "CPUMLABackend"


def test_a_member_is_ours_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge, "validates_layers", lambda: True)
    monkeypatch.setattr(bridge, "current_config", lambda: None)
    for member in selection.MLA_MEMBERS:
        ours = getattr(members, member)
        assert ours is members.backend_for("MLA", member)
        assert ours.get_name() == member
        assert ours.is_mla()


def test_results_may_take_the_place_of_what_they_are_made_of() -> None:
    """What `forward_mqa` and `forward_mha` rely on, of every provider: see the contract in `kernels`."""
    torch.manual_seed(0)
    parts, lses = torch.randn(2, 5, HEADS, VALUE), torch.randn(2, 5, HEADS)
    out, lse = torch.empty(5, HEADS, VALUE), torch.empty(5, HEADS)
    reference.merge(parts, lses, out, lse)
    reference.merge(parts, lses, parts[0], lses[0])
    assert torch.equal(parts[0], out)
    assert torch.equal(lses[0], lse)
