"""The SGLang adapter's MLA without an engine: which form serves a prompt, and what each form reads and writes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

pytest.importorskip("sglang", reason="needs SGLang's classes: make sglang")

from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry

from adapters import test_sglang_backend as dense
from taut.adapters.engine import Selection
from taut.adapters.sglang import backend, bridge, selection
from taut.adapters.sglang.forms import mla_form
from taut.common_kernels import reference

if TYPE_CHECKING:
    from taut.common_kernels.problem import Problem

HEADS, RANK, ROPE, SIZE, VALUE = 4, 32, 16, 24, 24
NOPE = SIZE - ROPE
# DeepSeek-V2's and V3's own sizes.
DEEPSEEK = SimpleNamespace(
    kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, disable_chunked_prefix_cache=False
)


@pytest.fixture(autouse=True)
def _told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_state", selection._State(Selection("on")))
    monkeypatch.setattr(AttentionBackendRegistry, "_handlers", dict(AttentionBackendRegistry._handlers))


def prompts(new: list[int], old: list[int], *, mode: ForwardMode = ForwardMode.EXTEND, on_gpu: bool = True) -> Any:
    """A batch as a handler sees it."""
    return SimpleNamespace(
        forward_mode=mode, extend_seq_lens_cpu=new, extend_prefix_lens_cpu=old,
        get_max_chunk_capacity=lambda: 128 * 1024, seq_lens=SimpleNamespace(is_cuda=on_gpu), seq_lens_cpu=new,
    )  # fmt: skip


def in_chunks(tokens: int, chunk: int) -> list[tuple[int, int]]:
    """New and cached tokens of each chunk of one prompt."""
    return [(min(chunk, tokens - old), old) for old in range(0, tokens, chunk)]


def test_a_long_prompt_is_never_absorbed() -> None:
    """30000 tokens in chunks of 8192, where SGLang's triton absorbs all chunks but the first."""
    forms = [mla_form(DEEPSEEK, prompts([new], [old])).name for new, old in in_chunks(30_000, 8192)]
    assert forms == ["MHA", "MHA_ONE_SHOT", "MHA_ONE_SHOT", "MHA_ONE_SHOT"]
    longer = [mla_form(DEEPSEEK, prompts([new], [old])).name for new, old in in_chunks(200_000, 8192)]
    assert longer.count("MHA_CHUNKED_KV") == sum(old + new > 128 * 1024 for new, old in in_chunks(200_000, 8192)) > 0
    assert set(longer) == {"MHA", "MHA_ONE_SHOT", "MHA_CHUNKED_KV"}


def test_what_is_absorbed() -> None:
    """Decode, verification, a short rest behind a long prefix, whatever is captured, and what SGLang rules out."""
    said = selection._state.said

    def form(batch: Any, layer: Any = DEEPSEEK) -> str:
        return str(mla_form(layer, batch).name)

    assert form(prompts([1], [100], mode=ForwardMode.DECODE)) == "MLA"
    assert form(prompts([4], [100], mode=ForwardMode.TARGET_VERIFY)) == "MLA"
    assert not said
    assert form(prompts([100], [8192])) == "MLA"
    assert form(prompts([300], [8192])) == "MHA_ONE_SHOT"
    assert form(prompts([300, 2], [8192, 16])) == "MHA_ONE_SHOT"
    unknown = prompts([300], [8192])
    unknown.seq_lens_cpu = None  # by which SGLang would count the keys
    assert form(unknown) == "MHA_CHUNKED_KV"
    assert (
        form(prompts([300], [8192]), SimpleNamespace(**vars(DEEPSEEK) | {"disable_chunked_prefix_cache": True}))
        == "MLA"
    )
    assert form(prompts([300], [200_000], on_gpu=False)) == "MLA"
    names = ("MLA", "MHA_ONE_SHOT", "MHA_CHUNKED_KV")
    assert said == {f"prompts are served in SGLang's form {name}" for name in names}


def test_captured_prompts_keep_one_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge, "prefill_is_captured", lambda: True)
    assert mla_form(DEEPSEEK, prompts([300], [0])).name == "MLA"


