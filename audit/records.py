"""What a run of an engine leaves behind, as data. It is a part of what `taut audit --json` prints; see `report`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Place:
    """A line of code: `file` as it stands below the folder that it is imported from."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Event:
    """One operation, while metadata was built or a layer ran.

    Args:
        name: "aten.copy_", "triton.taut_merge_states", "Tensor.tolist".
        by: "backend", or "engine" for what the engine's own layer does around it.
        kinds: how many of each of `operations.KINDS`.
        began: microseconds from the step's beginning, on the host.
        ended: likewise.
        moved: bytes read and written at least; None where it is not known.
        taken: bytes of memory that it allocated.
        at: the innermost line that is not torch's.
        through: the innermost line of the backend's own files; None where none led here.
        splits: arguments of a launch that say into how many parts rows are split.
    """

    name: str
    by: str
    kinds: dict[str, int]
    began: float
    ended: float
    moved: int | None
    taken: int
    at: Place | None
    through: Place | None
    splits: dict[str, int] = field(default_factory=dict)


@dataclass
class Scope:
    """The building of the metadata, or one layer's attention."""

    name: str
    what: str  # "metadata" or "layer"
    began: float
    ended: float = 0.0
    events: list[Event] = field(default_factory=list)


@dataclass
class Step:
    """One step of the engine.

    Args:
        kind: "decode" where each row has one query, otherwise "prefill".
        lengths: of its rows, tokens in the cache.
        tokens: queries of all rows.
        padded: rows of the step beyond those of requests; None where it is not known.
        compiled: kernels compiled and functions traced anew meanwhile, by name.
        scopes: metadata and layers, in their order.
        seconds: that it took, with the trace's own time.
    """

    kind: str
    lengths: list[int] = field(default_factory=list)
    tokens: int = 0
    padded: int | None = None
    compiled: list[str] = field(default_factory=list)
    scopes: list[Scope] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Layer:
    """What a layer's attention has to work on; sizes in elements, `left` -1 where all is seen.

    A layer with a latent cache (`latent`) reads one vector of `key_size` for all heads, and its values are part of it.
    """

    name: str
    q_heads: int
    kv_heads: int
    key_size: int
    value_size: int
    query_bytes: int
    cache_bytes: int
    left: int = -1
    latent: bool = False


@dataclass(frozen=True)
class Padding:
    """What became of rows without work beside real ones, asked of the backend after the run.

    Args:
        rows: how many were added.
        finite: whether their outputs were finite; None where they were not written.
        says: what happened, in a sentence.
    """

    rows: int
    finite: bool | None
    says: str


@dataclass(frozen=True)
class Kernel:
    """A kernel, fill or copy as torch's profiler saw it run on the device.

    Args:
        name: of the kernel.
        scope: of the metadata or the layer it was launched in; "" outside of the backend's parts of the step.
        microseconds: it ran.
        grid: programs in each dimension; empty where it is no kernel.
        waves: how often the device was filled with them; None where the profiler does not tell.
        tail: the share of the last wave that stood idle.
        began: microseconds after the first of the step.
        kind: "fills", "copies", "h2d" or "d2h" where it is that; else "".
    """

    name: str
    scope: str
    microseconds: float
    grid: tuple[int, ...]
    waves: float | None
    tail: float | None
    began: float = 0.0
    kind: str = ""


@dataclass
class Device:
    """What torch's profiler saw in one decode step.

    Args:
        counts: by scope.
        kernels: of the backend's parts of the step.
        others: of the rest of it.
    """

    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    kernels: list[Kernel] = field(default_factory=list)
    others: list[Kernel] = field(default_factory=list)


@dataclass
class Run:
    """One engine with one backend.

    Args:
        asked: the backend as it was asked for.
        engine: "vllm" or "sglang".
        release: of the engine.
        device: "cpu", or the GPU's name.
        backend: the class that served, with its module.
        kernels: the provider of ours that served; "" for a backend that is not ours.
        interpreted: whether Triton's interpreter ran its kernels, whose times say nothing of a device.
        layers: what they have to work on.
        held: bytes of device memory that the backend's objects keep from step to step, caches not counted.
        partials: bytes that a layer writes to scratch and reads again, by the schedule of the last step that was
            recorded; None for a backend without one of ours.
        steps: that were recorded.
        captured_splits: arguments of launches inside a captured graph that say how rows are split.
        padding: None where it was not asked.
        observed: the profiler's pass; None where there is no GPU.
        unknown: what could not be seen, by kind, with the reason.
    """

    asked: str
    engine: str
    release: str = ""
    device: str = "cpu"
    backend: str = ""
    kernels: str = ""
    interpreted: bool = False
    layers: list[Layer] = field(default_factory=list)
    held: int | None = None
    partials: int | None = None
    steps: list[Step] = field(default_factory=list)
    captured_splits: dict[str, int] = field(default_factory=dict)
    padding: Padding | None = None
    observed: Device | None = None
    unknown: dict[str, str] = field(default_factory=dict)
