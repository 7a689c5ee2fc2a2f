"""vLLM on a GPU through our attention: as near to float32 as its own, eager and in CUDA graphs."""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM beside a GPU")
transformers = pytest.importorskip("transformers")

from taut.cli.demo import Run, run_engine  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path

PROMPTS = [[(7 * i + 13 * j) % 500 + 3 for j in range(length)] for i, length in enumerate((5, 37, 64, 130, 257, 600))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with weights large enough that attention decides what comes out."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2048, initializer_range=0.06,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[float]]:
    """The prompts' log-probabilities in float32, by transformers."""
    network = transformers.LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).cuda()
    scores = []
    with torch.no_grad():
        for prompt in PROMPTS:
            ids = torch.tensor([prompt], device="cuda")
            logprobs = network(ids).logits.log_softmax(-1)[0, :-1]
            scores.append(logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist())
    return scores


@cache
def generate(model: Path, attention: str | None, **engine: Any) -> Run:
    usual = {
        "max_model_len": 1024, "dtype": "bfloat16", "skip_tokenizer_init": True, "gpu_memory_utilization": 0.3,
        "max_num_batched_tokens": 512, "enforce_eager": True, "enable_prefix_caching": False,
    }  # fmt: skip
    request = {"model": str(model), "prompt_ids": PROMPTS, "tokens": 48, "score": True, "engine": usual | engine}
    return run_engine(request, attention, {"TAUT_LOG": "debug"})


def error(run: Run, expected: list[list[float]]) -> float:
    """Mean distance of log-probabilities."""
    pairs = [
        abs(mine - theirs)
        for own, right in zip(run.result["logprobs"], expected, strict=True)
        for mine, theirs in zip(own, right, strict=True)
    ]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize(
    ("attention", "engine"),
    [
        ("on", {}),
        ("auto", {"enforce_eager": False}),
        (None, {"attention_backend": "CUSTOM", "enforce_eager": False}),
    ],
    ids=["on, eager", "auto, graphs", "CUSTOM, graphs"],
)
def test_as_near_as_the_engines_own(
    attention: str | None, engine: dict[str, Any], model: Path, expected: list[list[float]]
) -> None:
    stock = generate(model, "off", enforce_eager=engine.get("enforce_eager", True))
    ours = generate(model, attention, **engine)
    assert not stock.proof
    assert ours.proof, ours.log[-3000:]
    ours_error, stock_error = error(ours, expected), error(stock, expected)
    same = sum(a == b for a, b in zip(ours.result["token_ids"], stock.result["token_ids"], strict=True))
    said = {"ours": ours_error, "stock": stock_error, "texts equal": same, "line": ours.proof[0]}
    print(json.dumps(said))  # noqa: T201 - the figures, for whoever runs this with -s
    assert ours_error < 1.2 * stock_error + 1e-3
    assert same >= len(PROMPTS) // 2
