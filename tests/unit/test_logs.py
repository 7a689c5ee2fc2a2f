"""The log: one handler, one line each, whatever an application does with the root logger."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from taut.engine_plugins import logs

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def log() -> Iterator[logging.Logger]:
    log = logging.getLogger("taut")
    before = log.handlers[:], log.level, log.propagate
    log.handlers.clear()
    log.propagate = True
    yield log
    log.handlers[:], log.level, log.propagate = before
    log.setLevel(before[1])  # also forgets which levels the loggers below have remembered


def test_configure_again_changes_only_the_level(log: logging.Logger) -> None:
    logs.configure("info")
    handlers = log.handlers[:]
    assert len(handlers) == 1
    logs.configure("debug")
    assert log.handlers == handlers
    assert log.level == logging.DEBUG


def test_a_line_is_printed_once_and_tells_its_process(capsys: pytest.CaptureFixture[str], log: logging.Logger) -> None:
    logs.configure("info")
    logs.configure("info")
    root = logging.StreamHandler()
    logging.getLogger().addHandler(root)
    try:
        logging.getLogger("taut.somewhere").info("hello")
        logging.getLogger("taut.somewhere").debug("not this")
    finally:
        logging.getLogger().removeHandler(root)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("taut INFO [MainProcess pid=")
    assert lines[0].endswith("] hello")
    assert not log.propagate


def test_a_handler_of_the_application_is_left_alone(log: logging.Logger) -> None:
    theirs = logging.NullHandler()
    log.addHandler(theirs)
    logs.configure("warning")
    assert log.handlers == [theirs]
    assert log.propagate
    assert log.level == logging.WARNING
