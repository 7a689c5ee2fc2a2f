"""The entry point `vllm.general_plugins`. vLLM calls `register` in each of its processes, sometimes more than once.

vLLM swallows what goes wrong while this module is imported, and lets through what `register` raises: so nothing is
imported here that could fail.
"""


def register() -> None:
    """Tell vLLM of our attention backends, as the settings say."""
    from taut.engine_plugins.hooks import load_into

    load_into("vllm")
