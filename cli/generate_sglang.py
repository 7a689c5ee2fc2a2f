"""One run of SGLang in a process of its own: prompts in, tokens and times out, as JSON.

    python -m taut.cli.generate_sglang REQUEST.json RESULT.json

REQUEST and RESULT are those of `taut.cli.generate`, with `engine` as further arguments of SGLang's `Engine`. SGLang
does not tell of retractions: `preemptions` is None. Prompts are judged in a batch of their own, before the others: what
is found in the cache of prefixes has no log-probabilities.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def generate(request: dict[str, Any]) -> dict[str, Any]:
    """Start SGLang, warm it up with one prompt, generate, and take the time of the generation alone."""
    import sglang

    engine = sglang.Engine(model_path=request["model"], **request.get("engine", {}))
    prompts = _prompts(request, engine)
    greedy = {"temperature": 0, "max_new_tokens": request["tokens"], "ignore_eos": request.get("ignore_eos", True)}
    engine.generate(input_ids=[[1]], sampling_params=greedy | {"max_new_tokens": 2, "ignore_eos": True})
    answer: dict[str, Any] = {}
    if request.get("score"):
        judged = engine.generate(
            **{name: batch[: request["score"]] for name, batch in prompts.items()},
            sampling_params=greedy | {"max_new_tokens": 1},
            return_logprob=True,
            logprob_start_len=0,
            top_logprobs_num=1,
        )
        told = [result["meta_info"] for result in judged]
        answer["logprobs"] = [[one[0] for one in meta["input_token_logprobs"][1:]] for meta in told]
        answer["best_logprobs"] = [[best[0][0] for best in meta["input_top_logprobs"][1:]] for meta in told]
        engine.flush_cache()
    start = time.perf_counter()
    results = engine.generate(**prompts, sampling_params=greedy)
    answer |= {
        "seconds": time.perf_counter() - start,
        "texts": [result.get("text", "") for result in results],
        "token_ids": [list(result["output_ids"]) for result in results],
        "cached_tokens": [result["meta_info"]["cached_tokens"] for result in results],
        "preemptions": None,
        "pid": os.getpid(),
    }
    return answer


def _prompts(request: dict[str, Any], engine: Any) -> dict[str, list[Any]]:
    if "prompt_ids" in request:
        return {"input_ids": request["prompt_ids"]}
    if request.get("prompts"):
        return {"prompt": list(request["prompts"])}
    template = engine.tokenizer_manager.tokenizer.apply_chat_template
    chats = [[{"role": "user", "content": question}] for question in request["chats"]]
    return {"prompt": [template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]}


if __name__ == "__main__":  # SGLang's processes are spawned: they import this module again
    answer = generate(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(answer))
