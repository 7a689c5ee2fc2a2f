"""`paged_attention` and `ragged_attention` of the provider `hopper`, emulated, against the contract's words."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import gluon_emulator
import pytest
import torch
from cases import LAYOUTS, MASKS, PAGED_BATCH, PagedCase, assert_close, build_paged, build_ragged
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from strategies import paged_cases
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from taut.common_kernels.builtin import HOPPER_SIZES
from taut.common_kernels.kernels import NoWorkspace
from taut.common_kernels.paged_attention import hopper_launch, triton_launch
from taut.common_kernels.paged_attention.hopper_decode import max_over_keys, sum_over_keys
from taut.common_kernels.step import Mask
from taut.common_kernels.workspace import DeviceFacts

if TYPE_CHECKING:
    from pathlib import Path

# An instruction that does nothing, at which the assembler stops moving others.
gluon_emulator.replace("worked_out", lambda row_sum: row_sum)
gluon_emulator.replace("rescaled", lambda acc, alpha: acc * alpha)

FACTS = DeviceFacts("sm_90", 232_448, 4)
REGISTERS = {"load_registers": 40, "gather_registers": 72}
PREFILL_TILE = REGISTERS | {"rows": 128, "keys": 32, "stages": 2, "pack": 2}
DECODE_TILE = REGISTERS | {"rows": 16, "keys": 64, "stages": 2, "programs": 2, "share": 1, "spare": 2}
PORTABLE_TILE = {"rows": 16, "keys": 16, "pack": 2, "warps": 4, "stages": 1}  # for keys that there are none of
# Which rows go to which kernel: all to decode, none, or those of up to two queries.
SERVED_BY = {"decode": 16, "prefill": 0, "both": 2}
SHORT: dict[str, Any] = {"head_size": 64, "value_size": 64, "dtype": "bfloat16"}
LONG: dict[str, Any] = SHORT | {"lengths": (37, 0, 5, 140, 290), "queries": (1, 2, 5, 20, 150), "page_size": 32}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The kernels with small tiles, so that rings go round and tiles are of every kind."""
    tiles = {"hopper_paged_prefill": PREFILL_TILE, "hopper_paged_decode": DECODE_TILE, "paged_prefill": PORTABLE_TILE}
    path: Path = tmp_path_factory.mktemp("tables") / "small.json"
    operations = {operation: [{"when": {}, "tile": tile}] for operation, tile in tiles.items()}
    of_64 = {"when": {"key_bytes": [0, 256]}, "tile": PREFILL_TILE | {"rows": 192, "load_registers": 32}}
    operations["hopper_paged_prefill"].insert(0, of_64)
    table = {"about": "", "vendor": "nvidia", "targets": [], "shared_memory": 0, "operations": operations}
    path.write_text(json.dumps(table))
    torch.set_num_threads(1)
    return SimpleNamespace(
        workspace=partial(hopper_launch.paged_workspace, table_path=str(path)),
        paged_attention=hopper_launch.paged_attention,
        ragged_attention=partial(hopper_launch.ragged_attention, workspace=NoWorkspace(str(path))),
    )


def check(kernels: Any, case: PagedCase, served_by: str = "both", seed: int = 0) -> None:
    """A case through the kernels that serve it, in the order of a seed; all of one row are served by decode."""
    inputs = build_paged(case)
    with pytest.MonkeyPatch.context() as patch, gluon_emulator.seeded(seed) as launched:
        patch.setattr(triton_launch, "DECODE_QUERIES", SERVED_BY[served_by])
        patch.setattr(hopper_launch, "device_facts", lambda _: FACTS)
        patch.setattr(hopper_launch, "registers_can_move", lambda: True)
        assert_close(inputs.run(kernels), inputs.expected(), case.dtype)
    extends = inputs.step.max_query > SERVED_BY[served_by]
    assert launched == (["taut_prefill"] * extends + ["taut_decode"] if inputs.tokens else [])


def check_ragged(kernels: Any, case: PagedCase, seed: int = 0) -> None:
    """The same without pages."""
    inputs = build_ragged(case)
    with gluon_emulator.seeded(seed):
        assert_close(inputs.call(kernels.ragged_attention), inputs.expected(), case.dtype)


