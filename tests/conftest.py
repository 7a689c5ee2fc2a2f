"""What all tests share: hypothesis settings that give the same examples in every run, and a Ctrl-C that is heard."""

from __future__ import annotations

import signal

try:
    from hypothesis import HealthCheck, settings
except ModuleNotFoundError:  # a GPU machine may run tests/gpu without it
    pass
else:
    settings.register_profile(
        "taut",
        deadline=None,  # a shared machine is slow now and then
        derandomize=True,  # a red test must be red again
        max_examples=30,
        print_blob=False,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("taut")

# A shell has its background jobs ignore interruptions, and theirs do, too: those that tests interrupt must not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
