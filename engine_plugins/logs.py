"""The log of this package: the logger `taut`, on the standard error of every engine process.

Engines configure their own loggers only, so ours has a handler of its own. `TAUT_LOG` sets the level.
"""

from __future__ import annotations

import logging
import sys

FORMAT = "taut %(levelname)s [%(processName)s pid=%(process)d] %(message)s"


def configure(level: str) -> None:
    """Give the logger `taut` one handler and a level ("debug", "info", "warning", "error"). Idempotent."""
    log = logging.getLogger("taut")
    log.setLevel(level.upper())
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(FORMAT))
        log.addHandler(handler)
        log.propagate = False  # an application that configures the root logger must not print every line twice
