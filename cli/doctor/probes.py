"""The probes of an adapter's ledger, run in a process of their own: they import the engine, which may be broken.

python -m taut.cli.doctor.probes ENGINE RESULT.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from taut.engine_plugins.hooks import engines
from taut.engine_plugins.settings import PREFIX

if TYPE_CHECKING:
    from taut.cli.doctor.report import Row

SECONDS = 180  # an engine's first import reads a lot from a cold disk


class ProbeError(RuntimeError):
    """The process of the probes ended without an answer; the message says how, in one line."""


def probe(engine: str) -> list[Row]:
    """Every entry of an engine's ledger with its verdict.

    Raises:
        ProbeError: the engine cannot be imported, or kills the process that does.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        command = [sys.executable, "-m", "taut.cli.doctor.probes", engine, str(answer)]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise ProbeError(f"it took longer than {SECONDS} seconds") from None
        if not answer.exists():
            last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it said nothing")
            raise ProbeError(f"status {done.returncode}, {last}")
        found: list[Row] = json.loads(answer.read_text())
        return found


def main(engine: str, answer: Path) -> None:
    """Ask every probe, and write what they say."""
    adapter = engines()[engine]
    __import__(adapter.module)  # said as what it is, once, and not by every probe
    probed = []
    for touch in adapter.ledger():
        told = {"what": touch.what, "since": touch.since, "until": touch.until}
        probed.append({"engine": engine, **told, "verdict": touch.verdict(), "needed": touch.needed})
    answer.write_text(json.dumps(probed))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
