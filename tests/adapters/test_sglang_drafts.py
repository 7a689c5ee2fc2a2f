"""The steps that a draft model runs ahead: what each sees of the tokens of the steps before it, and who serves them."""

from __future__ import annotations

from inspect import signature
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang", reason="needs SGLang's classes: make sglang")

from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.speculative.draft_utils import DraftBackendFactory

from adapters.test_sglang_backend import HEADS, KV_HEADS, SIZE, HybridPool, batch, layer, runner
from taut.adapters.engine import Selection
from taut.adapters.sglang import bridge, registration, selection
from taut.adapters.sglang.backend import TautBackend
from taut.adapters.sglang.drafts import TautDraftBackend

STEPS = 4  # tokens of a draft, the first of which is no step's
LENGTHS = [9, 7]


@pytest.fixture(autouse=True)
def _told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_state", selection._State(Selection("on")))


def test_drafts_are_a_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang is asked for in the arguments, with a draft's backend named or not."""
    for named in ({}, {"speculative_draft_attention_backend": "taut"}):
        arguments = SimpleNamespace(speculative_algorithm="EAGLE3", speculative_eagle_topk=1, **named)
        assert selection.argument_refusals(arguments) == []


def planned(drafts: TautDraftBackend, forward: Any, how: str) -> None:
    """Have the metadata of all steps made, from a batch that was captured with other lengths."""
    lengths = forward.seq_lens.clone()
    if how == "eager":
        drafts.init_forward_metadata(forward)
        return
    forward.seq_lens.fill_(1)
    if how == "graph":
        drafts.init_forward_metadata_out_graph(forward, in_capture=True)
        drafts.init_forward_metadata_in_graph(forward)
        forward.seq_lens.copy_(lengths)
        drafts.init_forward_metadata_out_graph(forward)
        drafts.init_forward_metadata_in_graph(forward)  # what a replay runs again
    else:
        drafts.init_forward_metadata_capture_cuda_graph(forward)
        forward.seq_lens.copy_(lengths)
        forward.forward_mode = ForwardMode.TARGET_VERIFY  # of the batch that is about to be verified
        drafts.init_forward_metadata_replay_cuda_graph(forward, len(LENGTHS))
        forward.forward_mode = ForwardMode.DECODE


@pytest.mark.parametrize("how", ["eager", "graph", "graph before 0.5.13"])
@pytest.mark.parametrize("window", [-1, 4])
def test_each_step_sees_what_the_steps_before_it_appended(how: str, window: int) -> None:
    """Planned at once, over a poisoned pool, against torch's own attention over all keys so far."""
    torch.manual_seed(0)
    attention = layer(sliding_window_size=window)
    made = runner(attention, pool=HybridPool() if window > 0 else None)
    target = TautBackend(made)
    drafts = TautDraftBackend(made, STEPS)
    assert len(drafts.attn_backends) == STEPS - 1
    for backend in drafts.attn_backends:
        assert {problem.max_query for problem, _ in backend.builder.workspaces} == {1}  # no room for prompts
        backend.warm_up()
    forward = batch(made, ForwardMode.EXTEND, LENGTHS, LENGTHS)
    target.init_forward_metadata(forward)
    keys, values = (torch.randn(sum(LENGTHS), KV_HEADS, SIZE) for _ in range(2))
    target.forward(torch.randn(sum(LENGTHS), HEADS * SIZE), keys, values, attention, forward)
    seen = [list(t.split(LENGTHS)) for t in (keys, values)]
    room = batch(made, ForwardMode.DECODE, [length + STEPS for length in LENGTHS], [1, 1])  # fills `req_to_token`
    forward = SimpleNamespace(**vars(room) | {"seq_lens": torch.tensor(LENGTHS)})
    planned(drafts, forward, how)
    for step, backend in enumerate(drafts.attn_backends):
        rows = made.req_to_token_pool.req_to_token[forward.req_pool_indices]
        forward.out_cache_loc = rows[torch.arange(2), forward.seq_lens + step].long()
        query, key, value = (torch.randn(2, heads, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS))
        out = backend.forward(query.flatten(1), key, value, attention, forward).view(2, HEADS, SIZE)
        for row in range(2):
            for past, new in zip(seen, (key, value), strict=True):
                past[row] = torch.cat([past[row], new[row : row + 1]])
            last = window + 1 if window > 0 else len(seen[0][row])
            expected = torch.nn.functional.scaled_dot_product_attention(
                *(t.transpose(0, 1) for t in (query[row : row + 1], seen[0][row][-last:], seen[1][row][-last:])),
                enable_gqa=True,
            ).transpose(0, 1)
            torch.testing.assert_close(out[row : row + 1], expected, rtol=1e-5, atol=1e-5)


class Factory(DraftBackendFactory):
    """SGLang's, asked for our backend: its own are told apart by what they give."""

    def __init__(self, model_runner: Any) -> None:
        self.draft_model_runner, self.speculative_num_steps = model_runner, STEPS
        self.draft_attn_backend = bridge.NAME

    def _create_triton_decode_backend(self) -> Any:
        return "steps"

    def _create_triton_prefill_backend(self) -> Any:
        return "extend"

    def made(self, kind: str, *, named: bool) -> Any:
        """What the entry that is added gives for a kind of backend, where its map gives a name, too, and where not."""
        backends = {"triton": getattr(self, f"_create_triton_{kind}_backend")}
        if not named:
            self._create_backend = lambda _asked, _backends, _template: None
        hooks: list[Any] = []
        with pytest.MonkeyPatch.context() as patched:
            patched.setitem(bridge.sys.modules, bridge.SCHEDULER, SimpleNamespace())
            patched.setattr(bridge, "_hook", lambda _target, hook, _kind: hooks.append(hook))
            bridge.register_drafts(registration.build_drafts, registration.build)
        hooks[0](self, "decode_attention_backend", backends, "{backend_type}")
        return backends[bridge.NAME]()


@pytest.mark.parametrize("named", [True, False])
def test_which_backend_serves_what_of_a_draft(named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if named and "stamps_children" not in signature(DraftBackendFactory._create_backend).parameters:
        pytest.skip("a name is given, too, from 0.5.18 on")
    made = runner(layer())
    for kind, expected in (("decode", TautDraftBackend), ("prefill", TautBackend)):
        given = Factory(made).made(kind, named=named)
        name, backend = given if named else (bridge.NAME, given)
        assert (name, type(backend)) == (bridge.NAME, expected)
    made = runner(layer(is_cross_attention=True))
    with pytest.raises(ValueError, match="is_cross_attention"):
        Factory(made).made("decode", named=named)
    monkeypatch.setattr(selection, "_state", selection._State(Selection("auto")))
    assert Factory(made).made("decode", named=named) == "steps"
    assert any("SGLang's triton serves in our place" in line for line in selection._state.said)
