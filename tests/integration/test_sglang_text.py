"""SGLang's CPU engine through our attention: the tokens of its own attention, and of Hugging Face for MLA."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("sglang", reason="needs SGLang's CPU engine: make sglang")

from tiny_mla import greedy as hugging_face
from tiny_mla import make

from integration.engine import PROMPTS
from integration.sglang_engine import EngineFailedError, Run, generate

if TYPE_CHECKING:
    from pathlib import Path

TEXTS = list(PROMPTS)


@pytest.fixture(scope="module")
def stock(model: Path) -> Run:
    run = generate("off", [TEXTS], attention_backend="torch_native", disable_overlap_schedule=True)
    assert not run.proof
    assert "first step:" not in run.log
    return run


def test_plain(stock: Run) -> None:
    """Asked for with the engine's own argument; then once more, over the prefixes that are cached by now."""
    ours = generate(None, [TEXTS, TEXTS], attention_backend="taut", disable_overlap_schedule=True)
    ours.assert_ours_served("dense")
    assert all(len(ids) == 32 for ids in ours.ids[0])
    assert ours.ids[0] == stock.ids[0]
    assert min(ours.cached[1]) > 0
    assert ours.ids[1] == stock.ids[0]


def test_chunked_prefill_with_larger_pages_and_overlap(stock: Run) -> None:
    """Chosen by TAUT_ATTENTION: prompts in chunks of 16 tokens, pages of 16, the scheduler a step ahead."""
    ours = generate("on", [TEXTS, TEXTS], page_size=16, chunked_prefill_size=16)
    ours.assert_ours_served("dense")
    assert ours.ids == [stock.ids[0], stock.ids[0]]
    assert max(ours.cached[1]) >= 16


@pytest.mark.parametrize(("ours", "theirs"), [("prefill", "decode"), ("decode", "prefill")])
def test_prompts_alone_and_generation_alone(ours: str, theirs: str, stock: Run) -> None:
    """SGLang's own attention serves the other half, over the same cache."""
    halves = {f"{ours}_attention_backend": "taut", f"{theirs}_attention_backend": "torch_native"}
    run = generate(None, [TEXTS], **halves)
    run.assert_ours_served("dense")
    assert run.ids[0] == stock.ids[0]


@pytest.mark.parametrize("experts", [False, True], ids=["dense layers", "mixture of experts"])
def test_mla_as_hugging_face(experts: bool, tmp_path: Path) -> None:
    """A prompt without a prefix is unabsorbed, a short rest behind a cached one absorbed, a long one in one shot."""
    folder = make(tmp_path / "model", experts=experts)
    prompts = [[(7 * i + 13 * j) % 500 + 3 for j in range(5 + 9 * i)] for i in range(4)]
    longer = [prompt + [(11 * i + 3 * j) % 500 + 3 for j in range(400)] for i, prompt in enumerate(prompts[:1])]
    ours = generate("auto", [prompts, prompts, longer], model=folder, skip_tokenizer_init=True)
    ours.assert_ours_served("MLA")
    assert ours.ids[0] == hugging_face(folder, prompts, 32)
    assert min(ours.cached[1]) > 0
    assert ours.ids[1] == ours.ids[0]
    assert ours.cached[2][0] > 0
    assert ours.ids[2] == hugging_face(folder, longer, 32)


def test_a_long_prompt_of_mla_is_never_absorbed(tmp_path: Path) -> None:
    """In four chunks, as 30000 tokens are in chunks of 8192: each chunk but the first is served in one shot."""
    folder = make(tmp_path / "model", experts=False)
    prompt = [(7 * i + i * i) % 500 + 3 for i in range(1500)]
    ours = generate(
        "on", [[prompt]], model=folder, tokens=8, skip_tokenizer_init=True, disable_radix_cache=True,
        chunked_prefill_size=400,
    )  # fmt: skip
    ours.assert_ours_served("MLA")
    forms = set(re.findall(r"prompts are served in SGLang's form (\w+)", ours.log))
    assert forms == {"MHA", "MHA_ONE_SHOT"}
    assert ours.ids[0] == hugging_face(folder, [prompt], 8)


def refused(attention: str | None, **engine: Any) -> str:
    with pytest.raises(EngineFailedError) as stopped:
        generate(attention, [TEXTS[:1]], **engine)
    return str(stopped.value)


def test_on_and_another_backend_by_name_stop_the_server(model: Path) -> None:
    said = refused("on", attention_backend="torch_native")
    assert "--attention-backend torch_native asks for another backend" in said


def test_on_that_took_no_effect_stops_the_server(model: Path) -> None:
    """The process that computes was told `on`, and its arguments, resolved elsewhere, ask for another backend."""
    said = refused(None, attention_backend="torch_native", spawned={"TAUT_ATTENTION": "on"})
    assert "TAUT_ATTENTION=on did not take effect: SGLang built another attention backend" in said


def test_auto_leaves_a_backend_by_name_alone(model: Path) -> None:
    run = generate("auto", [TEXTS[:1]], tokens=2, attention_backend="torch_native", kv_cache_dtype="auto")
    assert not run.proof
    assert run.log.count("SGLang keeps its own attention: --attention-backend torch_native asks") == 1
