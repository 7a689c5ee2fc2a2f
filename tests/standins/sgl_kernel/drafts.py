"""What SGLang asks of sgl_kernel for drafts, in plain torch: chains of them, `--speculative-eagle-topk 1`."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


def copy_all_layer_kv_cache_cpu(layers: Tensor, strides: Tensor, targets: Tensor, sources: Tensor) -> None:
    """Copy slots of every layer's cache, whose address and bytes of a slot are given."""
    for address, size in zip(layers.tolist(), strides.tolist(), strict=True):
        read = [ctypes.string_at(address + source * size, size) for source in sources.tolist()]
        for target, slot in zip(targets.tolist(), read, strict=True):
            ctypes.memmove(address + target * size, slot, size)


def assign_req_to_token_pool_cpu(
    rows: Tensor, table: Tensor, starts: Tensor, ends: Tensor, slots: Tensor, _length: int
) -> None:
    """Write slots into each row of the table from its start to its end."""
    place = 0
    for row, start, end in zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True):
        table[row, start:end] = slots[place : place + end - start].to(table.dtype)
        place += end - start


def assign_extend_cache_locs_cpu(
    rows: Tensor, table: Tensor, starts: Tensor, ends: Tensor, slots: Tensor, _length: int
) -> None:
    """Read them."""
    place = 0
    for row, start, end in zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True):
        slots[place : place + end - start] = table[row, start:end].to(slots.dtype)
        place += end - start


def assign_draft_cache_locs_contiguous_cpu(
    rows: Tensor, table: Tensor, lengths: Tensor, slots: Tensor, length: int, topk: int, steps: int
) -> None:
    """Read those that follow each row's tokens, one for each step."""
    assign_extend_cache_locs_cpu(rows, table, lengths, lengths + topk * steps, slots, length)


def build_tree_kernel_efficient_cpu(
    _parents: Tensor,
    _selected: Tensor,
    lengths: Tensor,
    mask: Tensor,
    positions: Tensor,
    indices: Tensor,
    following: Tensor,
    _siblings: Tensor,
    topk: int,
    _steps: int,
    tokens: int,
    _mode: Any,
) -> None:
    """A tree that is a chain: each token's place, the one that follows it, and what it sees of the others."""
    assert topk == 1
    rows, chain = lengths.numel(), torch.arange(tokens)
    positions.view(rows, tokens).copy_(lengths[:, None] + chain)
    indices.copy_(torch.arange(rows * tokens).view(rows, tokens))
    following.copy_(torch.where(chain + 1 < tokens, chain + 1, -1).expand(rows, tokens))
    mask[: rows * tokens**2].view(rows, tokens, tokens).copy_(chain[:, None] >= chain)


def verify_tree_greedy_cpu(
    *,
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    target_predict: Tensor,
) -> None:
    """Accept each row's drafts as long as they are what the model says itself, and its word after them."""
    rows, tokens = candidates.shape
    right = target_predict.view(rows, tokens)
    accept_index.fill_(-1)
    for row in range(rows):
        last, accepted = 0, 0
        accept_index[row, 0] = retrive_index[row, 0]
        while accepted + 1 < accept_index.shape[1]:
            draft = int(retrive_next_token[row, last])
            if draft < 0 or candidates[row, draft] != right[row, last]:
                break
            predicts[retrive_index[row, last]] = right[row, last].to(predicts.dtype)
            accepted += 1
            accept_index[row, accepted] = retrive_index[row, draft]
            last = draft
        accept_token_num[row] = accepted
        predicts[retrive_index[row, last]] = right[row, last].to(predicts.dtype)


def fill_bonus_tokens_cpu(tokens: Tensor, lengths: Tensor, bonus: Tensor, width: int) -> None:
    """The last token that each row accepted."""
    last = torch.arange(len(lengths)) * width + lengths.long() - 1
    bonus[: len(lengths)] = tokens.flatten()[last].to(bonus.dtype)


def fill_accept_out_cache_loc_cpu(indices: Tensor, slots: Tensor, accepted: Tensor) -> None:
    """The slots of what was accepted, side by side."""
    chosen = indices.flatten()
    chosen = chosen[chosen >= 0].long()
    accepted[: len(chosen)] = slots[chosen].to(accepted.dtype)
