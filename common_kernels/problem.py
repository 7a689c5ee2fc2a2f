"""A problem and a capability, both as data.

A `Problem` says what an engine's layer needs of one operation; a `Capability` says what a provider's kernel can do.
`Capability.refusals` holds the two against each other and answers in sentences, so that every choice can be explained.
Nothing here imports torch: dtypes are their names ("bfloat16"), devices are targets ("cpu", "sm_90", "gfx942").
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, get_args

Operation = Literal["paged_attention", "ragged_attention", "mla_decode", "store_kv", "store_mla_kv", "merge"]
OPERATIONS: tuple[str, ...] = get_args(Operation)

Feature = Literal["causal", "non_causal", "window", "sinks", "soft_cap", "alibi", "lse", "head_scales"]
FEATURES: frozenset[str] = frozenset(get_args(Feature))


@dataclass(frozen=True)
class Problem:
    """What one layer asks of one operation.

    Args:
        operation: which operation.
        target: what it runs on: "cpu", "sm_90", "gfx942".
        dtype: of the queries and the output, by torch's name: "bfloat16".
        cache_dtype: of the cached keys and values: "bfloat16", "float8_e4m3fn".
        q_heads: query heads on this device.
        kv_heads: key-value heads on this device; 1 for MLA.
        head_size: elements of one key; for MLA the latent and the rope part together.
        value_size: elements of one value; for MLA the latent part.
        page_size: tokens in one page of the cache; 0 where keys are contiguous.
        max_query: the most query tokens that one row of a step may have; 0 for no bound.
        features: what the softmax needs beside plain scores.
        left: how far back each query sees, itself not counted, where the layer has a window; -1 for all, or not known.
    """

    operation: Operation
    target: str
    dtype: str
    cache_dtype: str
    q_heads: int
    kv_heads: int
    head_size: int
    value_size: int
    page_size: int
    max_query: int = 0
    features: frozenset[str] = frozenset()
    left: int = -1

    def __str__(self) -> str:
        features = ", ".join(sorted(self.features)) or "plain"
        return (
            f"{self.operation} on {self.target}: heads {self.q_heads}/{self.kv_heads}, "
            f"head size {self.head_size}/{self.value_size}, page {self.page_size}, "
            f"{self.dtype} over a {self.cache_dtype} cache, {features}"
        )


@dataclass(frozen=True)
class Capability:
    """What a provider's kernel for one operation can do. A field that is None sets no limit.

    Args:
        operation: which operation.
        targets: exact targets, or "sm_80+" for that NVIDIA generation and later; "any" for all.
        dtypes: of queries and output.
        cache_dtypes: of the cache.
        head_sizes: of keys.
        value_sizes: of values.
        page_sizes: tokens in a page.
        max_query: the most query tokens a row may have.
        max_q_heads: the most query heads.
        features: which features it has.
    """

    operation: Operation
    targets: tuple[str, ...] = ("any",)
    dtypes: frozenset[str] | None = None
    cache_dtypes: frozenset[str] | None = None
    head_sizes: frozenset[int] | None = None
    value_sizes: frozenset[int] | None = None
    page_sizes: frozenset[int] | None = None
    max_query: int | None = None
    max_q_heads: int | None = None
    features: frozenset[str] = field(default=FEATURES)

    def refusals(self, problem: Problem) -> list[str]:
        """Every reason why this capability cannot serve `problem`, as sentences; empty when it can."""
        reasons = []
        if not any(target_matches(pattern, problem.target) for pattern in self.targets):
            reasons.append(f"runs on {', '.join(self.targets)}, not on {problem.target}")
        limits = (
            ("dtype", self.dtypes, problem.dtype),
            ("cache dtype", self.cache_dtypes, problem.cache_dtype),
            ("head size", self.head_sizes, problem.head_size),
            ("value size", self.value_sizes, problem.value_size),
            ("page size", self.page_sizes, problem.page_size),
        )
        for name, allowed, asked in limits:
            if allowed is not None and asked not in allowed:
                reasons.append(f"{name} {asked} is not among {', '.join(map(str, sorted(allowed)))}")
        if self.max_query is not None and not 0 < problem.max_query <= self.max_query:
            asked_for = f"{problem.max_query}" if problem.max_query else "any number of"
            reasons.append(f"takes at most {self.max_query} query tokens a row, not {asked_for}")
        if self.max_q_heads is not None and problem.q_heads > self.max_q_heads:
            reasons.append(f"takes at most {self.max_q_heads} query heads, not {problem.q_heads}")
        if problem.kv_heads and problem.q_heads % problem.kv_heads:
            reasons.append(f"{problem.q_heads} query heads do not divide by {problem.kv_heads} key-value heads")
        missing = sorted(problem.features - self.features)
        if missing:
            reasons.append(f"has no {', '.join(missing)}")
        return reasons


def target_matches(pattern: str, target: str) -> bool:
    """Whether `target` ("sm_90") is meant by `pattern` ("sm_90", "sm_80+", "any")."""
    if pattern in ("any", target):
        return True
    least, asked = re.fullmatch(r"sm_(\d+)\+", pattern), re.fullmatch(r"sm_(\d+)", target)
    return bool(least and asked and int(asked[1]) >= int(least[1]))
