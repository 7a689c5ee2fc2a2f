"""vLLM on a GPU through our attention: as near to float32 as its own, eager and in CUDA graphs.

Two right kernels differ in the last bits of bfloat16, and a greedy text from there on. So the texts are not held
against each other but against the model in float32: the prompts' log-probabilities (prefill), and how far each
generated token lies behind the one that float32 would have taken in its place (decode).
"""

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
TOKENS = 48
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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


@cache
def generate(model: Path, attention: str | None, **engine: Any) -> Run:
    usual = {
        "max_model_len": 1024, "dtype": "bfloat16", "skip_tokenizer_init": True, "gpu_memory_utilization": 0.3,
        "max_num_batched_tokens": 512, "enforce_eager": True, "enable_prefix_caching": False,
    }  # fmt: skip
    request = {
        "model": str(model),
        "prompt_ids": PROMPTS,
        "tokens": TOKENS,
        "score": len(PROMPTS),
        "engine": usual | engine,
    }
    return run_engine(request, attention, {"TAUT_LOG": "debug"})


def errors(run: Run, model: Path) -> tuple[float, float]:
    """Mean distance of the prompts' log-probabilities from float32, and mean shortfall of the generated tokens."""
    network = transformers.LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).to(DEVICE)
    distances, shortfalls = [], []
    for prompt, tokens, own in zip(PROMPTS, run.result["token_ids"], run.result["logprobs"], strict=True):
        ids = torch.tensor([prompt + tokens], device=DEVICE)
        with torch.no_grad():
            logprobs = network(ids).logits.log_softmax(-1)[0, :-1].cpu()  # [n - 1, 512], of the tokens after the first
        taken = logprobs.gather(1, ids[0, 1:, None].cpu())[:, 0]
        split = len(prompt) - 1
        distances.append((torch.tensor(own) - taken[:split]).abs())
        shortfalls.append(logprobs[split:].amax(1) - taken[split:])
    assert all(len(shortfall) == TOKENS for shortfall in shortfalls)
    return float(torch.cat(distances).mean()), float(torch.cat(shortfalls).mean())


@pytest.mark.parametrize(
    ("attention", "engine"),
    [
        ("on", {}),
        ("auto", {"enforce_eager": False}),
        (None, {"attention_backend": "CUSTOM", "enforce_eager": False}),
    ],
    ids=["on, eager", "auto, graphs", "CUSTOM, graphs"],
)
def test_as_near_as_the_engines_own(attention: str | None, engine: dict[str, Any], model: Path) -> None:
    stock = generate(model, "off", enforce_eager=engine.get("enforce_eager", True))
    ours = generate(model, attention, **engine)
    assert not stock.proof
    assert ours.proof, ours.log[-3000:]
    (prefill, decode), (stock_prefill, stock_decode) = errors(ours, model), errors(stock, model)
    figures = {"prefill": prefill, "decode": decode, "stock prefill": stock_prefill, "stock decode": stock_decode}
    print(json.dumps(figures | {"line": ours.proof[0]}))  # noqa: T201 - for whoever runs this with -s
    assert prefill < 1.2 * stock_prefill + 1e-3
    assert decode < 2 * stock_decode + 1e-2
