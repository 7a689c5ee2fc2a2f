"""Who sees what stands in one place a language."""

from __future__ import annotations

import re
from pathlib import Path

import taut.common_kernels

FOLDER = Path(taut.common_kernels.__file__).parent
WORDS = {"triton_mask": ("tl", "triton"), "hopper_mask": ("gl", "gluon")}


def what_is_said(name: str) -> str:
    """A twin from its first aggregate on, with one name for its language."""
    text = (FOLDER / f"{name}.py").read_text()
    language, home = WORDS[name]
    text = text[text.index("\n@aggregates_of(") :]
    return re.sub(
        rf"@{home}\.jit", "@jit", re.sub(rf"\b{language}\b", "language", text).replace(f", {home})", ", home)")
    )


def test_the_twins_are_one_text() -> None:
    assert what_is_said("triton_mask") == what_is_said("hopper_mask")


def test_nobody_else_says_who_sees_what() -> None:
    """Keys are held against positions, and windows are read, in the twins alone; others hand a mask over."""
    position = r"(?:\w+\.)*positions?\b(?:\[[^]]*\])?"
    decides = re.compile(rf"\bmask\.(?:left|right|HAS_LEFT|HAS_RIGHT)\b|[<>]=? *{position}|\b{position} *[<>]")
    assert decides.search("seen = keys[None, :] <= warpgroup.positions[:, None]")
    kernels = {path: text for path in FOLDER.rglob("*.py") if ".jit" in (text := path.read_text())}
    deciding = {path.stem for path, text in kernels.items() if decides.search(text)}
    assert deciding == set(WORDS)
