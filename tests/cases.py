"""Random ragged batches with everything poisoned that must not be read, for any provider, device and dtype.

A case is a small dataclass; `build_paged`, `build_ragged` and `build_mla` make its tensors, `Inputs.run` calls a
provider and checks what every operation promises (all of the output is written, nothing beside it), and
`Inputs.expected` is the answer in float64, written from the contract and sharing no code with the operations.

    case = PagedCase(lengths=(7, 0, 40), queries=(1, 1, 3), q_heads=8, kv_heads=2, dtype="bfloat16")
    inputs = build_paged(case, "cuda:0")
    assert_close(inputs.run(kernels), inputs.expected(), case.dtype)

Poison: NaN in every cache element that holds no token of a row (page 0 included), in the padding between strided
elements, and in outputs before the call; 2**30 in every entry of the page table past a row's length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import torch

from taut.common_kernels.paging import packed_cache_views, slot_cache_view
from taut.common_kernels.problem import Problem
from taut.common_kernels.schedule.shape import Item
from taut.common_kernels.step import Mask, PageTable, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

DEAD = 2**30
GUARD = 3  # tokens of poison behind an output, which must still be poison after the call

Layout = Literal["separate", "heads_first", "packed", "interleaved", "padded"]
LAYOUTS: tuple[Layout, ...] = ("separate", "heads_first", "packed", "interleaved", "padded")

# Decode, extend, idle and padded rows side by side; and every kind of mask.
PAGED_BATCH: dict[str, Any] = {
    "lengths": (37, 0, 5, 40, 90),
    "queries": (1, 2, 5, 20, 1),
    "padded_rows": 1,
    "padded_queries": 3,
}
MLA_BATCH: dict[str, Any] = {
    "lengths": (40, 3, 0, 129, 1),
    "queries": (2, 8, 1, 1, 3),
    "padded_rows": 1,
    "padded_queries": 2,
}
MASKS = (
    Mask(),
    Mask(causal=False),
    Mask(left=9),
    Mask(left=30),
    Mask(causal=False, left=9, right=4),
    Mask(causal=False, right=0),
    Mask(soft_cap=1.5),
)

# Relative error of a whole output, by dtype of the queries and the output.
TOLERANCES = {"float64": 1e-9, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}


@dataclass(frozen=True)
class PagedCase:
    """A batch for `paged_attention`.

    Args:
        lengths: of each row, the new tokens included.
        queries: of each row; a row may have more than its length (its first queries then stand before position 0).
        layout: how the cache lies in memory; keys [N, P, Hk, D] and values [N, P, Hk, V] are views of it.
        indirect: whether `PageTable.rows` is given, in shuffled order.
        padded_rows: rows at the end without queries, of length 0.
        padded_queries: queries past `query_starts[R]`.
        strided_query: whether the queries are a slice of a wider tensor, as of one projection to q, k and v.
        scales: of a quantised cache.
        forget_unseen: whether pages that lie whole before every query's window are replaced by page 0, all poison.
        lse: whether it is asked for.
        others: as in `Problem`; `sinks` and `alibi` say whether there are any, `cache_dtype` is the queries' if empty.
    """

    lengths: tuple[int, ...]
    queries: tuple[int, ...]
    q_heads: int = 4
    kv_heads: int = 2
    head_size: int = 16
    value_size: int = 16
    page_size: int = 16
    dtype: str = "float32"
    cache_dtype: str = ""
    layout: Layout = "separate"
    indirect: bool = False
    padded_rows: int = 0
    padded_queries: int = 0
    strided_query: bool = False
    mask: Mask = field(default_factory=Mask)
    sinks: bool = False
    alibi: bool = False
    scales: Literal["none", "tensor", "head"] = "none"
    forget_unseen: bool = False
    lse: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scales != "none" and not self.cache_dtype.startswith("float8"):
            raise ValueError("only a quantised cache has scales")

    @property
    def scale(self) -> float:
        """Of the scores."""
        return self.head_size**-0.5

    def problem(self, target: str = "cpu") -> Problem:
        """What a provider is asked for."""
        wants = {
            "causal" if self.mask.causal else "non_causal": True,
            "window": self.mask.left >= 0 or self.mask.right >= 0,
            "soft_cap": self.mask.soft_cap > 0,
            "sinks": self.sinks,
            "alibi": self.alibi,
            "lse": self.lse,
            "head_scales": self.scales == "head",
        }
        return Problem(
            operation="paged_attention",
            target=target,
            dtype=self.dtype,
            cache_dtype=self.cache_dtype or self.dtype,
            q_heads=self.q_heads,
            kv_heads=self.kv_heads,
            head_size=self.head_size,
            value_size=self.value_size,
            page_size=self.page_size,
            max_query=max(self.queries, default=0),
            features=frozenset(name for name, wanted in wants.items() if wanted),
        )


@dataclass(frozen=True)
class MlaCase:
    """A batch for `mla_decode`; fields as in `PagedCase`. `head_size` in its problem is latent + rope."""

    lengths: tuple[int, ...]
    queries: tuple[int, ...]
    q_heads: int = 4
    latent: int = 32
    rope: int = 16
    page_size: int = 16
    dtype: str = "float32"
    cache_dtype: str = ""
    layout: Literal["separate", "padded"] = "separate"
    indirect: bool = False
    padded_rows: int = 0
    padded_queries: int = 0
    strided_query: bool = False
    causal: bool = True
    scales: Literal["none", "tensor"] = "none"
    lse: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scales != "none" and not self.cache_dtype.startswith("float8"):
            raise ValueError("only a quantised cache has a scale")

    @property
    def scale(self) -> float:
        """Of the scores; a model's has the size of its unabsorbed heads here."""
        return (self.latent + self.rope) ** -0.5

    def problem(self, target: str = "cpu") -> Problem:
        """What a provider is asked for."""
        features = {"causal" if self.causal else "non_causal"} | ({"lse"} if self.lse else set())
        return Problem(
            operation="mla_decode",
            target=target,
            dtype=self.dtype,
            cache_dtype=self.cache_dtype or self.dtype,
            q_heads=self.q_heads,
            kv_heads=1,
            head_size=self.latent + self.rope,
            value_size=self.latent,
            page_size=self.page_size,
            max_query=max(self.queries, default=0),
            features=frozenset(features),
        )


