"""One run of SGLang in a process of its own: batches of prompts in, tokens out, as JSON.

    python sglang_generate.py REQUEST.json RESULT.json

REQUEST holds `model`, `engine` (arguments of SGLang's `Engine`), `tokens` and `batches`: lists of texts, or of lists of
token ids, generated one batch after the other, and `spawned`: variables of the processes that SGLang spawns and of them
alone. RESULT holds for each batch the `ids`, the `cached` prompt tokens and how often drafts were `verified`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def generate(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Start SGLang and generate greedily, batch by batch."""
    import sglang

    if request["spawned"]:
        from sglang.srt.plugins import load_plugins

        load_plugins()  # in this process, before the others' variables are set
        os.environ.update(request["spawned"])
    engine = sglang.Engine(model_path=request["model"], **request["engine"])
    greedy = {"temperature": 0, "max_new_tokens": request["tokens"], "ignore_eos": True}
    results = []
    for batch in request["batches"]:
        prompts = {"prompt": batch} if isinstance(batch[0], str) else {"input_ids": batch}
        outputs = engine.generate(**prompts, sampling_params=greedy)
        results.append(
            {
                "ids": [output["output_ids"] for output in outputs],
                "cached": [output["meta_info"]["cached_tokens"] for output in outputs],
                "verified": [output["meta_info"].get("spec_verify_ct", 0) for output in outputs],
            }
        )
    Path(sys.argv[2]).write_text(json.dumps(results))
    engine.shutdown()
    return results


if __name__ == "__main__":  # SGLang's processes are spawned: they import this module again
    generate(json.loads(Path(sys.argv[1]).read_text()))
