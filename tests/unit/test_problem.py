"""Problems and capabilities: what cannot be served is said in sentences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from taut.common_kernels.problem import FEATURES, OPERATIONS, Capability, Problem, target_matches

PROBLEM = Problem(
    operation="paged_attention",
    target="sm_90",
    dtype="bfloat16",
    cache_dtype="float8_e4m3fn",
    q_heads=32,
    kv_heads=8,
    head_size=128,
    value_size=64,
    page_size=16,
    max_query=1,
    features=frozenset({"causal", "window"}),
)


@pytest.mark.parametrize(
    ("pattern", "target", "matches"),
    [
        ("any", "cpu", True),
        ("any", "gfx942", True),
        ("cpu", "cpu", True),
        ("sm_90", "sm_90", True),
        ("sm_90", "sm_100", False),
        ("sm_90", "sm_9", False),
        ("sm_80+", "sm_80", True),
        ("sm_80+", "sm_90", True),
        ("sm_80+", "sm_120", True),  # numbers, not letters
        ("sm_90+", "sm_89", False),
        ("sm_80+", "cpu", False),
        ("sm_80+", "gfx942", False),
        ("gfx942", "gfx942", True),
        ("gfx942", "gfx950", False),
        ("cpu", "sm_80", False),
    ],
)
def test_target_patterns(pattern: str, target: str, matches: bool) -> None:
    assert target_matches(pattern, target) is matches


def test_a_capability_without_limits_serves_everything() -> None:
    for operation in OPERATIONS:
        problem = replace(PROBLEM, operation=operation, features=FEATURES, max_query=0)  # type: ignore[arg-type]
        assert Capability(operation).refusals(problem) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("limit", "sentence"),
    [
        ({"targets": ("cpu", "gfx942")}, "runs on cpu, gfx942, not on sm_90"),
        ({"dtypes": frozenset({"float32", "float16"})}, "dtype bfloat16 is not among float16, float32"),
        ({"cache_dtypes": frozenset({"bfloat16"})}, "cache dtype float8_e4m3fn is not among bfloat16"),
        ({"head_sizes": frozenset({256, 64, 96})}, "head size 128 is not among 64, 96, 256"),
        ({"value_sizes": frozenset({128})}, "value size 64 is not among 128"),
        ({"page_sizes": frozenset({1, 64})}, "page size 16 is not among 1, 64"),
        ({"max_q_heads": 16}, "takes at most 16 query heads, not 32"),
        ({"features": frozenset({"causal"})}, "has no window"),
        ({"features": frozenset()}, "has no causal, window"),
    ],
)
def test_refusals_are_sentences(limit: dict[str, Any], sentence: str) -> None:
    assert Capability("paged_attention", **limit).refusals(PROBLEM) == [sentence]


@pytest.mark.parametrize(
    "limit",
    [
        {"targets": ("cpu", "sm_80+")},
        {"dtypes": frozenset({"bfloat16"})},
        {"cache_dtypes": frozenset({"float8_e4m3fn", "bfloat16"})},
        {"head_sizes": frozenset({128})},
        {"value_sizes": frozenset({64})},
        {"page_sizes": frozenset({16})},
        {"max_query": 1},
        {"max_q_heads": 32},
        {"features": frozenset({"causal", "window"})},
    ],
)
def test_limits_that_are_met(limit: dict[str, Any]) -> None:
    assert Capability("paged_attention", **limit).refusals(PROBLEM) == []


@pytest.mark.parametrize(
    ("allowed", "asked", "sentence"),
    [
        (1, 1, None),
        (4, 3, None),
        (1, 2, "takes at most 1 query tokens a row, not 2"),
        (1, 0, "takes at most 1 query tokens a row, not any number of"),
        (None, 0, None),
        (None, 9999, None),
    ],
)
def test_query_tokens_of_a_row(allowed: int | None, asked: int, sentence: str | None) -> None:
    refusals = Capability("paged_attention", max_query=allowed).refusals(replace(PROBLEM, max_query=asked))
    assert refusals == ([sentence] if sentence else [])


def test_heads_that_do_not_divide() -> None:
    refusals = Capability("paged_attention").refusals(replace(PROBLEM, q_heads=9, kv_heads=2))
    assert refusals == ["9 query heads do not divide by 2 key-value heads"]


def test_every_reason_is_given() -> None:
    capability = Capability("paged_attention", ("cpu",), page_sizes=frozenset({1}), features=frozenset({"window"}))
    assert capability.refusals(PROBLEM) == [
        "runs on cpu, not on sm_90",
        "page size 16 is not among 1",
        "has no causal",
    ]


def test_a_problem_reads_as_a_line() -> None:
    assert str(PROBLEM) == (
        "paged_attention on sm_90: heads 32/8, head size 128/64, page 16, "
        "bfloat16 over a float8_e4m3fn cache, causal, window"
    )
    assert str(replace(PROBLEM, features=frozenset())).endswith("cache, plain")


def test_equal_problems_are_one_key() -> None:
    assert {PROBLEM: 1}[replace(PROBLEM, features=frozenset({"window", "causal"}))] == 1
