"""What is said of rows without work, whatever a backend leaves in them: stand-ins for dense and latent layers."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from taut.audit.padding import POISON, ROWS, padded, try_padding

if TYPE_CHECKING:
    from collections.abc import Callable

WORKING = 2  # rows with work


@dataclass
class Batch:
    """As vLLM's `CommonAttentionMetadata`."""

    num_reqs: int
    num_actual_tokens: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    slot_mapping: torch.Tensor
    block_table_tensor: torch.Tensor


def batch() -> Batch:
    return Batch(
        WORKING, WORKING, torch.tensor([0, 1, 2]), torch.tensor([7, 9]), torch.tensor([6, 8]), torch.ones(2, 4)
    )


class Builder:
    """Gives the batch itself as its metadata."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(dtype=dtype))

    def build(self, _: int, common: Batch) -> Batch:
        return common


def numbers_everywhere(out: torch.Tensor, _: Batch) -> None:
    out.zero_()


def nothing_in_idle_rows(out: torch.Tensor, common: Batch) -> None:
    out[: int(common.query_start_loc[-1])] = 1


def nan_in_idle_rows(out: torch.Tensor, common: Batch) -> None:
    weights = (common.seq_lens > 0).to(out.dtype)
    out[:] = (weights / weights)[:, None, None]  # as a sum of no exponentials divides


def a_failure(out: torch.Tensor, common: Batch) -> None:
    raise ValueError("no such batch")


CASES: list[tuple[Callable[[torch.Tensor, Batch], None], bool | None, str]] = [
    (numbers_everywhere, True, "finite numbers"),
    (nothing_in_idle_rows, None, "keep what their memory held"),
    (nan_in_idle_rows, False, "NaN or inf"),
    (a_failure, None, "could not be tried: ValueError: no such batch"),
]


def dense(write: Callable[[torch.Tensor, Batch], None]) -> SimpleNamespace:
    def forward(layer: Any, query: Any, key: Any, value: Any, cache: Any, metadata: Batch, output: Any) -> None:
        write(output, metadata)

    return SimpleNamespace(
        num_heads=4, num_kv_heads=2, head_size=8, kv_cache=torch.empty(1), impl=SimpleNamespace(forward=forward)
    )


def latent(write: Callable[[torch.Tensor, Batch], None], *, over_the_query: bool, cache: Any) -> SimpleNamespace:
    def forward_mqa(query: Any, cache: Any, metadata: Batch, layer: Any) -> Any:
        out = query[0] if over_the_query else torch.empty_like(query[0])
        write(out, metadata)
        return out, None

    return SimpleNamespace(
        num_heads=4, kv_lora_rank=16, qk_rope_head_dim=8, kv_cache=cache, impl=SimpleNamespace(forward_mqa=forward_mqa)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("write", "finite", "says"), CASES)
def test_idle_rows(
    write: Callable[[torch.Tensor, Batch], None], finite: bool | None, says: str, dtype: torch.dtype
) -> None:
    cache = torch.empty(1, dtype=dtype)
    layers = [dense(write), *(latent(write, over_the_query=over, cache=cache) for over in (False, True))]
    for layer in layers:
        found = try_padding(Builder(dtype), layer, batch())
        assert (found.rows, found.finite) == (ROWS, finite)
        assert says in found.says


def test_a_quantised_latent_cache_is_not_tried() -> None:
    cache = torch.empty(1, dtype=torch.uint8)
    found = try_padding(Builder(torch.bfloat16), latent(a_failure, over_the_query=True, cache=cache), batch())
    assert found.finite is None
    assert "quantised" in found.says


def test_a_batch_is_padded_as_vllm_does() -> None:
    wide = padded(batch(), ROWS)
    assert (wide.num_reqs, wide.num_actual_tokens) == (WORKING + ROWS, WORKING + ROWS)
    assert wide.query_start_loc.tolist() == [0, 1, 2, 2, 2, 2]
    assert wide.seq_lens.tolist() == [7, 9, 0, 0, 0]
    assert wide.slot_mapping.tolist() == [6, 8, -1, -1, -1]
    assert wide.block_table_tensor.shape == (WORKING + ROWS, 4)


def test_every_dtype_holds_the_poison() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.tensor(POISON, dtype=dtype).item() == POISON
