"""Tile tables per GPU, measured, as data."""
