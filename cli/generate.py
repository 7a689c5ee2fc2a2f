"""One run of vLLM in a process of its own: prompts in, tokens and times out, as JSON.

    python -m taut.cli.generate REQUEST.json RESULT.json

The demo and the integration tests start it with `TAUT_ATTENTION` set as they need it; what the engine logs goes to this
process's standard error, and that is where the proof of who served stands.

REQUEST holds `model` (a folder), one of `prompts` (texts), `chats` (questions for the model's chat template) or
`prompt_ids` (lists of tokens), `tokens` (how many to generate, greedily), `ignore_eos`, `score` (how many of the
prompts to judge, from the first on) and `engine` (further arguments of vLLM's `LLM`). RESULT holds `texts`, `token_ids`
and `cached_tokens` (prompt tokens found in the prefix cache) of each prompt, the `seconds` of them all, the
`preemptions` the scheduler counted (None where vLLM keeps no statistics), the `pid` of this process, and with `score`
the `logprobs` of each prompt's tokens after its first, and `best_logprobs`: of the tokens that the model would
have taken in their places. With `embed` nothing is generated: RESULT holds the `embeddings` of the prompts.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def generate(request: dict[str, Any]) -> dict[str, Any]:
    """Start vLLM, warm it up with one prompt, generate, and take the time of the generation alone."""
    from vllm import LLM, SamplingParams

    engine = LLM(request["model"], **request.get("engine", {}))
    prompts = _prompts(request, engine)
    if request.get("embed"):
        return {"embeddings": [list(one.outputs.embedding) for one in engine.embed(prompts, use_tqdm=False)]}
    greedy = SamplingParams(temperature=0, max_tokens=request["tokens"], ignore_eos=request.get("ignore_eos", True))
    engine.generate({"prompt_token_ids": [1]}, SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
    start = time.perf_counter()
    results = engine.generate(prompts, greedy, use_tqdm=False)
    seconds = time.perf_counter() - start
    answer: dict[str, Any] = {
        "texts": [result.outputs[0].text for result in results],
        "token_ids": [list(result.outputs[0].token_ids) for result in results],
        "cached_tokens": [result.num_cached_tokens for result in results],
        "seconds": seconds,
        "preemptions": _preemptions(engine),
        "pid": os.getpid(),
    }
    if request.get("score"):
        judged = engine.generate(
            prompts[: request["score"]], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1), use_tqdm=False
        )
        answer["logprobs"] = [_own_logprobs(result) for result in judged]
        answer["best_logprobs"] = [_best_logprobs(result) for result in judged]
    return answer


def _own_logprobs(result: Any) -> list[float]:
    """The log-probability that the model gave each token of a prompt, its first token left out."""
    pairs = zip(result.prompt_token_ids[1:], result.prompt_logprobs[1:], strict=True)
    return [candidates[token].logprob for token, candidates in pairs]


def _best_logprobs(result: Any) -> list[float]:
    """The highest log-probability of any token in each place of a prompt, its first left out."""
    return [max(candidate.logprob for candidate in candidates.values()) for candidates in result.prompt_logprobs[1:]]


def _prompts(request: dict[str, Any], engine: Any) -> list[Any]:
    if "prompt_ids" in request:
        return [{"prompt_token_ids": ids} for ids in request["prompt_ids"]]
    if request.get("prompts"):
        return list(request["prompts"])
    template = engine.get_tokenizer().apply_chat_template
    chats = [[{"role": "user", "content": question}] for question in request["chats"]]
    return [template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]


def _preemptions(engine: Any) -> int | None:
    try:
        metrics = engine.get_metrics()
    except AssertionError:  # vLLM's word for an engine that was started without statistics
        return None
    return int(sum(metric.value for metric in metrics if metric.name == "vllm:num_preemptions"))


if __name__ == "__main__":  # an engine that spawns its processes imports this module again
    answer = generate(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(answer))
