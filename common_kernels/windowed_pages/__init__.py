"""The page table of layers that see a window only and keep their keys in slots of their own (SGLang's hybrid pools).

A row of it begins with the first key that one of the row's queries sees: scores depend on how far a key lies back, not
on where it stands. Made once a step for all such layers, in one launch on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from taut.common_kernels.step import PageTable, Step

if TYPE_CHECKING:
    from torch import Tensor


def windowed_step(step: Step, translation: Tensor, window: int) -> Step:
    """A step as the windowed layers see it: the same queries over the last keys only, in pages of one slot.

    Args:
        step: pages of one slot, `pages.table` [requests, context] int32.
        translation: [slots] int64, from a slot of the whole pool to that of the windowed layers.
        window: how far back a query sees, itself not counted.

    Returns:
        A step whose table, [R, width] int32, and lengths, [R] int32, are its own. What stands in the table past a row's
        length is of no meaning.
    """
    width = min(window + step.max_query, int(step.pages.table.shape[1]))
    table = step.pages.table.new_empty(step.rows, width)
    lengths = step.lengths.new_empty(step.rows)
    if table.device.type == "cpu":
        from taut.common_kernels.windowed_pages.reference import fill
    else:
        from taut.common_kernels.windowed_pages.triton_kernel import fill
    fill(step, translation, window, table, lengths)
    return Step(step.query_starts, lengths, PageTable(table, 1), step.max_query, width)
