"""SGLang's HTTP server with the engine's own flag: a chat request is answered through our attention."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("sglang", reason="needs SGLang's CPU engine: make sglang")

from integration.server import ask, free_port, stop, wait_until_healthy
from integration.sglang_engine import PATIENCE, Log, environment

if TYPE_CHECKING:
    from pathlib import Path

QUESTION = "What is the capital of France?"


def test_chat_request(model: Path, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "server.log"
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--served-model-name", "small"]
    command += ["--attention-backend", "taut", "--device", "cpu", "--dtype", "float32", "--disable-cuda-graph"]
    command += ["--max-total-tokens", "2048", "--max-running-requests", "4", "--mem-fraction-static", "0.2"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "error"]
    command += ["--skip-server-warmup"]
    with log.open("wb") as sink:
        server = subprocess.Popen(command, env=environment(None), stdout=sink, stderr=sink, start_new_session=True)
        try:
            wait_until_healthy(server, port, log, PATIENCE)
            body = {"model": "small", "messages": [{"role": "user", "content": QUESTION}]}
            answer = ask(port, "/v1/chat/completions", body | {"temperature": 0, "max_tokens": 16})
        finally:
            stop(server)
    assert answer["choices"][0]["message"]["content"] == "The capital of France is Paris."
    Log(log.read_text(), server.pid).assert_ours_served("dense")
