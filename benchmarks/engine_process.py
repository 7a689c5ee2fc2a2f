"""All loads through one engine, in a process of its own: requests in, the time of every token out, as JSON.

    python -m taut.benchmarks.engine_process REQUEST.json ANSWER.json

REQUEST holds `engine`, `options` (arguments of vLLM's `LLM` or SGLang's `Engine`), `vocabulary`, `runs` and `loads`
(each requests, tokens in, tokens out). ANSWER holds for each load and run the `seconds` and of each request the `times`
of its tokens, in seconds after the requests were handed over. All requests of a load begin together, with random
tokens, greedily.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Times = list[list[float]]
Serve = Callable[[list[list[int]], int], Times]


def vllm(options: dict[str, Any]) -> Serve:
    """vLLM in this very process, step by step as its own `LLM.generate` does."""
    from vllm import LLM, SamplingParams

    engine = LLM(**options).llm_engine

    def serve(prompts: list[list[int]], tokens: int) -> Times:
        greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        times: Times = [[] for _ in prompts]
        start = time.perf_counter()
        for number, ids in enumerate(prompts):
            engine.add_request(str(number), {"prompt_token_ids": ids}, greedy)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter() - start
            for output in outputs:
                mine = times[int(output.request_id)]
                mine += [now] * (len(output.outputs[0].token_ids) - len(mine))
        return times

    return serve


def sglang(options: dict[str, Any]) -> Serve:
    """SGLang's engine; its tokens are timed where they arrive, in this process."""
    import sglang as engines

    engine = engines.Engine(**options)

    def serve(prompts: list[list[int]], tokens: int) -> Times:
        greedy = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}

        async def one(ids: list[int]) -> list[float]:
            mine: list[float] = []
            chunks = await engine.async_generate(input_ids=ids, sampling_params=greedy, stream=True)
            async for chunk in chunks:
                now = time.perf_counter() - start
                mine += [now] * (chunk["meta_info"]["completion_tokens"] - len(mine))
            return mine

        async def everyone() -> Times:
            return list(await asyncio.gather(*map(one, prompts)))

        start = time.perf_counter()
        return engine.loop.run_until_complete(everyone())  # type: ignore[no-any-return]

    return serve


ENGINES = {"vllm": vllm, "sglang": sglang}


def main(asked: Path, answered: Path) -> None:
    """Serve every load as often as asked, and write what came out; between runs say where we are."""
    request = json.loads(asked.read_text())
    serve = ENGINES[request["engine"]](request["options"])
    answer = []
    for requests, tokens_in, tokens_out in request["loads"]:
        runs = []
        for run in range(request["runs"]):
            print(f"taut bench: {requests}x{tokens_in}/{tokens_out}, run {run + 1} of {request['runs']}", flush=True)  # noqa: T201
            random.seed(0)
            prompts = [[random.randrange(5, request["vocabulary"]) for _ in range(tokens_in)] for _ in range(requests)]
            times = serve(prompts, tokens_out)
            if any(len(mine) != tokens_out for mine in times):
                raise RuntimeError(f"asked for {tokens_out} tokens, got {sorted({len(mine) for mine in times})}")
            runs.append({"seconds": max(mine[-1] for mine in times), "times": times})
        answer.append(runs)
    say_memory()
    answered.write_text(json.dumps(answer))


def say_memory() -> None:
    """Say what is taken of the GPU by now: an engine makes buffers after it has sized its cache, too."""
    import torch

    if torch.cuda.is_available():
        free, there = torch.cuda.mem_get_info()
        print(f"GPU memory in use: {(there - free) / 2**30:.2f} GiB", flush=True)  # noqa: T201


if __name__ == "__main__":  # an engine that spawns its processes imports this module again
    main(Path(sys.argv[1]), Path(sys.argv[2]))
