"""Whole engines on made-up weights, their own attention and ours in turn.

    python -m benchmarks.engines vllm deepseek FLASH_ATTN_MLA TRITON_MLA taut
    python -m benchmarks.engines vllm llama FLASH_ATTN taut
    python -m benchmarks.engines sglang deepseek triton taut

Each backend gets a process of its own and the same loads in the same order, greedily; every load runs twice and the
second time counts, since the first holds compilation. `taut` is asked for as users ask for it, by `TAUT_ATTENTION=on`,
and the line by which it says that it serves must be in the log. Weights at random say nothing about quality.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich
from rich.table import Table

from benchmarks.harness import RESULTS, versions

if TYPE_CHECKING:
    from collections.abc import Callable

# A Llama of 1.2 billion parameters, and the attention of DeepSeek-V2 in twelve layers without experts.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "vocab_size": 32000, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu",
    },
    "deepseek": {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "hidden_size": 2048,
        "intermediate_size": 8192, "num_hidden_layers": 12, "num_attention_heads": 128, "num_key_value_heads": 128,
        "vocab_size": 32000, "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 999, "moe_layer_freq": 1,
        "moe_intermediate_size": 1408, "num_experts_per_tok": 2, "hidden_act": "silu",
    },
}  # fmt: skip
LOADS = ((8, 512, 256), (1, 30000, 64))  # requests, tokens in, tokens out
KV_CACHE = re.compile(
    r"GPU KV cache size: [\d,]+ tokens|Available KV cache memory: [\d.]+ GiB|max_total_num_tokens=\d+"
)
SERVES = re.compile(r"taut .* serves .* attention in .*")


def vllm(model: str, backend: str | None, options: dict[str, Any]) -> Callable[[list[list[int]], int], list[list[int]]]:
    from vllm import LLM, SamplingParams

    usual: dict[str, Any] = {
        "load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": 32768, "gpu_memory_utilization": 0.5,
        "dtype": "bfloat16", "enable_prefix_caching": False, "max_num_batched_tokens": 8192,
    }  # fmt: skip
    engine = LLM(model, **usual | ({"attention_backend": backend} if backend else {}) | options)

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        results = engine.generate([{"prompt_token_ids": ids} for ids in prompts], greedy, use_tqdm=False)
        return [list(result.outputs[0].token_ids) for result in results]

    return generate


def sglang(
    model: str, backend: str | None, options: dict[str, Any]
) -> Callable[[list[list[int]], int], list[list[int]]]:
    import sglang as engines

    usual: dict[str, Any] = {
        "load_format": "dummy", "skip_tokenizer_init": True, "sampling_backend": "pytorch", "mem_fraction_static": 0.6,
        "dtype": "bfloat16", "context_length": 32768, "disable_radix_cache": True,
    }  # fmt: skip
    engine = engines.Engine(model_path=model, **usual | ({"attention_backend": backend} if backend else {}) | options)

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        greedy = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        return [result["output_ids"] for result in engine.generate(input_ids=prompts, sampling_params=greedy)]

    return generate


ENGINES = {"vllm": vllm, "sglang": sglang}


def child(request: dict[str, Any]) -> list[dict[str, Any]]:
    """All loads through one engine, in this process."""
    generate = ENGINES[request["engine"]](request["model"], request["backend"], request["options"])
    rows = []
    for requests, tokens_in, tokens_out in request["loads"]:
        seconds = []
        for _ in range(2):
            random.seed(0)
            prompts = [[random.randrange(5, 31999) for _ in range(tokens_in)] for _ in range(requests)]
            start = time.perf_counter()
            tokens = generate(prompts, tokens_out)
            seconds.append(time.perf_counter() - start)
            assert all(len(row) == tokens_out for row in tokens)
        rows.append({"requests": requests, "tokens_in": tokens_in, "tokens_out": tokens_out, "seconds": seconds})
    return rows


def measure(engine: str, shape: str, backend: str, options: dict[str, Any]) -> dict[str, Any]:
    """One backend in a process of its own; `taut` is ours."""
    ours = backend == "taut"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TAUT_")}
    environment |= {
        "TAUT_ATTENTION": "on" if ours else "off",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(MODELS[shape]))
        request = {
            "engine": engine, "model": folder, "backend": None if ours else backend, "options": options, "loads": LOADS,
        }  # fmt: skip
        asked, answered = Path(folder, "request"), Path(folder, "answer")
        asked.write_text(json.dumps(request))
        command = [sys.executable, "-m", "benchmarks.engines", "--child", str(asked), str(answered)]
        process = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if not answered.exists():
            sys.exit(f"{backend} ended with status {process.returncode}:\n{process.stdout[-5000:]}")
        if ours and not SERVES.search(process.stdout):
            sys.exit(f"{engine} was not served by taut:\n{process.stdout[-5000:]}")
        return {
            "engine": engine,
            "model": shape,
            "backend": backend,
            "options": options,
            "loads": json.loads(answered.read_text()),
            "kv_cache": sorted(set(KV_CACHE.findall(process.stdout))),
            "serves": sorted({found.group() for found in SERVES.finditer(process.stdout)}),
        }


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("backend", "load", "first s", "second s", "tokens/s", "KV cache")
    for row in rows:
        for load in row["loads"]:
            first, second = load["seconds"]
            name = f"{load['requests']} x {load['tokens_in']}/{load['tokens_out']}"
            speed = load["requests"] * load["tokens_out"] / second
            cache = "; ".join(row["kv_cache"])
            table.add_row(row["backend"], name, f"{first:.2f}", f"{second:.2f}", f"{speed:.0f}", cache)
    rich.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=sorted(ENGINES))
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("backends", nargs="+", help="names of the engine's own backends, and taut")
    parser.add_argument("--options", type=json.loads, default={}, help="further arguments of the engine, as JSON")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the result is kept")
    asked = parser.parse_args()
    rows = []
    for backend in asked.backends:
        rich.print(f"{asked.engine} {asked.model} {backend} ...")
        rows.append(measure(asked.engine, asked.model, backend, asked.options))
        show(rows[-1:])
    show(rows)
    kept = {"about": versions(), "rows": rows}
    asked.folder.mkdir(parents=True, exist_ok=True)
    (asked.folder / f"{asked.engine}_{asked.model}.json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        answer = child(json.loads(Path(sys.argv[2]).read_text()))
        Path(sys.argv[3]).write_text(json.dumps(answer))
    else:
        main()
