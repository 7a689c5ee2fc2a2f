"""Runs of SGLang's CPU engine, each in a process of its own, since a crash of its scheduler ends its parent too."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from integration.engine import MODEL
from taut.cli.demo import SERVES

SCRIPT = Path(__file__).with_name("sglang_generate.py")
ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "TRITON_INTERPRET": "1",  # SGLang's own helpers in Triton then run on a CPU
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TAUT_LOG": "debug",
}
PATIENCE = 600  # seconds for a run on a busy machine
USUAL = {
    "device": "cpu", "dtype": "float32", "max_total_tokens": 4096, "max_running_requests": 16,
    "mem_fraction_static": 0.2, "disable_cuda_graph": True, "skip_server_warmup": True, "log_level": "error",
}  # fmt: skip


@dataclass(frozen=True)
class Log:
    """What the processes of an engine logged.

    Args:
        log: all of it.
        pid: of the process that was started, which is not the one that runs the model.
    """

    log: str
    pid: int

    @property
    def proof(self) -> list[str]:
        """The lines by which processes of the engine say that our attention serves in them."""
        return [line for line in self.log.splitlines() if SERVES.search(line)]

    def assert_ours_served(self, kind: str) -> None:
        """The process that ran the model, not the one that was started, said that it serves and ran a step."""
        assert self.proof, self.log[-3000:]
        assert all(f"serves {kind} attention in SGLang" in line for line in self.proof)
        pids = {int(found[1]) for line in self.proof if (found := re.search(r"pid=(\d+)", line))}
        assert pids
        assert self.pid not in pids
        assert "first step:" in self.log


@dataclass(frozen=True)
class Run(Log):
    """One run of the engine: what came out, batch by batch, and what was logged."""

    ids: list[list[list[int]]]
    cached: list[list[int]]
    verified: list[list[int]]


class EngineFailedError(RuntimeError):
    """The engine's process ended without a result; holds the end of its log."""


def environment(attention: str | None, **different: str) -> dict[str, str]:
    """The variables of an engine's process; TAUT_ATTENTION is left unset where `attention` is None."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("TAUT_")}
    return variables | ENVIRONMENT | ({"TAUT_ATTENTION": attention} if attention else {}) | different


@cache
def _run(request: str, attention: str | None) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        asked, answered, log = (Path(folder, name) for name in ("request.json", "result.json", "log"))
        asked.write_text(request)
        with log.open("wb") as sink:
            command = [sys.executable, str(SCRIPT), str(asked), str(answered)]
            process = subprocess.Popen(command, env=environment(attention), stdout=sink, stderr=sink)
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
        said = log.read_text()
        if not answered.exists():
            raise EngineFailedError(f"the engine ended with status {process.returncode}. Its log ends:\n{said[-4000:]}")
        batches = json.loads(answered.read_text())
        columns = ([batch[name] for batch in batches] for name in ("ids", "cached", "verified"))
        return Run(said, process.pid, *columns)


def generate(
    attention: str | None,
    batches: list[Any],
    *,
    model: Path = MODEL,
    tokens: int = 32,
    spawned: dict[str, str] | None = None,
    **engine: Any,
) -> Run:
    """Generate greedily in float32; equal requests run once a session.

    Args:
        attention: TAUT_ATTENTION; None leaves it unset.
        batches: lists of prompts, one batch after the other.
        model: its folder.
        tokens: to generate for each prompt.
        spawned: variables of the processes that SGLang spawns, and of them alone.
        engine: further arguments of SGLang's `Engine`.
    """
    request = {"model": str(model), "batches": batches, "tokens": tokens, "engine": USUAL | engine}
    request["spawned"] = spawned or {}
    return _run(json.dumps(request), attention)
