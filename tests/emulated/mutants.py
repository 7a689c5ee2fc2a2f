"""Each wait, arrival and fence of the Hopper kernels is needed: without it some case fails, under some seed.

That is a test of the emulator and of the cases as much as of the kernels. It takes minutes: `make mutants`.
"""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cases import PAGED_BATCH, PagedCase, assert_close, build_mla
from gluon_emulator import seeded, without

from emulated import test_hopper_mla, test_hopper_paged
from emulated.test_hopper_mla import _assembly, _hopper_of_few_multiprocessors  # noqa: F401 - fixtures
from emulated.test_hopper_paged import LONG, SHORT, small  # noqa: F401
from taut.common_kernels import hopper
from taut.common_kernels.mla_decode import hopper_few_rows, hopper_many_rows, hopper_queries
from taut.common_kernels.mla_decode import hopper_ring as mla_ring
from taut.common_kernels.paged_attention import (
    hopper_decode,
    hopper_decode_results,
    hopper_prefill,
    hopper_prefill_attend,
    hopper_prefill_load,
    hopper_ring,
)

CALLS = {
    "mbarrier.wait",
    "mbarrier.arrive",
    "async_copy.mbarrier_arrive",
    "fence_async_shared",
    "wait_for_kernel_ahead",
}
# What is launched: the fences there stand behind the making of barriers, which is not emulated.
ENTRIES = {"taut_mla_decode", "taut_decode", "taut_prefill"}
SEEDS = range(4)
LONGER = {"head_size": 128, "value_size": 128}


def statements(*modules: Any) -> list[Any]:
    """File and line of every wait, arrival and fence, each a parameter of a test."""
    found = []
    for module in modules:
        for function in ast.parse(Path(module.__file__).read_text()).body:
            if not isinstance(function, ast.FunctionDef) or function.name in ENTRIES:
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                    name, call = ast.unparse(node.value.func), ast.unparse(node.value)
                    if name in CALLS:
                        found.append(pytest.param(module.__file__, node.lineno, id=f"{function.name}: {call}"))
    return found


def attend_latent() -> None:
    """The cases of `mla_decode`, under every seed."""
    for seed in SEEDS:
        for case in test_hopper_mla.CASES.values():
            inputs = build_mla(replace(case, latent=512, rope=64, dtype="bfloat16", seed=seed))
            with seeded(seed):
                assert_close(inputs.run(hopper), inputs.expected(), "bfloat16")


def attend_paged(kernels: Any) -> None:
    """By boxes and gathered, with heads of two lengths, by either kernel, under every seed."""
    boxed, gathered = LONG, PAGED_BATCH | SHORT | {"lengths": (37, 0, 5, 140, 290), "page_size": 3}
    for seed in SEEDS:
        # Of prefill heads of 64 go one way, longer ones another.
        for case in (boxed, gathered, boxed | LONGER, gathered | LONGER):
            for served_by in ("decode", "prefill"):
                test_hopper_paged.check(kernels, PagedCase(**case), served_by, seed)


@pytest.mark.parametrize(("file", "line"), statements(mla_ring, hopper_queries, hopper_many_rows, hopper_few_rows))
def test_mla_decode(file: str, line: int) -> None:
    with without(file, line), pytest.raises(AssertionError):
        attend_latent()


PAGED = (hopper_decode, hopper_decode_results, hopper_prefill, hopper_prefill_attend, hopper_prefill_load, hopper_ring)


@pytest.mark.parametrize(("file", "line"), statements(*PAGED))
def test_paged_attention(small: Any, file: str, line: int) -> None:  # noqa: F811
    with without(file, line), pytest.raises(AssertionError):
        attend_paged(small)
