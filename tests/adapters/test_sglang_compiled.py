"""What the SGLang adapter's warm-up launches is what serving launches: nothing compiles while a model serves.

Without a GPU: launches are recorded, on tensors of a CPU that is taken for an H200, by what Triton compiles them for.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

pytest.importorskip("sglang", reason="needs SGLang's classes: make sglang")

from sglang.srt.model_executor.forward_batch_info import ForwardMode
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from adapters.test_sglang_backend import HybridPool, Pool, layer, runner
from taut.adapters.engine import Selection
from taut.adapters.sglang import backend, bridge, selection, service
from taut.common_kernels import workspace as workspaces
from taut.common_kernels.gluon_features import missing
from taut.common_kernels.merge import triton_launch as merge
from taut.common_kernels.mla_decode import hopper_launch as hopper_mla
from taut.common_kernels.paged_attention import hopper_launch as hopper_paged
from taut.common_kernels.paged_attention import triton_launch as portable_paged
from taut.common_kernels.schedule import triton_launch as schedule
from taut.common_kernels.store_kv import triton_launch as store
from taut.common_kernels.windowed_pages import on_cpu as windowed_on_cpu
from taut.common_kernels.windowed_pages import triton_launch as windowed
from taut.common_kernels.workspace import DeviceFacts

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(bool(missing()), reason="needs a Triton that has Gluon")

H200 = DeviceFacts("sm_90", 232_448, 132)
KERNELS = (
    (schedule, "taut_schedule"),
    (merge, "taut_merge"),
    (hopper_paged, "taut_decode"),
    (hopper_paged, "taut_prefill"),
    (hopper_mla, "taut_mla_decode"),
    (store, "taut_store_kv"),
    (windowed, "taut_windowed_pages"),
)
OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl")
REQUESTS, CONTEXT, CHUNK = 40, 1040, 8192
HEADS, RANK, ROPE, NOPE, VALUE = 16, 512, 64, 128, 128


def compiled_for(kernel: Any, launch: dict[str, Any]) -> tuple[Any, ...]:
    """What Triton compiles an instance of a kernel for; equal for launches that share one."""
    facts: list[Any] = [kernel.fn.__module__, kernel.fn.__name__, *(launch.get(option) for option in OPTIONS)]
    for parameter in kernel.params:
        value, free = launch[parameter.name], parameter.do_not_specialize
        if parameter.is_constexpr or value is None:
            fact: Any = repr(value)
        elif isinstance(value, TensorDescriptor):
            fact = value.base.dtype, tuple(value.block_shape)
        elif isinstance(value, torch.Tensor):
            fact = value.dtype, parameter.do_not_specialize_on_alignment or value.data_ptr() % 16 == 0
        elif isinstance(value, int):
            fact = abs(value) < 2**31, free or value == 1, free or value % 16 == 0
        else:
            fact = type(value)
        facts.append((parameter.name, fact))
    return tuple(facts)


@pytest.fixture
def instances(monkeypatch: pytest.MonkeyPatch) -> set[tuple[Any, ...]]:
    """Which instances have been launched so far."""
    launched: set[tuple[Any, ...]] = set()

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, _grid: Any) -> Callable[..., None]:
            def launch(*arguments: Any, **named: Any) -> None:
                by_name = dict(zip(self.kernel.arg_names, arguments, strict=False)) | named
                launched.add(compiled_for(self.kernel, by_name))

            return launch

    for module, name in KERNELS:
        monkeypatch.setattr(module, name, Recorder(getattr(module, name)))
    for module in (workspaces, portable_paged, hopper_paged, hopper_mla, store):
        monkeypatch.setattr(module, "device_facts", lambda _: H200)
    monkeypatch.setattr(windowed_on_cpu, "fill", windowed.fill)
    monkeypatch.setattr(service, "target_of", lambda _: "sm_90")
    monkeypatch.setattr(bridge, "register_mla", lambda _: None)
    monkeypatch.setattr(selection, "_state", selection._State(Selection("on")))
    return launched


def served(kind: str) -> tuple[tuple[Any, ...], backend.TautBackend]:
    """Layers and a backend: dense, windowed beside dense in a hybrid pool, or latent."""
    dense = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 64}
    if kind == "latent":
        absorbed = layer(num_heads=HEADS, num_kv_heads=1, head_dim=RANK + ROPE, v_head_dim=RANK)
        unabsorbed = layer(num_heads=HEADS, num_kv_heads=HEADS, head_dim=NOPE + ROPE, v_head_dim=VALUE)
        found, pool = (absorbed, unabsorbed), Pool(1, RANK + ROPE, torch.bfloat16)
    elif kind == "windowed":
        found, pool = (layer(sliding_window_size=127, **dense), layer(layer_id=1, **dense)), HybridPool()
        pool.layers_mapping = {0: (0, True), 1: (0, False)}
        pool.keys, pool.values = (torch.zeros(96, 8, 64, dtype=torch.bfloat16) for _ in range(2))
    else:
        found, pool = (layer(**dense),), Pool(8, 64, torch.bfloat16)
    made = runner(*found, pool=pool, mla=kind == "latent", speculative_num_draft_tokens=4)
    made.dtype, made.server_args.chunked_prefill_size = torch.bfloat16, CHUNK
    made.req_to_token_pool = SimpleNamespace(
        req_to_token=torch.zeros(REQUESTS + 1, CONTEXT, dtype=torch.int32), size=REQUESTS
    )
    return found, backend.TautBackend(made)


def forward_of(mode: ForwardMode, new: list[int], old: list[int]) -> Any:
    """A batch of SGLang's whose requests have so many new tokens and so many old ones."""
    return SimpleNamespace(
        forward_mode=mode, batch_size=len(new), req_pool_indices=torch.zeros(len(new), dtype=torch.int64),
        seq_lens=torch.tensor([a + b for a, b in zip(new, old, strict=True)]),
        input_ids=torch.zeros(sum(new), dtype=torch.int64), out_cache_loc=torch.zeros(sum(new), dtype=torch.int64),
        extend_seq_lens=torch.tensor(new, dtype=torch.int32), extend_seq_lens_cpu=new, extend_prefix_lens_cpu=old,
        spec_info=SimpleNamespace(draft_token_num=new[0]) if mode == ForwardMode.TARGET_VERIFY else None,
    )  # fmt: skip


