"""What an engine's process is asked to do, and what both of them need to do it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from taut.common_kernels.schedule.reference import Item

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from taut.audit.records import Run

SPLITS = Item._fields.index("splits")  # where an item of a schedule says into how many parts it is cut
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


def class_name(thing: Any) -> str:
    """The class of an object, with its module."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def modules_of(things: Iterable[Any]) -> frozenset[str]:
    """The modules in which the classes of these objects and their bases are written."""
    classes = {base for thing in things for base in type(thing).__mro__}
    return frozenset(base.__module__ for base in classes) - {"builtins", "abc", "typing"}


def held_bytes(things: Sequence[Any], others: Iterable[Any] = ()) -> int:
    """Bytes of the tensors that objects hold, and the objects that they hold, each memory once.

    Args:
        things: the backend's objects.
        others: what is not the backend's own though it refers to it: caches, models, tables.
    """
    import torch

    seen = {id(other) for other in others}
    memory: dict[int, int] = {}
    foreign = {other.untyped_storage().data_ptr() for other in others if isinstance(other, torch.Tensor)}
    waiting = [(thing, 0) for thing in things]
    while waiting:
        thing, depth = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            if storage.data_ptr() not in foreign:
                memory[storage.data_ptr()] = storage.nbytes()
        elif depth < 6 and not isinstance(thing, torch.nn.Module):
            waiting += [(inner, depth + 1) for inner in _inner(thing)]
    return sum(memory.values())


def scheduled_partials(workspaces: Iterable[Any]) -> int | None:
    """Bytes of partial results that a layer writes and reads again, by the schedule of ours that lies on the device.

    It waits for the device: to be asked after a step, not in one.

    Args:
        workspaces: of our kernels, as the last step has left them; the largest traffic counts.

    Returns:
        None where no workspace has a schedule.
    """
    found = []
    for workspace in workspaces:
        schedule, scratch = getattr(workspace, "schedule", None), getattr(workspace, "scratch", None)
        if schedule is None or scratch is None:
            continue
        splits = schedule.items[: workspace.items, SPLITS].tolist()
        each = scratch.partials[0].nbytes + scratch.lses[0].nbytes
        found.append(2 * each * sum(count for count in splits if count > 1))
    return max(found, default=None)


def _inner(thing: Any) -> list[Any]:
    if isinstance(thing, dict):
        return list(thing.values())
    if isinstance(thing, (list, tuple, set, frozenset)):
        return list(thing)
    module = type(thing).__module__
    if module.startswith(("torch", "builtins", "transformers", "vllm.config", "sglang.srt.server_args")):
        return []
    return list(getattr(thing, "__dict__", {}).values())