@dataclass
class Inputs:
    """The tensors of a case, ready to be given to an operation, and its answer.

    Args:
        case: what they were made from.
        operation: the name of the operation in `Kernels`.
        arguments: its positional arguments before `out`, without the mask.
        options: its keyword arguments but `lse` and `workspace`.
        step: the batch; also among the arguments.
        queries: per row, [m, Hq, D] float64 on the CPU.
        keys: per row, [n, Hk, D] float64, as the cache holds them.
        values: per row, [n, Hk, V] float64.
        tokens: T, padding included.
        mask: as called.
        device: where all of them lie, but for queries, keys and values.
    """

    case: PagedCase | MlaCase
    operation: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    step: Step
    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    tokens: int
    mask: Mask
    device: str

    @property
    def value_size(self) -> int:
        """V; for MLA the latent rank."""
        return self.case.latent if isinstance(self.case, MlaCase) else self.case.value_size

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Poisoned storage of `out` [T + GUARD, Hq, V] and `lse` [T + GUARD, Hq]."""
        shape = (self.tokens + GUARD, self.case.q_heads)
        out = torch.full((*shape, self.value_size), math.nan, dtype=getattr(torch, self.case.dtype), device=self.device)
        return out, torch.full(shape, math.nan, dtype=torch.float32, device=self.device)

    def workspace(self, kernels: Any, target: str) -> Any:
        """A provider's workspace, prepared for the step, after another one of many items that were split."""
        rows, most = self.step.rows, self.step.rows * self.step.max_query
        workspace = kernels.workspace(self.case.problem(target), max(1, rows), max(1, self.tokens, most), self.device)
        if hasattr(workspace, "schedule"):
            partials, last = workspace.scratch.partials, max(0, len(workspace.scratch.partials) - 2)
            earlier = Item(0, 0, queries=1, first_position=0, first_key=0, end_key=64, splits=2, first_partial=last)
            workspace.schedule.items[:] = torch.tensor(earlier, dtype=torch.int32)
            partials.fill_(math.nan)
            workspace.scratch.lses.fill_(0.0)
        workspace.prepare(self.step)
        return workspace

    def run(self, kernels: Any, target: str = "cpu") -> tuple[Tensor, Tensor | None]:
        """Call a provider as an engine does: a workspace, its schedule, the operation. Output and LSE, on the CPU.

        Args:
            kernels: the provider's operations (`Kernels`).
            target: of the problem that its workspace is made for.
        """
        workspace = self.workspace(kernels, target)
        return self.call(getattr(kernels, self.operation), workspace=workspace)

    def decode_in_place(self, kernels: Any) -> Tensor:
        """`mla_decode` with the first part of the query as its output, as an engine's adapter calls it."""
        workspace = self.workspace(kernels, "cpu")
        both = self.arguments[0].clone()
        kernels.mla_decode(both, *self.arguments[1:], both, **self.options, workspace=workspace)
        return both.cpu()

    def call(self, operation: Callable[..., None], **options: Any) -> tuple[Tensor, Tensor | None]:
        """Call one operation with poisoned outputs, and check that it wrote all of them and nothing beside them."""
        out, lse = self.outputs()
        T = self.tokens
        asked_lse = lse[:T] if self.case.lse else None
        operation(*self.arguments, out[:T], lse=asked_lse, **self.options, **options)
        assert not out[:T].isnan().any(), "an output element was not written, or poison was read"
        assert out[T:].isnan().all(), "something was written behind the output"
        assert lse[T:].isnan().all(), "something was written behind the LSE"
        if not self.case.lse:
            assert lse.isnan().all()
            return out[:T].cpu(), None
        assert not lse[:T].isnan().any(), "an LSE was not written, or poison was read"
        return out[:T].cpu(), lse[:T].cpu()

    def expected(self) -> tuple[Tensor, Tensor]:
        """Output [T, Hq, V] and LSE [T, Hq] in float64, straight from the words of the contract."""
        device = self.device  # float64 is quick on a GPU, and slow where many tests share a CPU
        sinks, slopes = (_double(self.options.get(name), device) for name in ("sinks", "alibi_slopes"))
        out = torch.zeros(self.tokens, self.case.q_heads, self.value_size, dtype=torch.float64, device=device)
        lse = torch.full((self.tokens, self.case.q_heads), -math.inf, dtype=torch.float64, device=device)
        first = 0
        for queries, keys, values in zip(self.queries, self.keys, self.values, strict=True):
            query, key, value = queries.to(device), keys.to(device), values.to(device)
            m, n = len(query), len(key)
            grouped = query.unflatten(1, (key.shape[1], -1))  # [m, Hk, G, D]
            for i in range(m):
                p = n - m + i
                seen = sees(self.mask, p, torch.arange(n, device=device)).nonzero()[:, 0]
                if not len(seen):
                    continue
                score = self.options["scale"] * torch.einsum("kgd,skd->kgs", grouped[i], key[seen]).flatten(0, 1)
                if self.mask.soft_cap:
                    score = self.mask.soft_cap * (score / self.mask.soft_cap).tanh()
                if slopes is not None:
                    score = score + slopes[:, None] * (seen - p)
                if sinks is not None:  # one more score, whose value is zero
                    score = torch.cat([score, sinks[:, None]], dim=1)
                weight = score.softmax(dim=1)[:, : len(seen)].unflatten(0, grouped.shape[1:3])
                out[first + i] = torch.einsum("kgs,skv->kgv", weight, value[seen]).flatten(0, 1)
                lse[first + i] = score.logsumexp(dim=1)
            first += m
        return out.cpu(), lse.cpu()


