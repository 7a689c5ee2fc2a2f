"""Images in: only what is named when this is imported."""

from enum import Enum

from . import lacking


class ImageReadMode(Enum):
    UNCHANGED = 0
    GRAY = 1
    RGB = 3


__getattr__ = lacking(__name__)