def served() -> tuple[Any, Any, Any, backend.TautBackend]:
    """A model with an absorbed and an unabsorbed layer in one place, its pool poisoned."""
    absorbed = dense.layer(num_heads=HEADS, head_dim=RANK + ROPE, num_kv_heads=1, v_head_dim=RANK, scaling=SIZE**-0.5)
    unabsorbed = dense.layer(num_heads=HEADS, head_dim=SIZE, num_kv_heads=HEADS, v_head_dim=VALUE, scaling=SIZE**-0.5)
    made = dense.runner(absorbed, unabsorbed, pool=dense.Pool(1, RANK + ROPE), mla=True)
    return absorbed, unabsorbed, made, backend.TautBackend(made)


def test_absorbed_in_two_parts_or_joined() -> None:
    """The same numbers, into the tensor that SGLang offers, against plain attention over latent vectors."""
    torch.manual_seed(0)
    layer, _, made, ours = served()
    forward = dense.batch(made, ForwardMode.EXTEND, [5, 3], [5, 3])
    ours.init_forward_metadata(forward)
    query, key = torch.randn(8, HEADS, RANK + ROPE), torch.randn(8, 1, RANK + ROPE)
    out = forward._attn_output = torch.full((8, HEADS * RANK), torch.nan)
    parts = {"q_rope": query[..., RANK:], "k_rope": key[..., RANK:]}
    given = ours.forward(
        query[..., :RANK], key[..., :RANK], key[..., :RANK], layer, forward, **parts, cos_sin_cache=None
    )
    assert given is out
    cache = made.token_to_kv_pool.keys[:, 0]
    assert torch.equal(cache[forward.out_cache_loc], key[:, 0])
    for own in (slice(0, 5), slice(5, 8)):
        scores = torch.einsum("qhd,kd->hqk", query[own], key[own, 0]) * SIZE**-0.5
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
        expected = torch.einsum("hqk,kd->qhd", scores.softmax(-1), key[own, 0, :RANK])
        torch.testing.assert_close(out.view(8, HEADS, RANK)[own], expected, rtol=1e-5, atol=1e-5)
    joined = ours.forward(query.flatten(1), key, key[..., :RANK], layer, forward)
    torch.testing.assert_close(joined, out, rtol=0, atol=0)
    stored = ours.forward(query.flatten(1), None, None, layer, forward)
    torch.testing.assert_close(stored, out, rtol=0, atol=0)


@pytest.mark.parametrize("one_shot", [True, False], ids=["one shot", "in chunks"])
def test_unabsorbed_behind_a_prefix(one_shot: bool) -> None:
    """At once over whole requests, and over new tokens and a chunk of the cached ones, merged by their LSE."""
    torch.manual_seed(0)
    _, layer, made, ours = served()
    old, new = [4, 7], [5, 2]
    forward = dense.batch(made, ForwardMode.EXTEND, [9, 9], new)
    ours.init_forward_metadata(forward)
    query = torch.randn(7, HEADS, SIZE)
    key, value = torch.randn(18, HEADS, SIZE), torch.randn(18, HEADS, VALUE)
    is_new = torch.cat([torch.arange(9) >= cached for cached in old])
    if one_shot:
        forward.attn_attend_prefix_cache, forward.mha_one_shot, forward.mha_return_lse = False, True, False
        out = ours.forward(query, key, value, layer, forward, save_kv_cache=False).view(7, HEADS, VALUE)
    else:
        forward.attn_attend_prefix_cache, forward.mha_return_lse = False, True
        first, first_lse = ours.forward(query, key[is_new], value[is_new], layer, forward, save_kv_cache=False)
        forward.attn_attend_prefix_cache, forward.prefix_chunk_idx = True, 0
        forward.prefix_chunk_cu_seq_lens = [torch.tensor([0, 4, 11], dtype=torch.int32)]
        forward.prefix_chunk_max_seq_lens = [7]
        chunk, chunk_lse = ours.forward(query, key[~is_new], value[~is_new], layer, forward, save_kv_cache=False)
        lse = torch.logaddexp(first_lse, chunk_lse)
        out = first * (first_lse - lse).exp()[..., None] + chunk * (chunk_lse - lse).exp()[..., None]
    starts = 0
    for row, (cached, count) in enumerate(zip(old, new, strict=True)):
        mine = slice(9 * row, 9 * row + 9)
        scores = torch.einsum("qhd,khd->hqk", query[starts : starts + count], key[mine]) * SIZE**-0.5
        seen = torch.arange(9)[None] <= torch.arange(cached, 9)[:, None]
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        expected = torch.einsum("hqk,khd->qhd", weights, value[mine])
        torch.testing.assert_close(out[starts : starts + count], expected, rtol=1e-5, atol=1e-5)
        starts += count