def sees(mask: Mask, p: int, j: Tensor) -> Tensor:
    """Whether a query at position p sees the keys at the positions j of its row."""
    seen = torch.ones_like(j, dtype=torch.bool)
    if mask.causal:
        seen &= j <= p
    if mask.left >= 0:
        seen &= p - mask.left <= j
    if mask.right >= 0:
        seen &= j <= p + mask.right
    return seen


def build_paged(case: PagedCase, device: str = "cpu") -> Inputs:
    """The tensors of a case on `device`."""
    generator = torch.Generator().manual_seed(case.seed)
    dtype, cache_dtype = getattr(torch, case.dtype), getattr(torch, case.cache_dtype or case.dtype)
    key_scale, value_scale = (_scales(case.scales, case.kv_heads, generator) for _ in range(2))
    step, places, page_count = _step(case, _unseen(case), generator, device)

    storages, views = cache_storage(case, page_count, cache_dtype)
    key_cache, value_cache = views(storages)
    keys, values = [], []
    for row_places in places:
        shape = (len(row_places), case.kv_heads)
        stored_keys, key = _quantise(_random((*shape, case.head_size), generator), key_scale, cache_dtype)
        stored_values, value = _quantise(_random((*shape, case.value_size), generator), value_scale, cache_dtype)
        _fill(key_cache, row_places, stored_keys)
        _fill(value_cache, row_places, stored_values)
        keys.append(key)
        values.append(value)
    key_cache, value_cache = views([storage.to(device) for storage in storages])

    tokens = sum(case.queries) + case.padded_queries
    query = _query(tokens, case.q_heads, case.head_size, case.strided_query, dtype, generator)
    options: dict[str, Any] = {"scale": case.scale}
    if case.scales != "none":
        options |= {"key_scale": key_scale.to(device), "value_scale": value_scale.to(device)}
    if case.sinks:
        options["sinks"] = torch.randn(case.q_heads, generator=generator).to(device)
    if case.alibi:
        options["alibi_slopes"] = (0.5 * torch.rand(case.q_heads, generator=generator)).to(device)
    return Inputs(
        case=case,
        operation="paged_attention",
        arguments=(_moved(query, device), key_cache, value_cache, step, case.mask),
        options=options,
        step=step,
        queries=_rows_of(query, case.queries, case.padded_rows),
        keys=keys,
        values=values,
        tokens=tokens,
        mask=case.mask,
        device=device,
    )


