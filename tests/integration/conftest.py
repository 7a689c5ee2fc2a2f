"""Every test here starts a real engine with a real model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from integration.engine import MODEL

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def model() -> Path:
    assert (MODEL / "config.json").exists(), "the model is missing: make model"
    return MODEL
