"""`vllm serve` with the engine's own flag: a chat request is answered through our attention."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from integration.engine import ENVIRONMENT, generate
from taut.cli.demo import SERVES

QUESTION = "What is the capital of France?"
PATIENCE = 240  # seconds for a server to start on a busy machine


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(port: int, path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data=data, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        text = response.read()
        return json.loads(text) if text else None


def wait_until_healthy(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            ask(port, "/health")
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
        else:
            return
    pytest.fail(f"the server did not start in {PATIENCE} s:\n{log.read_text()[-3000:]}")


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and every process it has spawned."""
    if server.poll() is None:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


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