def build_ragged(case: PagedCase, device: str = "cpu") -> Inputs:
    """A case for `ragged_attention`: what concerns a cache (pages, layout, scales) is not used.

    Keys and values are slices of one wider tensor if the queries are strided.
    """
    generator = torch.Generator().manual_seed(case.seed)
    dtype = getattr(torch, case.dtype)
    lengths = (*case.lengths, *[0] * case.padded_rows)
    row_queries = (*case.queries, *[0] * case.padded_rows)
    tokens = sum(row_queries) + case.padded_queries
    query = _query(tokens, case.q_heads, case.head_size, case.strided_query, dtype, generator)
    key = _query(sum(lengths), case.kv_heads, case.head_size, case.strided_query, dtype, generator)
    value = _query(sum(lengths), case.kv_heads, case.value_size, case.strided_query, dtype, generator)
    query_starts, key_starts = (
        torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=device) for sizes in (row_queries, lengths)
    )
    options: dict[str, Any] = {"scale": case.scale, "max_query": max(row_queries, default=0) + 3}
    options["max_length"] = max(lengths, default=0) + 5
    if case.sinks:
        options["sinks"] = torch.randn(case.q_heads, generator=generator).to(device)
    if case.alibi:
        options["alibi_slopes"] = (0.5 * torch.rand(case.q_heads, generator=generator)).to(device)
    # A step, for a provider that makes a schedule from one; there are no pages.
    step = Step(
        query_starts,
        torch.tensor(lengths, dtype=torch.int32, device=device),
        PageTable(torch.full((max(1, len(lengths)), 1), DEAD, dtype=torch.int32, device=device), 1),
        options["max_query"],
        options["max_length"],
    )
    return Inputs(
        case=case,
        operation="ragged_attention",
        arguments=(
            _moved(query, device),
            _moved(key, device),
            _moved(value, device),
            query_starts,
            key_starts,
            case.mask,
        ),
        options=options,
        step=step,
        queries=_rows_of(query, case.queries, case.padded_rows),
        keys=[rows.double() for rows in key.split(list(lengths))],
        values=[rows.double() for rows in value.split(list(lengths))],
        tokens=tokens,
        mask=case.mask,
        device=device,
    )