def test_the_table_that_the_user_named_reaches_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those over keys that are handed over, too."""
    monkeypatch.setattr(selection, "_state", selection._State(Selection("on", table=Path("mine.json"))))
    given: list[tuple[str, str]] = []

    def workspace(problem: Problem, _rows: int, _tokens: int, _device: str, table: str) -> Any:
        return SimpleNamespace(asked=(problem.operation, table), prepare=lambda _step: None)

    def called(*_: Any, workspace: Any, **__: Any) -> None:
        given.append(workspace.asked)

    monkeypatch.setattr(reference, "workspace", workspace)
    for operation in ("ragged_attention", "mla_decode"):
        monkeypatch.setattr(reference, operation, called)
    absorbed, unabsorbed, made, ours = served()
    forward = dense.batch(made, ForwardMode.EXTEND, [5, 3], [5, 3], attn_attend_prefix_cache=False)
    ours.init_forward_metadata(forward)
    query, latent = torch.randn(8, HEADS, RANK + ROPE), torch.randn(8, 1, RANK + ROPE)
    ours.forward(query, latent, latent, absorbed, forward)
    query, key, value = (torch.randn(8, HEADS, size) for size in (SIZE, SIZE, VALUE))
    ours.forward(query, key, value, unabsorbed, forward, save_kv_cache=False)
    assert given == [("mla_decode", "mine.json"), ("ragged_attention", "mine.json")]


def test_what_mla_does_not_serve_is_refused_by_name() -> None:
    absorbed, unabsorbed, made, ours = served()
    forward = dense.batch(made, ForwardMode.DECODE, [5], [1])
    ours.init_forward_metadata(forward)
    query, key = torch.randn(1, HEADS * (RANK + ROPE)), torch.randn(1, 1, RANK + ROPE)
    with pytest.raises(ValueError, match="sinks of MLA"):
        ours.forward(query, key, key, absorbed, forward, sinks=torch.zeros(HEADS))
    with pytest.raises(ValueError, match="argument topk_indices is not supported"):
        ours.forward(query, key, key, absorbed, forward, topk_indices=torch.zeros(1))
    with pytest.raises(ValueError, match="unabsorbed MLA that reads or writes the cache itself"):
        ours.forward(torch.randn(1, HEADS * SIZE), torch.randn(1, HEADS, SIZE), None, unabsorbed, forward)
    made.model_config = SimpleNamespace(hf_config=SimpleNamespace(index_topk=2048))
    with pytest.raises(ValueError, match="index_topk"):
        backend.TautBackend(made)


def test_warm_up_runs_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unabsorbed: new tokens alone, new tokens before chunks are merged with them, and such a chunk."""
    _, _, made, ours = served()
    forms: list[tuple[bool, bool]] = []
    attend = reference.ragged_attention

    def attended(*arguments: Any, lse: torch.Tensor | None, **named: Any) -> None:
        mask, value = arguments[5], arguments[2]
        forms.append((mask.causal, lse is not None))
        assert value.stride()[:2] == (HEADS * (NOPE + VALUE), NOPE + VALUE)  # as SGLang's projection leaves them
        attend(*arguments, lse=lse, **named)

    monkeypatch.setattr(reference, "ragged_attention", attended)
    ours.warm_up()
    assert forms == [(True, False), (True, True), (False, True)]
    assert made.token_to_kv_pool.keys.isnan().all()
