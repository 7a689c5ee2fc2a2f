"""A plugin for pytest: vLLM's own tests, unedited, get our backends, and what became of each test is written down.

`vllm_suite` starts pytest with it. It does what every process of vLLM does, load the general plugins, before a test
module is imported; who is chosen then is `TAUT_ATTENTION`'s business. Each test's outcome goes to the file named by
`CONFORMANCE_OUTCOMES`, one JSON object a line, together with how often our implementations were called in it.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

OUTCOMES = "CONFORMANCE_OUTCOMES"
_calls = {"ours": 0}
_state = SimpleNamespace(gathers=False)


def _counted(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*arguments: Any, **named: Any) -> Any:
        _calls["ours"] += 1
        return method(*arguments, **named)

    return call


def pytest_configure(config: pytest.Config) -> None:
    from vllm.plugins import load_general_plugins

    # Among several processes those that run the tests know how often ours were called; the first only gathers.
    _state.gathers = bool(config.getoption("numprocesses", None)) and "PYTEST_XDIST_WORKER" not in os.environ

    load_general_plugins()
    if os.environ.get("TAUT_ATTENTION") == "off":
        return
    from taut.adapters.vllm.dense.layer import TautImplementation
    from taut.adapters.vllm.mla.layer import TautMLAImplementation

    for implementation, names in (
        (TautImplementation, ("forward",)),
        (TautMLAImplementation, ("forward_mha", "forward_mqa")),
    ):
        for name in names:
            setattr(implementation, name, _counted(getattr(implementation, name)))


def pytest_runtest_setup() -> None:
    _calls["ours"] = 0


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "teardown" and report.passed:
        return
    if report.when == "setup" and report.passed:
        return
    _write(report, _calls["ours"], report.duration)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A module that cannot be collected is a result, too: skipped whole, or broken."""
    if not report.passed:
        _write(report, 0, 0.0)


def _write(report: pytest.TestReport | pytest.CollectReport, calls: int, seconds: float) -> None:
    if _state.gathers:
        return
    outcome = {
        "test": report.nodeid,
        "outcome": report.outcome,
        "why": _why(report),
        "calls": calls,
        "seconds": round(seconds, 2),
    }
    with Path(os.environ[OUTCOMES]).open("a") as sink:
        sink.write(json.dumps(outcome) + "\n")


def _why(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The reason of a skip, or the first line of a failure that says something; "" for what passed."""
    if report.passed:
        return ""
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else str(report.longrepr)).strip()[:600]
