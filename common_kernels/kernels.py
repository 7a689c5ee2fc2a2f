"""The contract of a provider: the operations, their arguments, shapes and meaning.

Every provider offers these operations with these signatures; `reference.py` beside each operation is its oracle.
All of them write into tensors of the caller and return nothing. Common rules:

* Rows without work (length 0, or no query) write zeros to the output of their queries and -inf to their LSE.
* Unused slots of the cache and entries of the page table past a row's length are never used: they may hold NaN or
  huge numbers.
* Queries past `query_starts[R]` (padding at the end of a batch) get zeros and -inf, as rows without work do.
* LSE is the natural logarithm of the sum of exponentiated, scaled and masked scores, in float32; -inf where nothing is
  seen.
* Scales belong to quantised caches; a cache of any other dtype is stored and read as it is, whatever scale is given.
* Caches are strided views (see `paging`); slot arithmetic is in 64 bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from taut.common_kernels.problem import Problem
    from taut.common_kernels.step import Mask, Step


# The version of this contract: one more whenever a provider that was written for it would no longer serve.
CONTRACT = 1


class Workspace(Protocol):
    """What a provider needs from one step to the next: its schedule and its scratch.

    Owned by whoever asked for it (an engine's metadata builder), sized once, freed with its owner.
    """

    @property
    def size_in_bytes(self) -> int:
        """Device memory that it holds."""
        ...

    def prepare(self, step: Step) -> None:
        """Make the schedule of a step, on the device, without a host-device sync; once a step, before its layers."""
        ...


class NoWorkspace:
    """The workspace of an operation that needs none.

    Args:
        table_path: the tile table that the user named, if any.
    """

    size_in_bytes = 0

    def __init__(self, table_path: str | None = None) -> None:
        self.table_path = table_path

    def prepare(self, step: Step) -> None:
        """Nothing to prepare."""


class Kernels(Protocol):
    """A provider's operations."""

    def workspace(
        self, problem: Problem, max_rows: int, max_tokens: int, device: str, table_path: str | None = None
    ) -> Workspace:
        """A workspace for steps of at most `max_rows` rows and `max_tokens` queries, on `device` ("cuda:0").

        `table_path` names a tile table to use in place of the provider's own, where it has any.
        """
        ...

    def paged_attention(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        step: Step,
        mask: Mask,
        out: Tensor,
        *,
        scale: float,
        lse: Tensor | None = None,
        key_scale: Tensor | None = None,
        value_scale: Tensor | None = None,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        workspace: Workspace | None = None,
    ) -> None:
        """Attention of packed queries over a paged cache: decode, extend and mixed batches in one operation.

        Args:
            query: [T, Hq, D].
            key_cache: [N, P, Hk, D], a strided view; Hq is a multiple of Hk.
            value_cache: [N, P, Hk, V], likewise.
            step: which rows, how long, where.
            mask: causal, window, soft cap.
            out: [T, Hq, V], written whole.
            scale: of the scores, before the soft cap.
            lse: [T, Hq] float32, written if given. It includes the sinks.
            key_scale: float32, one number or [Hk]: a quantised key times this is the key. None for 1.
            value_scale: likewise for values.
            sinks: [Hq] float32, one more score per head that takes weight and adds no value. None for none.
            alibi_slopes: [Hq] float32; `slope * (j - p)` is added to the scaled, capped score. None for none.
            workspace: prepared for this step; None where the provider needs none.
        """
        ...

    def ragged_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_starts: Tensor,
        key_starts: Tensor,
        mask: Mask,
        out: Tensor,
        *,
        scale: float,
        max_query: int,
        max_length: int,
        lse: Tensor | None = None,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        workspace: Workspace | None = None,
    ) -> None:
        """`paged_attention` over keys that lie side by side, not in a cache (encoders; MLA's unabsorbed prefill).

        Args:
            query: [T, Hq, D].
            key: [K, Hk, D], the keys of all rows, packed; any strides.
            value: [K, Hk, V].
            query_starts: [R + 1] int32; the queries of row r.
            key_starts: [R + 1] int32; the keys of row r.
            mask: as above, a row's length being its number of keys.
            out: [T, Hq, V].
            scale: of the scores.
            max_query: host bound on the queries of a row.
            max_length: host bound on the keys of a row.
            lse: [T, Hq] float32, written if given.
            sinks: [Hq] float32.
            alibi_slopes: [Hq] float32.
            workspace: as above.
        """
        ...

    def mla_decode(
        self,
        q_nope: Tensor,
        q_pe: Tensor,
        cache: Tensor,
        step: Step,
        out: Tensor,
        *,
        scale: float,
        causal: bool = True,
        lse: Tensor | None = None,
        cache_scale: Tensor | None = None,
        workspace: Workspace | None = None,
    ) -> None:
        """MLA in its absorbed form: every head reads one latent vector per token, which is also the value.

        score = scale * (q_nope . latent + q_pe . rope), out = sum of softmax(score) * latent. DeepSeek-V2,
        arXiv 2405.04434, section 2.1; absorption as in its appendix.

        Args:
            q_nope: [T, Hq, C], already multiplied by the up-projection of keys.
            q_pe: [T, Hq, E]. The two queries are never concatenated; any strides.
            cache: [N, P, C + E], a strided view: latent first, rope after.
            step: which rows, how long, where.
            out: [T, Hq, C], written whole. It may be `q_nope` itself: a kernel writes no query's result before every
                program that reads that query has read it.
            scale: of the scores.
            causal: whether the query tokens of one row see only what precedes them.
            lse: [T, Hq] float32, written if given.
            cache_scale: one float32: a quantised cache element times this is the element. None for 1.
            workspace: prepared for this step; None where the provider needs none.
        """
        ...

    def store_kv(
        self,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slots: Tensor,
        *,
        key_scale: Tensor | None = None,
        value_scale: Tensor | None = None,
    ) -> None:
        """Write new keys and values into the cache, quantised if the cache is.

        Args:
            key: [T, Hk, D].
            value: [T, Hk, V].
            key_cache: [N, P, Hk, D], a strided view.
            value_cache: [N, P, Hk, V].
            slots: [T'] int32 or int64, T' <= T: `page * P + place`; tokens whose slot is negative are skipped, and so
                are tokens past T'.
            key_scale: float32, one number or [Hk]: a key is divided by it before it is quantised. None for 1.
            value_scale: likewise for values.
        """
        ...

    def store_mla_kv(
        self,
        latent: Tensor,
        rope: Tensor,
        cache: Tensor,
        slots: Tensor,
        *,
        cache_scale: Tensor | None = None,
    ) -> None:
        """Write new latent and rope vectors into an MLA cache, side by side, quantised if the cache is.

        Args:
            latent: [T, C].
            rope: [T, E].
            cache: [N, P, C + E], a strided view.
            slots: as in `store_kv`.
            cache_scale: one float32. None for 1.
        """
        ...

    def merge(self, partials: Tensor, partial_lses: Tensor, out: Tensor, lse: Tensor | None = None, /) -> None:
        """Attention over a whole from partial results, each over some of its keys.

        out = sum over s of partials[s] * exp(partial_lses[s] - lse), lse = log of the sum of exp(partial_lses).
        Flash-Decoding, and section 2.2 of FlashInfer (arXiv 2501.01005).

        Args:
            partials: [S, T, Hq, V]; one whose LSE is -inf is not read: it may hold NaN.
            partial_lses: [S, T, Hq] float32, natural logarithm.
            out: [T, Hq, V]; zeros where all are empty. It may be one of the partials.
            lse: [T, Hq] float32, written if given; -inf where all are empty. It may be one of `partial_lses`.
        """
        ...
