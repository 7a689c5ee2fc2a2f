"""The probes of an adapter's ledger, run in a process of their own: they import the engine, which may be broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from taut.engine_plugins.hooks import engines
from taut.engine_plugins.settings import PREFIX

SECONDS = 180  # an engine's first import reads a lot from a cold disk
CHILD = f"import sys; from {__name__} import main; main(*sys.argv[1:])"


class ProbeError(RuntimeError):
    """The process of the probes ended without an answer; the message says how, in one line."""


def probe(engine: str) -> list[dict[str, Any]]:
    """Every entry of an engine's ledger with its verdict.

    Raises:
        ProbeError: the engine cannot be imported, or kills the process that does.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")  # not on the standard output, where an engine prints as it likes
        command = [sys.executable, "-c", CHILD, engine, str(answer)]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise ProbeError(f"it took longer than {SECONDS} seconds") from None
        if not answer.exists():
            said = ["it said nothing", *filter(str.strip, done.stderr.splitlines())]
            raise ProbeError(f"status {done.returncode}, {said[-1]}")
        return list(json.loads(answer.read_text()))


def main(engine: str, answer: str) -> None:
    """Ask every probe, and write what they say into a file."""
    adapter = engines()[engine]
    __import__(adapter.module)  # said as what it is, once, and not by every probe
    entries = [vars(touch) | {"engine": engine, "verdict": touch.verdict()} for touch in adapter.ledger()]
    told = ("engine", "what", "since", "until", "verdict", "needed")
    Path(answer).write_text(json.dumps([{key: entry[key] for key in told} for entry in entries]))
