"""The page table of windowed layers: the kernel, the plain torch, and what both are to say in words."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taut.common_kernels.step import PageTable, Step
from taut.common_kernels.windowed_pages import on_cpu, triton_launch, windowed_step

CONTEXT, SLOTS = 40, 500


@given(
    rows=st.lists(st.tuples(st.integers(0, CONTEXT), st.integers(0, 5)), min_size=1, max_size=6),
    window=st.sampled_from((0, 3, 17, 100)),
    named=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_the_last_keys_in_slots_of_their_own(rows: list[tuple[int, int]], window: int, named: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = [(length, min(queries, length)) for length, queries in rows]
    table = torch.full((8, CONTEXT), 2**30, dtype=torch.int32)  # dead entries
    order = torch.randperm(8, generator=generator)[: len(rows)] if named else torch.arange(len(rows))
    translation = torch.randint(0, 10_000, (SLOTS,), generator=generator)
    for request, (length, _) in zip(order.tolist(), rows, strict=True):
        table[request, :length] = torch.randperm(SLOTS, generator=generator)[:length].int()
    starts = torch.tensor([0, *torch.tensor([queries for _, queries in rows]).cumsum(0).tolist()], dtype=torch.int32)
    lengths = torch.tensor([length for length, _ in rows], dtype=torch.int32)
    longest = max(1, *(queries for _, queries in rows))
    step = Step(starts, lengths, PageTable(table, 1, order if named else None), longest, CONTEXT)
    width = min(window + longest, CONTEXT)
    for fill in (on_cpu.fill, triton_launch.fill):
        made, kept = torch.full((len(rows), width), -7, dtype=torch.int32), torch.full((len(rows),), -7).int()
        fill(step, translation, window, made, kept)
        for row, (request, (length, queries)) in enumerate(zip(order.tolist(), rows, strict=True)):
            first = max(0, length - queries - window)
            assert kept[row] == length - first
            assert made[row, : length - first].tolist() == translation[table[request, first:length].long()].tolist()


@pytest.mark.parametrize("rows", [0, 3])
def test_a_step_of_its_own(rows: int) -> None:
    table, lengths = torch.arange(5 * CONTEXT, dtype=torch.int32).view(5, CONTEXT), torch.full((rows,), 30).int()
    step = Step(torch.arange(rows + 1).int(), lengths, PageTable(table, 1), 1, CONTEXT)
    made = windowed_step(step, torch.arange(SLOTS) + 1, 7)
    assert made.pages.table.shape == (rows, 16)  # a multiple of 16, which is what its stride is compiled for
    assert made.lengths.tolist() == [8] * rows
    assert (made.max_query, made.max_length, made.pages.page_size) == (1, 8, 1)
    assert made.query_starts is step.query_starts
    wanted = [list(range(CONTEXT * row + 23, CONTEXT * row + 31)) for row in range(rows)]
    assert made.pages.table[:, :8].tolist() == wanted


def test_a_step_is_made_anew_where_it_lies() -> None:
    """For graphs whose metadata is filled before each replay."""
    table, lengths = torch.arange(CONTEXT, dtype=torch.int32)[None], torch.tensor([30], dtype=torch.int32)
    step = Step(torch.arange(2).int(), lengths, PageTable(table, 1), 1, CONTEXT)
    made = windowed_step(step, torch.arange(SLOTS), 3)
    lengths.fill_(2)
    assert windowed_step(step, torch.arange(SLOTS), 3, made) is made
    assert made.lengths.tolist() == [2]
    assert made.pages.table[0, :2].tolist() == [0, 1]