def build_mla(case: MlaCase, device: str = "cpu") -> Inputs:
    """The tensors of an MLA case on `device`: q_nope and q_pe apart, strided differently if `strided_query`."""
    generator = torch.Generator().manual_seed(case.seed)
    dtype, cache_dtype = getattr(torch, case.dtype), getattr(torch, case.cache_dtype or case.dtype)
    scale = _scales(case.scales, 1, generator)
    step, places, page_count = _step(case, [0] * len(case.lengths), generator, device)

    width = case.latent + case.rope
    padding = (1, 8) if case.layout == "padded" else (0, 0)
    storage = _poison((page_count, case.page_size + padding[0], width + padding[1]), cache_dtype)
    cache = storage[:, : case.page_size, :width]
    keys = []
    for row_places in places:
        stored, key = _quantise(_random((len(row_places), 1, width), generator), scale, cache_dtype)
        _fill(cache, row_places, stored[:, 0])
        keys.append(key)

    tokens = sum(case.queries) + case.padded_queries
    if case.strided_query:  # as the engines have them: q_nope out of a product per head, q_pe out of the projection
        q_nope = _random((case.q_heads, tokens, case.latent), generator).to(dtype).transpose(0, 1)
    else:
        q_nope = _random((tokens, case.q_heads, case.latent), generator).to(dtype)
    q_pe = _query(tokens, case.q_heads, case.rope, case.strided_query, dtype, generator)
    options: dict[str, Any] = {"scale": case.scale, "causal": case.causal}
    if case.scales != "none":
        options["cache_scale"] = scale.to(device)
    return Inputs(
        case=case,
        operation="mla_decode",
        arguments=(
            _moved(q_nope, device),
            _moved(q_pe, device),
            storage.to(device)[:, : case.page_size, :width],
            step,
        ),
        options=options,
        step=step,
        queries=_rows_of(torch.cat([q_nope, q_pe], dim=-1), case.queries, case.padded_rows),
        keys=keys,
        values=[key[..., : case.latent] for key in keys],
        tokens=tokens,
        mask=Mask(causal=case.causal),
        device=device,
    )


