"""The entry point `sglang.srt.plugins`. SGLang logs and swallows every exception that `register` raises.

What must stop the server therefore leaves as `SystemExit`, which SGLang lets through, with one line for people: a wrong
setting, and whatever goes wrong where TAUT_ATTENTION=on promises that ours serves.
"""

from __future__ import annotations

import os


def register() -> None:
    """Tell SGLang of our attention backends, as the settings say."""
    try:
        from taut.engine_plugins.hooks import load_into

        load_into("sglang")
    except ValueError as error:
        raise SystemExit(f"taut: {error}") from None
    except Exception as error:
        if os.environ.get("TAUT_ATTENTION") != "on":
            raise
        raise SystemExit(f"taut: TAUT_ATTENTION=on cannot take effect: {type(error).__name__}: {error}") from error
