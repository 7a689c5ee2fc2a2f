"""`vllm serve` with the engine's own flag: a chat request is answered through our attention."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from integration.engine import ENVIRONMENT, generate
from integration.server import ask, free_port, stop, wait_until_healthy
from taut.cli.demo import SERVES

QUESTION = "What is the capital of France?"


def test_chat_request(model: Path, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "server.log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TAUT_")}
    environment |= ENVIRONMENT | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    command = [Path(sys.executable).parent / "vllm", "serve", model, "--served-model-name", "small"]
    command += ["--attention-backend", "CUSTOM", "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as sink:
        server = subprocess.Popen(command, env=environment, stdout=sink, stderr=sink, start_new_session=True)
        try:
            wait_until_healthy(server, port, log)
            body = {"model": "small", "messages": [{"role": "user", "content": QUESTION}]}
            answer = ask(port, "/v1/chat/completions", body | {"temperature": 0, "max_tokens": 16})
        finally:
            stop(server)
    text = answer["choices"][0]["message"]["content"]
    stock = generate("off", request={"chats": [QUESTION], "prompts": None, "tokens": 16, "ignore_eos": False})
    assert text == stock.result["texts"][0]
    assert "Paris" in text
    lines = log.read_text().splitlines()
    proof = [line for line in lines if SERVES.search(line)]
    assert proof
    assert all(f"pid={server.pid}]" not in line for line in proof)  # the engine's process, not the HTTP server's
    assert any("first step:" in line for line in lines)
