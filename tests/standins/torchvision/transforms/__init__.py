"""Transforms: only what is named when this is imported."""

from enum import Enum

from .. import lacking


class InterpolationMode(Enum):
    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


from . import functional, v2  # noqa: E402, F401 - they import the name above

__getattr__ = lacking(__name__)
