"""An engine's process, seen from outside: started, followed while it tells how far it is, and never left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from taut.audit.work import SAYS, read_run

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from taut.audit.records import Run
    from taut.audit.work import Request

INTERVAL = 0.1  # seconds between two looks at what an engine says
PATIENCE = 5.0  # seconds that an engine gets to end by itself when it is told to
# "ValueError: ...", as a traceback ends, whatever an engine's log writes before it; and what ends without a traceback.
REASON = re.compile(r"(?:^|[\s\]])(?:\w+\.)*(\w*(?:Error|Exception|Refused)): (.+)$")
LAST_WORD = re.compile(r"^taut: (.+)$")
# What engines say when they have seen another process of theirs fail.
SECOND_HAND = ("initialization failed", "See root cause above", "Rank 0 scheduler died", "died unexpectedly")


class EngineFailedError(RuntimeError):
    """An engine's process ended without a record; the message is the engine's reason."""


def run_engine(request: Request, environment: Mapping[str, str], follow: Callable[[str], None]) -> Run:
    """Run an engine with one backend, in a process of its own, and take what it recorded.

    Args:
        request: what it is to do.
        environment: its variables.
        follow: called with a few words whenever it is further.

    Raises:
        EngineFailedError: it did not end well.
    """
    with tempfile.TemporaryDirectory(prefix="taut-audit-") as folder:
        asked, recorded = Path(folder, "request.json"), Path(folder, "record.json")
        asked.write_text(json.dumps(dataclasses.asdict(request)))
        command = [sys.executable, "-m", f"taut.audit.run_{request.engine}", str(asked), str(recorded)]
        said = Path(folder, "log")  # a pipe would stay open as long as anything that it has started
        with said.open("wb") as sink:
            process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # all that it starts can be ended together, and Ctrl-C reaches us alone
            )
        log: list[str] = []
        try:
            with said.open(errors="replace") as lines:
                running = True
                while running:
                    running = process.poll() is None
                    for line in lines:
                        log.append(line.rstrip("\n"))
                        if line.startswith(SAYS):
                            follow(line.removeprefix(SAYS).strip())
                    time.sleep(INTERVAL if running else 0)
        finally:
            end_group(process)
        if not recorded.exists():
            raise EngineFailedError(_failure(request, process.returncode, log))
        return read_run(recorded)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started; it leads its own group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            process.poll()  # or it would stay in its group as a zombie
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)


def reason(log: list[str]) -> str:
    """Why an engine stopped, by its own words: the last error it named that is not about another one."""
    for line in reversed(log):
        if found := LAST_WORD.search(line):
            return found[1]
    named = [found for line in log if (found := REASON.search(line))]
    first_hand = [found for found in named if not any(words in found[2] for words in SECOND_HAND)]
    if not first_hand:
        return " ".join(log[-3:]) or "it said nothing"
    return f"{first_hand[-1][1]}: {first_hand[-1][2]}"


def _failure(request: Request, status: int, log: list[str]) -> str:
    with tempfile.NamedTemporaryFile("w", prefix="taut-audit-", suffix=".log", delete=False) as kept:
        kept.write("\n".join(log))
    return (
        f"{request.engine} did not run with the backend {request.asked!r} (status {status}): {reason(log)}. "
        f"Its whole log: {kept.name}"
    )
