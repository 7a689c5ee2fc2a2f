"""Transforms, second version: none."""

from ... import lacking
from .. import InterpolationMode  # noqa: F401
from . import functional  # noqa: F401

__getattr__ = lacking(__name__)
