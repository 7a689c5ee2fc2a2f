"""What the layers of models ask a tile table for, each once, and the shapes at which their tiles are measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from taut.benchmarks import BenchmarkError
from taut.benchmarks.operations import LATENT, OPERATIONS, ROPE, Shape, describe, parse_grid
from taut.common_kernels.model import is_mla, problems_of_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from taut.common_kernels.problem import Problem

DECODE = "rows=1,16,128 context=4k,32k"
PREFILL = "rows=1 context=8k,16k queries=2k,8k"
MOST_CACHED = 1 << 20  # tokens of all rows together; more need too much memory to be worth it
BYTES = {"bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
# The providers whose tiles are tuned, and what the names of their operations begin with in a table.
TABLE_PREFIX = {"triton": "", "hopper": "hopper_"}
# For each operation of a problem what it asks a table for, and what is run to measure that.
MEASURED = {
    "mla_decode": {"mla_decode": "mla_decode"},
    "paged_attention": {"paged_decode": "paged_decode", "paged_prefill": "paged_extend"},
    "ragged_attention": {"paged_prefill": "ragged_prefill"},
}


@dataclass(frozen=True)
class Tuned:
    """One question to a tile table, and how its answer is measured."""

    provider: str  # whose kernels ask
    table_operation: str  # under which name tables have it
    facts: Mapping[str, int]  # what it is asked with
    operation: str  # what is run, as `operations` calls it
    shapes: tuple[Shape, ...]  # at which
    models: tuple[str, ...]  # whose layers ask

    @property
    def name(self) -> str:
        """The question, in words: what people and tables tell it by."""
        return f"{self.table_operation} {describe(self.facts)}"

    @property
    def given(self) -> Mapping[str, int]:
        """What decides which tiles are worth trying: the facts and, of the shapes, the page size; 0 without pages."""
        return {**self.facts, "page": self.shapes[0].get("page", 0)}


def questions(
    models: Mapping[str, Mapping[str, Any]],
    *,
    provider_of: Callable[[Problem], str] = lambda _problem: "triton",
    page_size: int | None = None,
    decode: str = DECODE,
    prefill: str = PREFILL,
    **of_model: Any,
) -> list[Tuned]:
    """Every question of the models' layers, each once.

    Args:
        models: their configs by their names.
        provider_of: whose kernels are tuned for a problem, by name.
        page_size: tokens in a page; None for 64 with latent attention and 16 else.
        decode: the grid of decode, rows and context.
        prefill: the grid of prefill, rows, context and queries.
        of_model: what else `problems_of_model` takes.

    Raises:
        BenchmarkError: a model asks for what cannot be tuned, or a grid holds nothing that can be measured.
    """
    found: dict[str, Tuned] = {}
    for name, config in models.items():
        try:
            problems = problems_of_model(config, page_size=page_size or (64 if is_mla(config) else 16), **of_model)
        except ValueError as error:
            raise BenchmarkError(f"{name}: {error}") from None
        for problem in problems:
            _check(name, problem)
            for one in _questions_of(problem, name, provider_of, decode, prefill):
                # Two models' question is measured for both where both can be measured as one operation.
                first = found.setdefault(one.name, one)
                new = one.shapes if one.operation == first.operation else ()
                shapes = (*first.shapes, *(shape for shape in new if shape not in first.shapes))
                found[one.name] = replace(first, shapes=shapes, models=tuple(dict.fromkeys(first.models + one.models)))
    if not found:
        raise BenchmarkError(f"no layer of {', '.join(models)} asks for a tile")
    return list(found.values())


def _check(name: str, problem: Problem) -> None:
    if problem.dtype not in ("bfloat16", "float16"):
        raise BenchmarkError(f"{name} computes in {problem.dtype}: tiles are tuned for bfloat16 and float16")
    if problem.cache_dtype not in BYTES:
        raise BenchmarkError(f"a cache of {problem.cache_dtype} is none of ours: there are {', '.join(BYTES)}")
    if problem.operation == "mla_decode" and (problem.value_size, problem.head_size) != (LATENT, LATENT + ROPE):
        sizes = f"a latent of {problem.value_size} and rope of {problem.head_size - problem.value_size}"
        raise BenchmarkError(f"{name} has {sizes}: only {LATENT} and {ROPE} are tuned")


def _questions_of(
    problem: Problem, model: str, provider_of: Callable[[Problem], str], decode: str, prefill: str
) -> Iterator[Tuned]:
    if problem.operation not in MEASURED or "non_causal" in problem.features:
        return
    provider = provider_of(problem)
    if provider not in TABLE_PREFIX:
        raise BenchmarkError(
            f"{model}: the kernels of {provider} would serve its {problem.operation}, and their tiles are none of ours "
            f"to tune: --kernels names one of {', '.join(TABLE_PREFIX)}"
        )
    rows, cached = problem.q_heads // problem.kv_heads, BYTES[problem.cache_dtype]
    float8, key, value = int(cached == 1), problem.head_size, problem.value_size
    facts = {"rows": rows, "key_bytes": (key + value) * cached, "element_bytes": 2, "float8": float8}
    if problem.operation == "mla_decode":
        facts = {"rows": rows, "rank": value, "cache_bytes": cached}
    known = {"heads": rows, "q_heads": problem.q_heads, "kv_heads": problem.kv_heads, "key": key, "value": value}
    known |= {"page": problem.page_size, "float8": float8}
    for table_operation, operation in MEASURED[problem.operation].items():
        fixed = {axis: number for axis, number in known.items() if axis in OPERATIONS[operation].axes}
        shapes = _shapes(operation, fixed, decode if "decode" in operation else prefill)
        yield Tuned(provider, TABLE_PREFIX[provider] + table_operation, facts, operation, shapes, (model,))


def _shapes(operation: str, fixed: Shape, grid: str) -> tuple[Shape, ...]:
    """The shapes of a grid that can be: not more cached tokens than are worth it, not more new ones than there are."""
    axes = parse_grid(grid)
    for axis in axes:
        if axis in fixed:
            raise BenchmarkError(f"{axis} is given by the model: leave it out of {grid!r}")
    rows = [fixed | dict(zip(axes, numbers, strict=True)) for numbers in product(*axes.values())]
    asked = [row for row in rows if row.get("queries", 1) <= row.get("context", MOST_CACHED)]
    shapes = [one for one in map(OPERATIONS[operation].shape, asked) if one["rows"] * one["context"] <= MOST_CACHED]
    if not shapes:
        raise BenchmarkError(f"{grid!r} holds no shape that can be measured: {MOST_CACHED} cached tokens are the most")
    return tuple(shapes)
