"""Reading a model's `config.json` that the user named."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from taut.cli import UserError

if TYPE_CHECKING:
    from pathlib import Path


def read_model(place: Path) -> dict[str, Any]:
    """The config of a model: a `config.json`, or the folder that holds it.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is not a config.
    """
    file = place / "config.json" if place.is_dir() else place
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--model {place}: {file.name} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"--model {place}: {file.name} holds no model's config, which is an object with keys")
    return config
