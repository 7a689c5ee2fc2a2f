"""The step: SGLang's batch, made ready for every layer.

One page table serves all steps: `req_to_token` itself. SGLang keeps a row of token slots for every request, and a batch
names its rows. So the page table is that table, with pages of one token and the batch's `req_pool_indices` for its
rows: no list of indices is ever built. SGLang counts lengths in 64 bits and our kernels in 32, and of rows with
different numbers of new tokens it knows the numbers and we need where they begin: two small buffers are filled once a
step, on the device, in one launch each. The schedule of each workspace is one more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from taut.adapters.sglang import selection
from taut.common_kernels.step import PageTable, Step
from taut.common_kernels.windowed_pages import windowed_step

if TYPE_CHECKING:
    from torch import Tensor

    from taut.adapters.sglang.batch import Batch
    from taut.adapters.sglang.service import Service, Services
    from taut.common_kernels.kernels import Workspace
    from taut.common_kernels.problem import Problem


@dataclass
class TautMetadata:
    """One forward of SGLang's, for all layers.

    Args:
        batch: what the host knows of it.
        step: rows, lengths and pages.
        windowed: the step of layers whose keys lie in the windowed part of a hybrid pool; None where there is none.
        windowed_slots: [T] where the new tokens of such layers go.
        prepared: workspaces that are ready for this step, by problem and by whether its keys are windowed.
        whole_starts: [R + 1] int32: where each request begins when all its keys lie side by side.
        mask_indptr: written, and read by nobody: Gemma 3 puts a mask for images into the metadata of any backend.
    """

    batch: Batch
    step: Step
    windowed: Step | None = None
    windowed_slots: Tensor | None = None
    prepared: dict[tuple[Problem, bool], Workspace] = field(default_factory=dict)
    whole_starts: Tensor | None = None
    mask_indptr: Any = None

    @property
    def custom_mask(self) -> None:
        """None: every mask of ours is causal, or an encoder's."""
        return

    @custom_mask.setter
    def custom_mask(self, mask: Any) -> None:
        if mask is not None:
            raise ValueError("taut attention cannot serve this batch: a mask of its own (custom_mask) is not supported")


class Steps:
    """Makes steps, and owns the buffers that their lengths and starts lie in.

    One batch at a time: the buffers hold the step that was filled last, as the stream's order has it.

    Args:
        table: [requests, context] int32, SGLang's `req_to_token`.
        max_rows: the most requests of a batch; more are made room for.
        translation: [slots] from a slot of a hybrid pool to that of its windowed layers; None for other pools.
        window: how far back those layers see, the token itself not counted.
    """

    def __init__(self, table: Tensor, max_rows: int, translation: Tensor | None = None, window: int = 0) -> None:
        self.table = table
        self.translation = translation
        self.window = window
        self.max_rows = 0
        self.reserve(max_rows)

    def reserve(self, max_rows: int) -> None:
        """Make room for batches of so many requests; steps made before keep the buffers they have."""
        if max_rows <= self.max_rows:
            return
        device = self.table.device
        self.max_rows = max_rows
        self._lengths = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._starts = torch.zeros(max_rows + 1, dtype=torch.int32, device=device)
        self._even_starts: dict[int, Tensor] = {}
        self.even_starts(1)

    def even_starts(self, queries: int) -> Tensor:
        """[max_rows + 1] int32: where rows begin that have the same number of queries; made once for each number."""
        if queries not in self._even_starts:
            self._even_starts[queries] = (
                torch.arange(self.max_rows + 1, dtype=torch.int32, device=self.table.device) * queries
            )
        return self._even_starts[queries]

    def metadata(self, batch: Batch) -> TautMetadata:
        """The metadata of a batch: views only; `fill` must follow, or be replayed, before a layer reads it."""
        self.reserve(batch.rows)
        starts = self.even_starts(batch.queries) if batch.queries else self._starts
        step = Step(
            query_starts=starts[: batch.rows + 1],
            lengths=self._lengths[: batch.rows],
            pages=PageTable(self.table, 1, batch.request_rows),
            max_query=batch.max_query,
            max_length=int(self.table.shape[1]),
        )
        return TautMetadata(batch, step)

    def fill(self, metadata: TautMetadata) -> None:
        """Fill the buffers of a step on the device; safe to capture in a graph."""
        batch, step = metadata.batch, metadata.step
        torch.add(batch.seq_lens, batch.uncounted, out=step.lengths)
        if batch.counts is not None:
            torch.cumsum(batch.counts, 0, dtype=torch.int32, out=step.query_starts[1:])
        if self.translation is not None:  # filled again, it lies where it lay: a graph may read it
            metadata.windowed = windowed_step(step, self.translation, self.window, metadata.windowed)