def assert_close(
    actual: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor], dtype: str, tolerance: float | None = None
) -> None:
    """Hold an output and its LSE against the answer: relative error, cosine, and the worst single head of a token.

    Args:
        actual: output and LSE, None where none was asked for.
        expected: in float64.
        dtype: of the output, which sets the tolerance.
        tolerance: of the relative error, where it is not the dtype's own.
    """
    (out, lse), (right_out, right_lse) = actual, expected
    allowed = TOLERANCES[dtype] if tolerance is None else tolerance
    idle = right_lse == -math.inf  # [T, Hq]
    assert not out.double()[idle].any(), "a query that sees nothing must give zeros"
    error = relative_error(out, right_out)
    assert error <= allowed, f"relative error {error:.3g}, allowed {allowed:.3g}"
    assert cosine(out, right_out) >= 1 - allowed
    if not idle.all():
        norms = right_out.norm(dim=-1)
        floor = 0.1 * norms[~idle].square().mean().sqrt()
        worst = ((out.double() - right_out).norm(dim=-1) / norms.clamp(min=float(floor) + 1e-300)).max()
        assert worst <= 5 * allowed, f"one head of one token is off by {worst:.3g}, allowed {5 * allowed:.3g}"
    if lse is not None:
        assert torch.equal(lse == -math.inf, idle), "the LSE is -inf where nothing is seen, and only there"
        off = (lse.double() - right_lse)[~idle].abs()
        limit = max(allowed, 1e-5) * right_lse[~idle].abs().clamp(min=1.0)
        assert (off <= limit).all(), f"LSE off by {off.max():.3g}"


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|, of whole tensors."""
    difference, size = (actual.double() - expected.double()).norm(), expected.double().norm()
    return float(difference / size) if size else float(difference)


def cosine(actual: Tensor, expected: Tensor) -> float:
    """Of the angle between two whole tensors; 1 if both are zero."""
    actual, expected = actual.double().flatten(), expected.double().flatten()
    sizes = actual.norm() * expected.norm()
    return float(actual @ expected / sizes) if sizes else 1.0


def _double(tensor: Tensor | None, device: str) -> Tensor | None:
    return None if tensor is None else tensor.double().to(device)


def _random(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)


def _raw(tensor: Tensor) -> Tensor:
    """Float8 as bytes: torch does not index into float8 everywhere."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def _fill(cache: Tensor, places: list[tuple[int, int] | None], stored: Tensor) -> None:
    """Put the tokens of a row where they belong; those whose place is None are in no cache any more."""
    kept = [(j, *place) for j, place in enumerate(places) if place is not None]
    if kept:
        tokens, pages, in_page = torch.tensor(kept).T
        _raw(cache)[pages, in_page] = _raw(stored)[tokens]


