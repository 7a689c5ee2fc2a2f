"""The page table of layers that see a window only and keep their keys in slots of their own (SGLang's hybrid pools).

A row of it begins with the first key that one of the row's queries sees: scores depend on how far a key lies back, not
on where it stands. Made once a step for all such layers, in one launch on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from taut.common_kernels.step import PageTable, Step

if TYPE_CHECKING:
    from torch import Tensor

# The width of a table is its stride: a provider's kernels may be compiled for what it is divisible by. Ours are not.
WIDTHS = 16


def windowed_step(step: Step, translation: Tensor, window: int, made: Step | None = None) -> Step:
    """A step as the windowed layers see it: the same queries over the last keys only, in pages of one slot.

    Args:
        step: pages of one slot, `pages.table` [requests, context] int32.
        translation: [slots] int64, from a slot of the whole pool to that of the windowed layers.
        window: how far back a query sees, itself not counted.
        made: what this function made of the same step before, to be filled anew where it lies; None for the first time.

    Returns:
        A step whose table, [R, width] int32, and lengths, [R] int32, are its own. What stands in the table past a row's
        length is of no meaning.
    """
    width = min(window + step.max_query, int(step.pages.table.shape[1]))
    if made is None:
        table = step.pages.table.new_empty(step.rows, -(-width // WIDTHS) * WIDTHS)
        made = Step(step.query_starts, step.lengths.new_empty(step.rows), PageTable(table, 1), step.max_query, width)
    table, lengths = made.pages.table, made.lengths
    if table.device.type == "cpu":
        from taut.common_kernels.windowed_pages.on_cpu import fill
    else:
        from taut.common_kernels.windowed_pages.triton_launch import fill
    fill(step, translation, window, table, lengths)
    return made
