"""What an engine's process is asked to do, and what both of them need to do it."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from taut.common_kernels.schedule.shape import Item

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from taut.audit.records import Run

# Where an item of a schedule says how many queries it has, and into how many parts it is cut.
QUERIES, SPLITS = Item._fields.index("queries"), Item._fields.index("splits")
ATOMS = (str, bytes, int, float, type(None))  # lead nowhere
# Packages whose objects lead to no tensor of an engine's or a backend's.
CLOSED = ("torch", "builtins", "numpy", "transformers", "tokenizers", "vllm.config", "sglang.srt.server_args")
SAYS = "taut audit: "  # begins the lines by which an engine's process tells how far it is


@dataclass(frozen=True)
class Request:
    """What an engine's process is asked to do.

    Args:
        engine: "vllm" or "sglang".
        model: a folder in Hugging Face format, or a name.
        asked: the backend, in the user's words.
        flag: what the engine is to be told as its attention backend; "" for nothing.
        plugin: "module:Class" of a backend to be registered first, as "module.Class"; "" for none.
        rows: requests of the batch.
        context: tokens of the longest prompt; the others are shorter.
        steps: decode steps to be recorded.
        layers: of the model, to run with made-up weights; 0 for all it has.
        made_up: whether weights are made up.
        options: further arguments of the engine's own.
    """

    engine: str
    model: str
    asked: str
    flag: str = ""
    plugin: str = ""
    rows: int = 4
    context: int = 64
    steps: int = 3
    layers: int = 0
    made_up: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def read_request(path: Path) -> Request:
    """The request in a file."""
    return Request(**json.loads(path.read_text()))


def write(path: Path, run: Run) -> None:
    """Leave a record, whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(dataclasses.asdict(run)))
    unfinished.replace(path)


def read_run(path: Path) -> Run:
    """The record in a file."""
    from taut.audit.records import Run

    return TypeAdapter(Run).validate_json(path.read_text())


def say(words: str) -> None:
    """Tell whoever started this process how far it is."""
    print(f"{SAYS}{words}", flush=True)  # noqa: T201 - read by the process that started this one


def prompts(rows: int, context: int) -> list[list[int]]:
    """Token ids of ragged prompts, the last with `context` of them; no two begin alike."""
    return [[5 + (i + j) % 90 for j in range(max(1, context * (i + 1) // rows))] for i in range(rows)]


def device_name(kind: str) -> str:
    """What people call the device: "cpu", "NVIDIA H200"."""
    import torch

    return torch.cuda.get_device_name() if kind == "cuda" else kind


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels of this process."""
    return os.environ.get("TRITON_INTERPRET", "") not in ("", "0")


def class_name(thing: Any) -> str:
    """The class of an object, with its module."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def modules_of(things: Iterable[Any]) -> frozenset[str]:
    """The modules in which the classes of these objects and their bases are written."""
    classes = {base for thing in things for base in type(thing).__mro__}
    return frozenset(base.__module__ for base in classes) - {"builtins", "abc", "typing"}


def held_bytes(things: Sequence[Any], engine: Sequence[Any], device: str) -> int:
    """Bytes of the device's memory that a backend keeps: what its objects lead to, and nothing of the engine's does.

    Objects of a backend refer to much that is not theirs: caches, weights, tables. All of it the engine reaches without
    them, by its own attributes.

    Args:
        things: the backend's objects.
        engine: objects of the engine's that lead to whatever it owns; the layers among them.
        device: its type; tensors elsewhere are not counted.
    """
    from torch.nn import Module

    modules = modules_of(things)

    def of_the_backend(thing: Any) -> bool:
        """What the engine only keeps for it: its objects, and metadata that it has made."""
        return type(thing).__module__ in modules

    own = _memory(_reached(things, lambda thing: isinstance(thing, Module)), device)
    foreign = _memory(_reached(engine, of_the_backend), device)
    return sum(size for place, size in own.items() if place not in foreign)


def scheduled_partials(things: Sequence[Any]) -> int | None:
    """Bytes of partial results that a layer of a decode step writes and reads again, by our schedule on the device.

    Workspaces of other steps, whose items have several queries, still hold the schedule of the last of those. It waits
    for the device: to be asked after a step, not in one.

    Args:
        things: the backend's objects, whose workspaces are as the last step has left them; the largest traffic counts.

    Returns:
        None where they hold no workspace of ours with a schedule of a decode step.
    """
    from torch.nn import Module

    from taut.common_kernels.workspace import ScheduledWorkspace

    found = []
    for workspace in _reached(things, lambda thing: isinstance(thing, Module)):
        if not isinstance(workspace, ScheduledWorkspace):
            continue
        scratch, schedule = workspace.scratch, workspace.schedule
        items = schedule.items[: workspace.items].tolist()
        if any(item[QUERIES] > 1 for item in items):
            continue
        each = scratch.partials[0].nbytes + scratch.lses[0].nbytes
        found.append(2 * each * sum(item[SPLITS] for item in items if item[SPLITS] > 1))
    return max(found, default=None)


def _reached(roots: Iterable[Any], beyond: Callable[[Any], bool]) -> Iterator[Any]:
    """These objects and all that their attributes, elements and values lead to, each once.

    Args:
        roots: to begin with, whatever `beyond` says of them.
        beyond: whether something is not to be entered.
    """
    waiting = list(roots)
    seen = {id(thing) for thing in waiting}
    kept = []  # or another object could get the place of one that was made on the way
    while waiting:
        thing = waiting.pop()
        yield thing
        for inner in _inner(thing):
            if id(inner) not in seen and not isinstance(inner, ATOMS) and not beyond(inner):
                seen.add(id(inner))
                kept.append(inner)
                waiting.append(inner)


def _inner(thing: Any) -> list[Any]:
    from torch.nn import Module

    if isinstance(thing, dict):
        return list(thing.values())
    if isinstance(thing, (list, tuple, set, frozenset)):
        return list(thing)
    if type(thing).__module__.startswith(CLOSED) and not isinstance(thing, Module):
        return []
    slots = (name for base in type(thing).__mro__ for name in _names(base.__dict__.get("__slots__", ())))
    try:
        return [*getattr(thing, "__dict__", {}).values(), *(getattr(thing, name, None) for name in slots)]
    except Exception:  # whatever an object of an engine's makes of being asked; it is not worth a run
        return []


def _names(slots: str | Iterable[str]) -> list[str]:
    return [slots] if isinstance(slots, str) else list(slots)


def _memory(things: Iterable[Any], device: str) -> dict[int, int]:
    """The memory of the tensors among these: where it begins, and its bytes."""
    from torch import Tensor

    found: dict[int, int] = {}
    for thing in things:
        if isinstance(thing, Tensor):
            try:
                storage = thing.untyped_storage()
            except RuntimeError:  # a sparse tensor's
                continue
            if storage.device.type == device:  # that of a tensor which only a compiler computes with is elsewhere
                found[storage.data_ptr()] = storage.nbytes()
    return found