def _poison(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.full(tuple(shape), math.nan, dtype=torch.float32).to(dtype)


def _scales(kind: str, heads: int, generator: torch.Generator) -> Tensor:
    """One number or [heads], apart from one another enough that a wrong one shows; 1 where there is none."""
    if kind == "none":
        return torch.ones(1)
    return 0.01 + 0.2 * torch.rand(heads if kind == "head" else 1, generator=generator)


def _quantise(numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[n, Hk, *] as the cache holds it, and the numbers that it then stands for, float64."""
    scale = scale.double()[:, None]  # [1 or Hk, 1]
    stored = (numbers / scale).to(dtype)
    return stored, stored.double() * scale


def _query(tokens: int, heads: int, size: int, strided: bool, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """[tokens, heads, size]; if strided, a slice of a wider tensor that is poison elsewhere."""
    numbers = _random((tokens, heads, size), generator).to(dtype)
    if not strided:
        return numbers
    wide = _poison((tokens, (heads + 1) * size + 8), dtype)
    wide[:, : heads * size] = numbers.flatten(1)
    return wide[:, : heads * size].unflatten(1, (heads, size))


def _moved(view: Tensor, device: str) -> Tensor:
    """A view moved with all of its storage, so that its strides stay."""
    whole = torch.empty(0, dtype=view.dtype).set_(view.untyped_storage())
    return whole.to(device).as_strided(view.shape, view.stride(), view.storage_offset())


def _rows_of(query: Tensor, queries: Sequence[int], padded_rows: int) -> list[Tensor]:
    rows = query[: sum(queries)].double().split(list(queries)) if queries else ()
    return [*rows, *[query[:0].double()] * padded_rows]


def _unseen(case: PagedCase) -> list[int]:
    """Per row, how many of its first pages no query of it sees, where those are to be forgotten."""
    if not case.forget_unseen or case.mask.left < 0:
        return [0] * len(case.lengths)
    first_seen = [n - m - case.mask.left for n, m in zip(case.lengths, case.queries, strict=True)]
    return [max(0, min(f, n)) // case.page_size for f, n in zip(first_seen, case.lengths, strict=True)]


def _step(
    case: PagedCase | MlaCase, unseen: Sequence[int], generator: torch.Generator, device: str
) -> tuple[Step, list[list[tuple[int, int] | None]], int]:
    """The step of a case; per row the page and place of each of its tokens (None if forgotten); pages in the cache."""
    lengths = (*case.lengths, *[0] * case.padded_rows)
    row_queries = (*case.queries, *[0] * case.padded_rows)
    P, R = case.page_size, len(lengths)
    needed = [-(-n // P) for n in lengths]
    page_count = 1 + sum(needed) + 2  # page 0 is nobody's, and two more are free
    free = (1 + torch.randperm(page_count - 1, generator=generator)).tolist()

    table_rows = 2 * R + 1 if case.indirect else max(R, 1)
    order = torch.randperm(table_rows, generator=generator)[:R].tolist() if case.indirect else list(range(R))
    # Wider than it need be, and a slice of something wider still: a kernel must take its strides.
    table = torch.full((table_rows, max(needed, default=0) + 4), DEAD, dtype=torch.int32)
    places: list[list[tuple[int, int] | None]] = []
    for row, count in enumerate(needed):
        pages = [free.pop() for _ in range(count)]
        row_places: list[tuple[int, int] | None] = []
        for i, page in enumerate(pages):
            forgotten = row < len(unseen) and i < unseen[row]
            table[order[row], i] = 0 if forgotten else page
            held = min(P, lengths[row] - i * P)
            row_places += [None if forgotten else (page, place) for place in range(held)]
        places.append(row_places)

    rows = None
    if case.indirect:  # both engines' integer types
        rows = torch.tensor(order, dtype=torch.int32 if case.seed % 2 else torch.int64, device=device)
    step = Step(
        query_starts=torch.tensor([0, *accumulate(row_queries)], dtype=torch.int32, device=device),
        lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
        pages=PageTable(table.to(device)[:, :-1], P, rows),
        max_query=max(row_queries, default=0) + 1,  # bounds, not maxima
        max_length=max(lengths, default=0) + 17,
    )
    return step, places, page_count


def cache_storage(
    case: PagedCase, pages: int, dtype: torch.dtype
) -> tuple[list[Tensor], Callable[[list[Tensor]], tuple[Tensor, Tensor]]]:
    """Poisoned storage in the case's layout, and how keys and values are seen in it."""
    P, H, D, V = case.page_size, case.kv_heads, case.head_size, case.value_size
    if case.layout == "packed":  # vLLM 0.26 and later
        return [_poison((pages, H, P, D + V), dtype)], lambda s: packed_cache_views(s[0], V)
    if case.layout == "interleaved":  # keys and values of a page side by side
        return [_poison((pages, 2, P, H, max(D, V)), dtype)], lambda s: (s[0][:, 0, ..., :D], s[0][:, 1, ..., :V])
    if case.layout == "heads_first":
        storage = [_poison((pages, H, P, size), dtype) for size in (D, V)]
        return storage, lambda s: (s[0].transpose(1, 2), s[1].transpose(1, 2))
    if case.layout == "padded":
        storage = [_poison((pages, P + 1, H + 1, size + 8), dtype) for size in (D, V)]
        return storage, lambda s: (s[0][:, :P, :H, :D], s[1][:, :P, :H, :V])
    if P == 1:  # SGLang's pool of slots
        return [_poison((pages, H, size), dtype) for size in (D, V)], lambda s: (
            slot_cache_view(s[0]),
            slot_cache_view(s[1]),
        )
    return [_poison((pages, P, H, size), dtype) for size in (D, V)], lambda s: (s[0], s[1])
