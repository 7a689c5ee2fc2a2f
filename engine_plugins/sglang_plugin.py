"""The entry point `sglang.srt.plugins`. SGLang logs and swallows every exception that `register` raises.

What must stop the server therefore leaves as `SystemExit`, which SGLang lets through, with one line for people.
"""


def register() -> None:
    """Tell SGLang of our attention backends, as the settings say."""
    from taut.engine_plugins.hooks import load_into

    try:
        load_into("sglang")
    except ValueError as error:
        raise SystemExit(f"taut: {error}") from None