@given(
    paged_cases(),
    st.sampled_from(HOPPER_SIZES),
    st.sampled_from(("decode", "both")),
    st.sampled_from(("bfloat16", "float16")),
)
@settings(max_examples=20, phases=[Phase.generate])
def test_contract(small: Any, case: PagedCase, sizes: tuple[int, int], served_by: str, dtype: str) -> None:
    check(small, replace(case, head_size=sizes[0], value_size=sizes[1], dtype=dtype), served_by, case.seed)


@given(paged_cases(**SHORT))
@settings(max_examples=10, phases=[Phase.generate])
def test_ragged_contract(small: Any, case: PagedCase) -> None:
    check_ragged(small, case, case.seed)


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("row", [2, 4])
def test_a_neighbour_whose_values_are_not_numbers(small: Any, row: int, head_size: int) -> None:
    """Where keys lie side by side a row's last tile, or a row without keys, ends in the keys of the next."""
    sizes = {"head_size": head_size, "value_size": head_size}
    inputs = build_ragged(PagedCase(**LONG | sizes))
    _, _, value, query_starts, key_starts, _ = inputs.arguments
    expected, _ = inputs.expected()
    value[key_starts[row] : key_starts[row + 1]] = torch.nan
    out, _ = inputs.outputs()
    small.ragged_attention(*inputs.arguments, out[: inputs.tokens], **inputs.options)
    others = torch.ones(inputs.tokens, dtype=torch.bool)
    others[query_starts[row] : query_starts[row + 1]] = False
    torch.testing.assert_close(out[: inputs.tokens][others].float(), expected[others].float(), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("page_size", [16, 3])
@pytest.mark.parametrize("served_by", ["decode", "prefill"])
def test_masks(small: Any, mask: Mask, page_size: int, served_by: str) -> None:
    """By boxes of the copy engine, and gathered."""
    features = {"sinks": True, "alibi": True, "forget_unseen": True}
    check(small, PagedCase(**PAGED_BATCH, **SHORT, mask=mask, page_size=page_size, **features), served_by, page_size)


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_page_sizes(small: Any, page_size: int, layout: Any) -> None:
    batch = PAGED_BATCH | {"page_size": page_size, "layout": layout}
    check(small, PagedCase(**batch, **SHORT, indirect=True, strided_query=True))


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(1, 1), (7, 1), (12, 2)])
@pytest.mark.parametrize("served_by", ["decode", "prefill"])
def test_groups(small: Any, q_heads: int, kv_heads: int, served_by: str) -> None:
    check(small, PagedCase(**PAGED_BATCH, **SHORT, q_heads=q_heads, kv_heads=kv_heads), served_by)


@pytest.mark.parametrize("together", [1, 2])
def test_heads_that_are_served_one_after_the_other(small: Any, monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    monkeypatch.setattr(hopper_launch, "heads_together", lambda *_: together)
    check(small, PagedCase(**PAGED_BATCH, **SHORT, q_heads=9, kv_heads=3), "prefill")


@pytest.mark.parametrize("seed", range(8))
def test_any_order(small: Any, seed: int) -> None:
    """Rings that go round several times, in the order of several seeds."""
    check(small, PagedCase(**LONG, mask=Mask(left=200), seed=seed), "both", seed)
    check_ragged(small, PagedCase(**LONG, seed=seed), seed)


@gluon.jit
def over_keys_kernel(
    scores: gl.tensor,
    maxima: gl.tensor,
    sums: gl.tensor,
    BLOCK_N: gl.constexpr,  # noqa: N803
    BLOCK_M: gl.constexpr,  # noqa: N803
) -> None:
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    keys = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, layout))
    m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, layout))
    tile = gl.load(scores + keys[:, None] * BLOCK_M + m[None, :])
    gl.store(maxima + m, max_over_keys(tile))
    gl.store(sums + m, sum_over_keys(tile))


@given(st.integers(0, 1000), st.sampled_from((64, 128)), st.sampled_from((8, 16, 64)))
@settings(max_examples=20, phases=[Phase.generate])
def test_maxima_over_keys_are_the_highest(seed: int, keys: int, rows: int) -> None:
    """A softmax that takes too little for the maximum gives the same until it overflows: other tests might not tell."""
    scores = torch.randn(keys, rows, generator=torch.Generator().manual_seed(seed))
    maxima, sums = torch.full((2, rows), torch.nan)
    over_keys_kernel[(1,)](scores, maxima, sums, keys, rows)
    assert torch.equal(maxima, scores.amax(0))
    torch.testing.assert_close(sums, scores.sum(0))
