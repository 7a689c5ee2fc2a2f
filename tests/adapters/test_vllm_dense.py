"""The vLLM adapter without an engine: what it does per step and per layer, counted; and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

vllm = pytest.importorskip("vllm", reason="the adapter's tests need vLLM's classes; `make test` installs them")

from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata  # noqa: E402

from taut.adapters.engine import Selection  # noqa: E402
from taut.adapters.vllm import bridge, members, selection  # noqa: E402
from taut.adapters.vllm.dense import builder as building  # noqa: E402
from taut.adapters.vllm.dense.backend import TautBackend  # noqa: E402
from taut.adapters.vllm.dense.builder import TautMetadataBuilder  # noqa: E402
from taut.adapters.vllm.dense.layer import TautImplementation  # noqa: E402
from taut.adapters.vllm.dense.problems import has_head_scales  # noqa: E402
from taut.common_kernels import reference  # noqa: E402
from taut.common_kernels.builtin import REFERENCE  # noqa: E402
from taut.common_kernels.step import Mask  # noqa: E402

HEADS, KV_HEADS, SIZE, PAGE, PAGES = 6, 2, 32, 16, 12


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
def _chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection._state, "selection", Selection("on"))
    monkeypatch.setattr(selection._state, "said", set())
    monkeypatch.setattr(selection._state, "walk", {})


def layer(**different: Any) -> TautImplementation:
    arguments = {"kv_cache_dtype": "auto", "attn_type": AttentionType.DECODER} | different
    return TautImplementation(HEADS, SIZE, SIZE**-0.5, KV_HEADS, **arguments)


def builder(
    implementation: TautImplementation,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[TautMetadataBuilder] = TautMetadataBuilder,
) -> TautMetadataBuilder:
    held = SimpleNamespace(impl=implementation, _k_scale=torch.ones(()), _v_scale=torch.ones(()))
    monkeypatch.setattr(bridge, "layers", lambda _config, _names: [held])
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=64),
        speculative_config=None,
        model_config=SimpleNamespace(max_model_len=100),
    )
    spec = SimpleNamespace(block_size=PAGE, head_size=SIZE)
    return kind(spec, ["layer"], config, torch.device("cpu"))


def batch(lengths: list[int], queries: list[int]) -> CommonAttentionMetadata:
    """A step of vLLM's: `lengths` cached tokens a row, the last `queries` of them new; pages in reverse order."""
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)
    table = torch.full((len(lengths), 8), 2**30, dtype=torch.int32)
    slots, next_page = [], PAGES - 1
    for row, length in enumerate(lengths):
        pages = -(-length // PAGE)
        table[row, :pages] = torch.arange(next_page, next_page - pages, -1, dtype=torch.int32)
        next_page -= pages
        slots += [int(table[row, p // PAGE]) * PAGE + p % PAGE for p in range(length - queries[row], length)]
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        num_reqs=len(lengths),
        num_actual_tokens=sum(queries),
        max_query_len=max(queries),
        max_seq_len=max(lengths),
        block_table_tensor=table,
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
    )


SCALES = SimpleNamespace(_k_scale=torch.ones(()), _v_scale=torch.ones(()))


def test_a_step_costs_no_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The builder copies, computes and waits for nothing: it only points at what vLLM has."""
    made, common = builder(layer(), monkeypatch), batch([20, 3], [1, 3])
    with Operations() as seen:
        metadata = made.build(0, common)
    assert seen.names == []
    assert metadata.step.lengths is common.seq_lens
    assert metadata.step.pages.table is common.block_table_tensor


def test_a_layer_costs_its_kernels_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """With kernels that do nothing, nothing is left: no fill, no copy, no allocation."""
    implementation = layer()
    calls: list[str] = []
    nothing = SimpleNamespace(
        workspace=reference.workspace,
        store_kv=lambda *_, **__: calls.append("store_kv"),
        paged_attention=lambda *_, **__: calls.append("paged_attention"),
    )
    implementation.kernels = nothing
    metadata = builder(implementation, monkeypatch).build(0, batch([20, 3], [1, 3]))
    query, out = torch.randn(4, HEADS, SIZE), torch.full((4, HEADS, SIZE), torch.nan)
    key = torch.randn(4, KV_HEADS, SIZE)
    cache = torch.full((PAGES, KV_HEADS, PAGE, 2 * SIZE), torch.nan)
    with Operations() as seen:
        implementation.do_kv_cache_update(SCALES, key, key, cache, metadata.slot_mapping)
        implementation.forward(SCALES, query, key, key, cache, metadata, out)
    assert seen.names == []
    assert calls == ["store_kv", "paged_attention"]
    assert out.isnan().all()


def test_the_profiling_run_and_only_it_zeroes_the_output() -> None:
    out = torch.full((4, HEADS, SIZE), torch.nan)
    empty = torch.empty(0)
    assert layer().forward(SCALES, out.clone(), empty, empty, empty, None, out) is out
    assert (out == 0).all()


@pytest.mark.parametrize("window", [None, 5])
def test_two_steps_of_two_rows(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill, then decode, through a cache of vLLM's shape, against torch's own attention over all keys."""
    torch.manual_seed(0)
    implementation = layer(sliding_window=window)
    made = builder(implementation, monkeypatch)
    cache = torch.full((PAGES, KV_HEADS, PAGE, 2 * SIZE), torch.nan)
    keys = [torch.empty(0, KV_HEADS, SIZE) for _ in range(2)]
    values = [torch.empty(0, KV_HEADS, SIZE) for _ in range(2)]
    for lengths, queries in (([18, 7], [18, 7]), ([19, 8], [1, 1])):
        metadata = made.build(0, batch(lengths, queries))
        total = sum(queries)
        query = torch.randn(total, HEADS, SIZE)
        key, value = torch.randn(total, KV_HEADS, SIZE), torch.randn(total, KV_HEADS, SIZE)
        out = torch.full((total, HEADS, SIZE), torch.nan)
        implementation.do_kv_cache_update(SCALES, key, value, cache, metadata.slot_mapping)
        implementation.forward(SCALES, query, key, value, cache, metadata, out)
        first = 0
        for row, (length, new) in enumerate(zip(lengths, queries, strict=True)):
            own = slice(first, first + new)
            first += new
            keys[row], values[row] = torch.cat([keys[row], key[own]]), torch.cat([values[row], value[own]])
            distance = torch.arange(length)[None] - torch.arange(length - new, length)[:, None]
            seen = (distance <= 0) & (distance > -(window or length + 1))
            expected = torch.nn.functional.scaled_dot_product_attention(
                *(t.transpose(0, 1) for t in (query[own], keys[row], values[row])), attn_mask=seen, enable_gqa=True
            ).transpose(0, 1)
            torch.testing.assert_close(out[own], expected, rtol=1e-5, atol=1e-5)


def test_a_float8_cache_is_written_and_read_with_the_layers_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM hands a quantised cache over as bytes; keys as large as these saturate unless they are scaled."""
    torch.manual_seed(0)
    implementation = layer(kv_cache_dtype="fp8")
    metadata = builder(implementation, monkeypatch).build(0, batch([18, 7], [18, 7]))
    scales = SimpleNamespace(_k_scale=torch.tensor(8.0), _v_scale=torch.tensor(0.01))
    cache = torch.full((PAGES, KV_HEADS, PAGE, 2 * SIZE), 0x7F, dtype=torch.uint8)  # NaN in e4m3
    query = torch.randn(25, HEADS, SIZE) / 1000
    key, value = 1000 * torch.randn(25, KV_HEADS, SIZE), torch.randn(25, KV_HEADS, SIZE)
    out, exact = (torch.full((25, HEADS, SIZE), torch.nan) for _ in range(2))
    implementation.do_kv_cache_update(scales, key, value, cache, metadata.slot_mapping)
    implementation.forward(scales, query, key, value, cache, metadata, out)
    starts = metadata.step.query_starts
    reference.ragged_attention(
        query, key, value, starts, starts, Mask(), exact, scale=SIZE**-0.5, max_query=18, max_length=18
    )
    assert (out - exact).norm() / exact.norm() < 0.1


def test_an_encoder_sees_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    implementation = layer(attn_type=AttentionType.ENCODER_ONLY)
    common = batch([5, 3], [5, 3])
    common.causal = False
    metadata = builder(implementation, monkeypatch).build(0, common)
    query, key, value = (torch.randn(8, heads, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS))
    out = torch.full((8, HEADS, SIZE), torch.nan)
    implementation.forward(SCALES, query, key, value, torch.empty(0), metadata, out)
    for own in (slice(0, 5), slice(5, 8)):
        expected = torch.nn.functional.scaled_dot_product_attention(
            *(t[own].transpose(0, 1) for t in (query, key, value)), enable_gqa=True
        ).transpose(0, 1)
        torch.testing.assert_close(out[own], expected, rtol=1e-5, atol=1e-5)


def test_windows_are_counted_as_vllm_counts_them() -> None:
    """A window of W tokens holds the query's own: W - 1 before it."""
    assert layer(sliding_window=8).mask == Mask(left=7)
    assert layer().mask == Mask()


def test_an_argument_that_is_not_known_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="chunk_lookback=3 is not supported"):
        layer(chunk_lookback=3)
    layer(chunk_lookback=-1, use_alibi_sqrt=False, block_m=None)  # what vLLM passes where it means nothing


def test_a_quantised_output_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    out = torch.empty(1, HEADS, SIZE)
    with pytest.raises(ValueError, match="output quantised inside attention"):
        layer().forward(SCALES, out, out, out, out, None, out, output_scale=torch.ones(()))


def asked(**different: Any) -> dict[str, Any]:
    """What vLLM 0.32 asks a backend to validate."""
    usual = {
        "head_size": 64, "dtype": torch.float32, "kv_cache_dtype": "auto", "block_size": None, "use_mla": False,
        "has_sink": False, "use_sparse": False, "use_mm_prefix": False, "use_per_head_quant_scales": False,
        "device_capability": None, "attn_type": AttentionType.DECODER, "has_sliding_window": False,
    }  # fmt: skip
    return usual | different


def test_validation_gives_every_reason() -> None:
    ours = members.backend_for("dense", "FLASH_ATTN")
    assert ours.validate_configuration(**asked()) == []
    reasons = ours.validate_configuration(**asked(use_mla=True, use_mm_prefix=True, kv_cache_dtype="fp8_e5m2"))
    assert len(reasons) == 3


def test_auto_leaves_a_refused_layer_to_vllm_and_a_served_one_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM resolves the name of the class that it has validated: it gets its own class where ours was refused."""

    class Stock:
        @classmethod
        def validate_configuration(cls, **_: Any) -> list[str]:
            return []

    monkeypatch.setattr(selection._state, "selection", Selection("auto"))
    monkeypatch.setattr(bridge, "stock_class", lambda _member: Stock)
    ours = members.backend_for("dense", "FLASH_ATTN")
    module, name = ours.full_cls_name()
    assert module == members.__name__
    assert ours.validate_configuration(**asked(use_mm_prefix=True)) == []
    assert getattr(members, name) is Stock
    assert ours.validate_configuration(**asked()) == []
    assert getattr(members, name) is ours


def test_a_member_that_is_not_ours_is_no_attribute() -> None:
    with pytest.raises(AttributeError):
        _ = members.TORCH_SDPA


@pytest.mark.parametrize(
    "asked_for",
    [
        {"logits_soft_cap": 2.0},
        {"alibi_slopes": [2.0**-i for i in range(HEADS)]},
        {"sinks": torch.linspace(-1, 2, HEADS, dtype=torch.bfloat16)},
        {"sliding_window": 4, "sinks": torch.zeros(HEADS)},
    ],
    ids=["soft cap", "ALiBi", "sinks", "window and sinks"],
)
def test_what_a_layer_asks_for_reaches_the_kernels(asked_for: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers as the reference over keys side by side; other numbers than without."""
    torch.manual_seed(0)
    implementation, plain = layer(**asked_for), layer()
    implementation.process_weights_after_loading(torch.bfloat16)
    query, key, value = (torch.randn(25, heads, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS))
    outs = []
    for which in (implementation, plain):
        metadata = builder(which, monkeypatch).build(0, batch([18, 7], [18, 7]))
        cache = torch.full((PAGES, KV_HEADS, PAGE, 2 * SIZE), torch.nan)
        outs.append(torch.full((25, HEADS, SIZE), torch.nan))
        which.do_kv_cache_update(SCALES, key, value, cache, metadata.slot_mapping)
        which.forward(SCALES, query, key, value, cache, metadata, outs[-1])
    exact = torch.full((25, HEADS, SIZE), torch.nan)
    slopes, sinks = asked_for.get("alibi_slopes"), asked_for.get("sinks")
    reference.ragged_attention(
        query, key, value, metadata.step.query_starts, metadata.step.query_starts,
        Mask(left=(asked_for.get("sliding_window") or 0) - 1, soft_cap=asked_for.get("logits_soft_cap", 0.0)),
        exact, scale=SIZE**-0.5, max_query=18, max_length=18,
        sinks=None if sinks is None else sinks.float(), alibi_slopes=None if slopes is None else torch.tensor(slopes),
    )  # fmt: skip
    torch.testing.assert_close(outs[0], exact)
    assert not torch.allclose(outs[0], outs[1], atol=1e-3)


def test_every_head_may_have_a_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads a thousand times apart in size: one scale for all would lose one of them."""
    torch.manual_seed(0)
    scheme = SimpleNamespace(quant_config=SimpleNamespace(kv_cache_scheme={"strategy": "attn_head"}))
    assert has_head_scales(scheme)
    assert not has_head_scales(SimpleNamespace(quant_config=None))
    implementation = layer(kv_cache_dtype="fp8_e4m3")
    metadata = builder(implementation, monkeypatch).build(0, batch([18, 7], [18, 7]))
    sizes = torch.tensor([1.0, 1000.0])
    scales = SimpleNamespace(_k_scale=sizes / 100, _v_scale=sizes / 100)
    cache = torch.full((PAGES, KV_HEADS, PAGE, 2 * SIZE), 0x7F, dtype=torch.uint8)  # NaN in e4m3
    query = torch.randn(25, HEADS, SIZE) / sizes.repeat_interleave(HEADS // KV_HEADS)[:, None]
    key, value = (torch.randn(25, KV_HEADS, SIZE) * sizes[:, None] for _ in range(2))
    out, exact = (torch.full((25, HEADS, SIZE), torch.nan) for _ in range(2))
    implementation.do_kv_cache_update(scales, key, value, cache, metadata.slot_mapping)
    implementation.forward(scales, query, key, value, cache, metadata, out)
    starts = metadata.step.query_starts
    reference.ragged_attention(
        query, key, value, starts, starts, Mask(), exact, scale=SIZE**-0.5, max_query=18, max_length=18
    )
    errors = (out - exact).norm(dim=(0, 2)) / exact.norm(dim=(0, 2))
    assert (errors < 0.1).all(), errors


def test_cross_attention_reads_what_the_encoder_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own wrapper: the first step stores the encoder's keys, the second has none and reads them."""
    from vllm.model_executor.layers.attention.cross_attention import create_cross_attention_backend

    torch.manual_seed(0)
    backend = create_cross_attention_backend(members.backend_for("dense", "CPU_ATTN"))
    made = layer(attn_type=AttentionType.ENCODER_DECODER)
    assert "non_causal" in made.problem.features
    implementation = backend.get_impl_cls()(
        HEADS, SIZE, SIZE**-0.5, KV_HEADS, None, None, "auto", None, AttentionType.ENCODER_DECODER
    )
    build = builder(implementation, monkeypatch, backend.get_builder_cls())
    held = SimpleNamespace(_k_scale=torch.ones(()), _v_scale=torch.ones(()), kv_sharing_target_layer_name=None)
    cache = torch.full((PAGES, KV_HEADS, PAGE, 2 * SIZE), torch.nan)
    sources = [20, 6]
    key, value = torch.randn(26, KV_HEADS, SIZE), torch.randn(26, KV_HEADS, SIZE)
    for lengths, queries in (([4, 2], [4, 2]), ([5, 3], [1, 1])):
        common = batch([20, 6], [1, 1])
        starts = torch.tensor([0, queries[0], sum(queries)], dtype=torch.int32)
        common.query_start_loc = common.query_start_loc_cpu = starts
        common.num_actual_tokens, common.max_query_len = sum(queries), max(queries)
        common.seq_lens = common.seq_lens_cpu_upper_bound = torch.tensor(lengths, dtype=torch.int32)
        common.encoder_seq_lens = torch.tensor(sources, dtype=torch.int32)
        common.encoder_seq_lens_cpu = common.encoder_seq_lens.numpy()
        metadata = build.build(0, common)
        first = lengths == queries
        query = torch.randn(sum(queries), HEADS, SIZE)
        out = torch.full((sum(queries), HEADS, SIZE), torch.nan)
        implementation.forward(held, query, key if first else None, value if first else None, cache, metadata, out)
        for row, (own, seen) in enumerate(
            ((slice(0, queries[0]), slice(0, 20)), (slice(queries[0], None), slice(20, 26)))
        ):
            expected = torch.nn.functional.scaled_dot_product_attention(
                *(t.transpose(0, 1) for t in (query[own], key[seen], value[seen])), enable_gqa=True
            ).transpose(0, 1)
            torch.testing.assert_close(out[own], expected, rtol=1e-5, atol=1e-5, msg=f"row {row}")


def test_warm_up_runs_every_kind_of_step_and_leaves_a_builder_that_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "provider_of", lambda _problem: replace(REFERENCE, query_limits=(16,)))
    implementation = layer(sliding_window=5)
    made = builder(implementation, monkeypatch)
    steps: set[tuple[int, int]] = set()
    calls: list[str] = []
    real = implementation.kernels
    implementation.kernels = SimpleNamespace(
        workspace=real.workspace,
        store_kv=lambda *_, **__: calls.append("store_kv"),
        paged_attention=lambda *given, **__: steps.add((given[3].rows, given[3].max_query)),
    )
    made.warm_up()
    assert steps == {(rows, most) for rows in (1, 2, 4, 8) for most in (1, 16, 64)}
    assert len(calls) == len(steps)
    implementation.kernels = real
    made.warm_up()  # the reference runs them too: rows without keys


def test_a_windows_schedule_is_its_own() -> None:
    """Layers of different windows share no schedule: one looks no further back than its window."""
    assert layer(sliding_window=8).problem.left == 7
    assert layer().problem.left == -1
    assert layer(attn_type=AttentionType.ENCODER_ONLY, sliding_window=8).problem.left == -1
    assert "window" in layer(sliding_window=8).problem.features


def test_a_decoder_that_sees_ahead_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made, common = builder(layer(), monkeypatch), batch([20, 3], [1, 3])
    common.causal = False
    with pytest.raises(ValueError, match="to what follows is not supported"):
        made.build(0, common)


def vllm_config(**different: Any) -> Any:
    """As much of a `VllmConfig` as is looked at."""
    hf = {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 512} | different
    architectures = hf.pop("architectures", ["LlamaForCausalLM"])
    parallel = {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1, "tensor_parallel_size": 2}
    return SimpleNamespace(
        model_config=SimpleNamespace(
            is_mm_prefix_lm=hf.pop("mm_prefix", False), architectures=architectures,
            hf_config=SimpleNamespace(to_dict=lambda: hf),
        ),
        parallel_config=SimpleNamespace(**parallel | {k: hf.pop(k) for k in list(hf) if k in parallel}),
        attention_config=SimpleNamespace(), kv_transfer_config=None, cache_config=SimpleNamespace(cache_dtype="auto"),
    )  # fmt: skip


def test_what_no_question_tells_is_read_from_the_models_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    config = vllm_config(attn_logit_softcapping=50.0)
    monkeypatch.setattr(bridge, "current_config", lambda: config)
    [problem] = TautBackend.problems_asked(asked())
    assert (problem.q_heads, problem.kv_heads) == (4, 1)  # on one device of two
    assert "soft_cap" in problem.features


@pytest.mark.parametrize(
    ("different", "reason"),
    [
        ({"mm_prefix": True}, "multimodal prefixes"),
        ({"decode_context_parallel_size": 2}, "decode context parallelism"),
        ({"architectures": ["Rnj1ForCausalLM"]}, "chunk_lookback"),
        ({"architectures": ["Step1ForCausalLM"]}, "alibi_sqrt"),
    ],
)
def test_a_model_is_refused_with_the_reason(different: dict[str, Any], reason: str) -> None:
    assert selection.model_refusals(vllm_config(), kind="dense") == []
    [said] = selection.model_refusals(vllm_config(**different), kind="dense")
    assert reason in said
    # What vLLM's own validation asks, it answers itself.
    assert selection.model_refusals(vllm_config(mm_prefix=True), asked(), kind="dense") == []


def test_a_probe_that_fails_is_named_before_anything_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection.bridge, "failures", lambda: ("vLLM 9.9 lacks a thing (probe: a place)",))
    with pytest.raises(ValueError, match=r"vLLM 9.9 lacks a thing \(probe: a place\)"):
        _ = members.CUSTOM