class Builder:
    """Makes the metadata of forwards ready, and owns the workspaces that layers share.

    Args:
        steps: makes their steps.
        services: of the model's layers; each gets its workspace.
        usual_queries: of each row in the steps that come again and again, which have kernels of their own.
        max_tokens: that a forward is to be expected to have; a longer one is made room for when it comes.

    Attributes:
        workspaces: by problem, and by whether its keys are windowed.
        captured: by mode and rows, the metadata of each graph, in the order of capture. It is never dropped, since
            graphs read what it holds.
    """

    def __init__(self, steps: Steps, services: Services, usual_queries: list[int], max_tokens: int) -> None:
        self.steps = steps
        self.services = services
        self.usual_queries = usual_queries
        self.max_tokens = max_tokens
        self.workspaces: dict[tuple[Problem, bool], Workspace] = {}
        self.captured: dict[tuple[Any, int], list[TautMetadata]] = {}
        self._make_workspaces()

    def build(self, batch: Batch) -> TautMetadata:
        """The metadata of a forward that no graph holds, ready for its layers."""
        metadata = self.steps.metadata(batch)
        if batch.tokens > self.max_tokens or self.steps.max_rows > self._workspace_rows:  # padded by data parallelism
            self.reserve(batch.rows, batch.tokens)
        self.prepare(metadata)
        return metadata

    def prepare(self, metadata: TautMetadata) -> None:
        """Lengths and schedules of a step, a launch each; a graph's step keeps the workspaces that it began with."""
        self.steps.fill(metadata)
        metadata.windowed_slots = metadata.whole_starts = None
        for key, workspace in self.workspaces.items():
            if key[0].max_query == self.max_query(metadata):
                metadata.prepared.setdefault(key, workspace)
        for (_, windowed), workspace in metadata.prepared.items():
            workspace.prepare(metadata.windowed if windowed and metadata.windowed else metadata.step)

    def keep(self, mode: Any, metadata: TautMetadata) -> None:
        """Keep what a graph reads."""
        self.captured.setdefault((mode, metadata.batch.rows), []).append(metadata)

    def max_query(self, metadata: TautMetadata) -> int:
        """The most queries of a row that the kernels of a step are made for: 0 for any number."""
        return metadata.batch.queries if metadata.batch.queries in self.usual_queries else 0

    def ready(self, service: Service, metadata: TautMetadata) -> tuple[Step, Workspace]:
        """A layer's step and its workspace, which is prepared now if no layer has asked for it before."""
        step = metadata.windowed if service.windowed_pool and metadata.windowed else metadata.step
        key = service.problem, service.windowed_pool
        if key not in metadata.prepared:
            workspace = self.workspace(service)
            workspace.prepare(step)
            metadata.prepared[key] = workspace
        return step, metadata.prepared[key]

    def workspace(self, service: Service) -> Workspace:
        """The workspace that a layer shares with all that ask for the same; made on first use.

        Of layers whose keys are handed over it holds no schedule, only which tile table the user named.
        """
        key = service.problem, service.windowed_pool
        if key not in self.workspaces:
            rows, bound = self.steps.max_rows, service.problem.max_query
            table = selection.chosen().table
            self.workspaces[key] = service.kernels.workspace(
                service.problem,
                rows,
                rows * bound if bound else max(self.max_tokens, rows),
                str(self.services.around.device),
                None if table is None else str(table),
            )
        return self.workspaces[key]

    def reserve(self, max_rows: int, max_tokens: int) -> None:
        """Room for forwards of so many rows and tokens; metadata that was captured keeps the workspaces it has."""
        self.steps.reserve(max_rows)
        self.max_tokens = max(self.max_tokens, max_tokens)
        self._make_workspaces()

    def _make_workspaces(self) -> None:
        self._workspace_rows = self.steps.max_rows
        self.workspaces.clear()
        for service in self.services.values():
            self.workspace(service)
