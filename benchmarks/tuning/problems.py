"""What the layers of models ask a tile table for, each once, and the shapes at which their tiles are measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from taut.benchmarks import BenchmarkError
from taut.benchmarks.operations import LATENT, OPERATIONS, ROPE, Shape, describe, parse_grid
from taut.common_kernels.model import problems_of_model

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from taut.common_kernels.problem import Problem

DECODE = "rows=1,16,128 context=4k,32k"
PREFILL = "rows=1 context=8k,16k queries=2k,8k"
MOST_CACHED = 1 << 20  # tokens of all rows together; more need too much memory to be worth it
BYTES = {"bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
# The providers whose tiles are tuned, and what the names of their operations begin with in a table.
TABLE_PREFIX = {"triton": "", "hopper": "hopper_"}


@dataclass(frozen=True)
class Tuned:
    """One question to a tile table, and how its answer is measured.

    Args:
        provider: whose kernels ask.
        table_operation: under which name tables have it.
        facts: what it is asked with.
        operation: what is run, as `operations` calls it.
        shapes: at which shapes.
        models: whose layers ask.
    """

    provider: str
    table_operation: str
    facts: Mapping[str, int]
    operation: str
    shapes: tuple[Shape, ...]
    models: tuple[str, ...]

    @property
    def name(self) -> str:
        """The question, in words: what people and tables tell it by."""
        return f"{self.table_operation} {describe(self.facts)}"

    @property
    def given(self) -> Mapping[str, int]:
        """What decides which tiles are worth trying: the facts, and the page size (0 without pages) of its shapes."""
        return {**self.facts, "page": self.shapes[0].get("page", 0)}


def questions(
    models: Mapping[str, Mapping[str, Any]],
    *,
    target: str,
    provider_of: Callable[[Problem], str] = lambda _problem: "triton",
    tensor_parallel: int = 1,
    page_size: int | None = None,
    cache_dtype: str | None = None,
    decode: str = DECODE,
    prefill: str = PREFILL,
) -> list[Tuned]:
    """Every question of the models' layers, each once.

    Args:
        models: their configs by their names.
        target: "sm_90".
        provider_of: whose kernels are tuned for a problem, by name.
        tensor_parallel: over how many devices their heads are shared out.
        page_size: tokens in a page; None for 64 with latent attention and 16 else.
        cache_dtype: of the cache; None for the model's own.
        decode: the grid of decode, rows and context.
        prefill: the grid of prefill, rows, context and queries.

    Raises:
        BenchmarkError: a model asks for what cannot be tuned, or a grid holds nothing that can be measured.
    """
    found: dict[str, Tuned] = {}
    for name, config in models.items():
        try:
            problems = problems_of_model(
                config,
                target=target,
                cache_dtype=cache_dtype,
                page_size=page_size or 16,
                tensor_parallel=tensor_parallel,
            )
        except ValueError as error:
            raise BenchmarkError(f"{name}: {error}") from None
        for problem in problems:
            _check(name, problem)
            if problem.operation == "mla_decode" and page_size is None:
                problem = replace(problem, page_size=64)
            for question in _questions_of(problem, name, provider_of, decode, prefill):
                before = found.get(question.name)
                found[question.name] = _both(before, question) if before else question
    if not found:
        raise BenchmarkError(f"no layer of {', '.join(models)} asks for a tile")
    return list(found.values())


def _both(before: Tuned, after: Tuned) -> Tuned:
    """One question of two models: measured for both where both can be measured as one operation."""
    shapes = list(before.shapes)
    if before.operation == after.operation:
        shapes += [shape for shape in after.shapes if shape not in shapes]
    return replace(before, shapes=tuple(shapes), models=tuple(dict.fromkeys((*before.models, *after.models))))


def _check(name: str, problem: Problem) -> None:
    if problem.dtype not in ("bfloat16", "float16"):
        raise BenchmarkError(f"{name} computes in {problem.dtype}: tiles are tuned for bfloat16 and float16")
    if problem.cache_dtype not in BYTES:
        raise BenchmarkError(f"a cache of {problem.cache_dtype} is none of ours: there are {', '.join(BYTES)}")
    if problem.operation == "mla_decode" and (problem.value_size, problem.head_size) != (LATENT, LATENT + ROPE):
        rope = problem.head_size - problem.value_size
        raise BenchmarkError(
            f"{name} has a latent of {problem.value_size} and rope of {rope}: only {LATENT} and {ROPE} are tuned"
        )


def _questions_of(
    problem: Problem, model: str, provider_of: Callable[[Problem], str], decode: str, prefill: str
) -> list[Tuned]:
    cached, float8 = BYTES[problem.cache_dtype], int(BYTES[problem.cache_dtype] == 1)
    attends = problem.operation in ("mla_decode", "paged_attention", "ragged_attention")
    if not attends or "non_causal" in problem.features:
        return []
    provider = provider_of(problem)
    if provider not in TABLE_PREFIX:
        raise BenchmarkError(
            f"{model}: the kernels of {provider} would serve its {problem.operation}, and their tiles are none of ours "
            f"to tune: --kernels names one of {', '.join(TABLE_PREFIX)}"
        )

    def asks(table_operation: str, facts: Mapping[str, int], operation: str, fixed: Shape, grid: str) -> Tuned:
        name = TABLE_PREFIX[provider] + table_operation
        return Tuned(provider, name, facts, operation, _shapes(operation, fixed, grid), (model,))

    if problem.operation == "mla_decode":
        facts = {"rows": problem.q_heads, "rank": problem.value_size, "cache_bytes": cached}
        fixed = {"heads": problem.q_heads, "page": problem.page_size, "float8": float8}
        return [asks("mla_decode", facts, "mla_decode", fixed, decode)]
    facts = {
        "rows": problem.q_heads // problem.kv_heads,
        "key_bytes": (problem.head_size + problem.value_size) * cached,
        "element_bytes": 2,
        "float8": float8,
    }
    fixed = {
        "q_heads": problem.q_heads,
        "kv_heads": problem.kv_heads,
        "key": problem.head_size,
        "value": problem.value_size,
    }
    if problem.operation == "ragged_attention":
        return [asks("paged_prefill", facts, "ragged_prefill", fixed, prefill)]
    fixed |= {"page": problem.page_size, "float8": float8}
    return [
        asks("paged_decode", facts, "paged_decode", fixed, decode),
        asks("paged_prefill", facts, "paged_extend", fixed, prefill),
    ]


def _shapes(operation: str, fixed: Shape, grid: str) -> tuple[Shape, ...]:
    """The shapes of a grid that can be: not more cached tokens than are worth it, not more new ones than there are."""
    axes = parse_grid(grid)
    fixed_by_model = next((axis for axis in axes if axis in fixed), None)
    if fixed_by_model:
        raise BenchmarkError(f"{fixed_by_model} is given by the model: leave it out of {grid!r}")
    rows = [dict(zip(axes, numbers, strict=True)) for numbers in product(*axes.values())]
    asked = [fixed | row for row in rows if row.get("queries", 1) <= row.get("context", MOST_CACHED)]
    shapes = [one for one in map(OPERATIONS[operation].shape, asked) if one["rows"] * one["context"] <= MOST_CACHED]
    if not shapes:
        raise BenchmarkError(f"{grid!r} holds no shape that can be measured: {MOST_CACHED} cached tokens are the most")
    return tuple(shapes)