def serve(ours: backend.TautBackend, found: tuple[Any, ...], forward: Any, kind: str, form: str) -> None:
    """One step through every layer, with tensors laid out as SGLang's models hand them over."""
    ours.init_forward_metadata(forward)
    tokens = forward.input_ids.shape[0]

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    if kind == "latent" and form == "absorbed":
        latent, rope = zeros(tokens, 1, RANK), zeros(tokens, 1, 2112)[..., 2048:]
        parts = {"q_rope": zeros(tokens, HEADS, NOPE + ROPE)[..., NOPE:], "k_rope": rope}
        ours.forward(zeros(HEADS, tokens, RANK).transpose(0, 1), latent, latent, found[0], forward, **parts)
    elif kind == "latent":
        keys = int(forward.seq_lens.sum()) if form == "one shot" else tokens
        arguments = zeros(tokens, HEADS, NOPE + ROPE), zeros(keys, HEADS, NOPE + ROPE)
        value = zeros(keys, HEADS, NOPE + VALUE)[..., NOPE:]
        forward.mha_one_shot, forward.mha_return_lse = form == "one shot", form == "chunks"
        forward.prefix_chunk_max_seq_lens = [1000] * 3
        forward.prefix_chunk_cu_seq_lens = torch.zeros(3, forward.batch_size + 1, dtype=torch.int32)
        for chunk in (None, 0, 1, 2) if form == "chunks" else (None,):
            forward.attn_attend_prefix_cache, forward.prefix_chunk_idx = chunk is not None, chunk
            ours.forward(*arguments, value, found[1], forward, save_kv_cache=False)
    else:
        for attention in found:
            query, key, value = zeros(tokens, (32 + 2 * 8) * 64).split([32 * 64, 8 * 64, 8 * 64], -1)
            ours.forward(query, key.unflatten(-1, (8, 64)), value.unflatten(-1, (8, 64)), attention, forward)


@pytest.mark.parametrize("kind", ["dense", "windowed", "latent"])
def test_what_serves_was_compiled_before(kind: str, instances: set[tuple[Any, ...]]) -> None:
    found, ours = served(kind)
    ours.warm_up()
    before = set(instances)
    assert before
    numbers = random.Random(0)
    steps = [(ForwardMode.DECODE, [1] * rows, [50] * rows, "absorbed") for rows in range(1, REQUESTS + 1)]
    steps += [(ForwardMode.TARGET_VERIFY, [4] * rows, [50] * rows, "absorbed") for rows in range(1, REQUESTS + 1)]
    for rows in (1, 1, 2, 3, 8, 17, 40):
        for longest in (1, 2, 40, 400, 1000):
            new = [numbers.randint(1, longest) for _ in range(rows)]
            old = [numbers.randint(0, 40) for _ in range(rows)]
            steps += [
                (ForwardMode.EXTEND, new, old if kind != "latent" or form != "alone" else [0] * rows, form)
                for form in (("alone", "one shot", "absorbed", "chunks") if kind == "latent" else ("",))
            ]
    for mode, new, old, form in steps:
        serve(ours, found, forward_of(mode, new, old), kind, form)
        assert instances == before, (mode, new, old, form)
