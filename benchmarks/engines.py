"""Whole engines, each backend in processes of its own, their own attention and ours in turn.

Every process gets the same loads in the same order. `taut` is asked for as users ask for it, by `TAUT_ATTENTION=on`,
and the line by which it says that it serves must be in the log. Made-up weights say nothing about quality.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taut.benchmarks import BenchmarkError
from taut.benchmarks.results import OURS, EngineRow, EngineRun, Load, spread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from taut.benchmarks.models import Model

LOADS = ("8x512/256", "1x30000/64")
ON_A_CPU = ("2x64/16",)
STOCK = "stock"
ENGINES = ("vllm", "sglang")
KV_CACHE = re.compile(  # and what the graphs and all else took, which is measured after the cache has been sized
    r"GPU KV cache size: [\d,]+ tokens|Available KV cache memory: [\d.]+ GiB|max_total_num_tokens=\d+"
    r"|Graph capturing finished in \d+ secs, took -?[\d.]+ GiB|GPU memory in use: [\d.]+ GiB"
)
SERVES = re.compile(r"taut .* serves .* attention in .*")
WHERE = re.compile(r"taut bench: (.*)")
USUAL_CONTEXT = 32768


class EngineFailedError(BenchmarkError):
    """An engine's process ended without a result.

    Args:
        message: what happened.
        log: the end of what it said.
    """

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log


@dataclass(frozen=True)
class Plan:
    """What to run.

    Args:
        engine: "vllm", "sglang".
        model: to serve.
        backends: the engine's names, "stock" for its own choice, or "taut".
        loads: each requests, tokens in, tokens out.
        runs: of each load in each process; the first does not count.
        rounds: processes of each backend, all backends in turn.
        options: further arguments of the engine.
        on_gpu: whether there is one.
        patience: seconds that a process may take.
    """

    engine: str
    model: Model
    backends: Sequence[str]
    loads: Sequence[tuple[int, int, int]]
    runs: int = 2
    rounds: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    on_gpu: bool = True
    patience: float = 1800.0

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise BenchmarkError(f"{self.engine} is no engine that can be measured: there are {', '.join(ENGINES)}")
        if find_spec(self.engine) is None:
            raise BenchmarkError(f"{self.engine} is not installed here: run this in its environment, beside taut")
        twice = next((name for name in self.backends if list(self.backends).count(name) > 1), None)
        if twice:
            raise BenchmarkError(f"{twice} stands twice among the backends: --rounds 2 runs each twice, in turn")
        longest, most = self.context, self.model.longest
        if most and longest > most:
            raise BenchmarkError(f"{self.model.name} takes {most} tokens, and a load needs {longest}: take less")

    @property
    def context(self) -> int:
        """The longest row of a load."""
        return max(tokens_in + tokens_out for _, tokens_in, tokens_out in self.loads)

    def arguments(self, backend: str, folder: str) -> dict[str, Any]:
        """The engine's arguments for one backend."""
        length = max(USUAL_CONTEXT, self.context) if self.on_gpu else self.context + 16
        length = min(length, self.model.longest or length)
        shared: dict[str, Any] = {"dtype": "bfloat16", "skip_tokenizer_init": True}
        if not self.model.weights:
            shared["load_format"] = "dummy"
        if backend not in (STOCK, OURS):
            shared["attention_backend"] = backend
        mine: dict[str, Any]
        on_gpu: dict[str, Any]
        on_cpu: dict[str, Any]
        if self.engine == "vllm":
            mine = {"model": folder, "max_model_len": length, "enable_prefix_caching": False}
            on_gpu, on_cpu = {"gpu_memory_utilization": 0.5, "max_num_batched_tokens": 8192}, {"enforce_eager": True}
        else:
            mine = {
                "model_path": folder, "context_length": length, "disable_radix_cache": True,
                "sampling_backend": "pytorch",
            }  # fmt: skip
            on_gpu, on_cpu = {"mem_fraction_static": 0.6}, {
                "device": "cpu", "disable_cuda_graph": True, "max_total_tokens": 4096, "mem_fraction_static": 0.2,
                "skip_server_warmup": True,
            }  # fmt: skip
        return shared | mine | (on_gpu if self.on_gpu else on_cpu) | self.options

    def environment(self, backend: str) -> dict[str, str]:
        """The variables of a backend's process."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith("TAUT_")}
        variables |= {
            "TAUT_ATTENTION": "on" if backend == OURS else "off",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its steps are driven here
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        if not self.on_gpu:
            variables |= {"VLLM_CPU_KVCACHE_SPACE": "1", "SGLANG_USE_CPU_ENGINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        if not self.on_gpu and self.engine == "sglang":
            variables["TRITON_INTERPRET"] = "1"  # its own helpers in Triton then run on a CPU
        return variables


def parse_load(text: str) -> tuple[int, int, int]:
    """`8x512/256` -> 8 requests of 512 tokens that get 256 more.

    Raises:
        BenchmarkError: it is not written so.
    """
    found = re.fullmatch(r"(\d+)x(\d+)/(\d+)", text.strip().lower())
    numbers = tuple(map(int, found.groups())) if found else ()
    if len(numbers) != 3 or min(numbers) < 1:
        raise BenchmarkError(f"{text} is no load: write REQUESTSxTOKENS_IN/TOKENS_OUT, as in 8x512/256")
    return numbers[0], numbers[1], numbers[2]


def run(plan: Plan, say: Callable[[str], None] = lambda _: None) -> Iterator[EngineRow]:
    """Every backend's row so far, after each of its processes; the last of each backend is whole.

    Raises:
        EngineFailedError: a process ended without a result, or was not served by taut when it should have been. Raised
            when the other backends have been measured.
    """
    rows: dict[str, EngineRow] = {}
    failed: dict[str, EngineFailedError] = {}
    for number in range(plan.rounds):
        for backend in plan.backends:
            if backend in failed:
                continue
            words = f"{plan.engine} {plan.model.name} {backend}"
            words += f", round {number + 1} of {plan.rounds}" if plan.rounds > 1 else ""
            try:
                row = _process(plan, backend, lambda where, words=words: say(f"{words}: {where}"))  # type: ignore[misc]
            except EngineFailedError as error:
                failed[backend] = error
                continue
            rows[backend] = _joined(rows[backend], row) if backend in rows else row
            yield rows[backend]
    if failed:
        logs = "\n".join(f"{backend}:\n{error.log}" for backend, error in failed.items())
        raise EngineFailedError("; ".join(map(str, failed.values())), logs)


def _joined(before: EngineRow, after: EngineRow) -> EngineRow:
    loads = [
        first.model_copy(update={"runs": first.runs + second.runs})
        for first, second in zip(before.loads, after.loads, strict=True)
    ]
    both = {name: sorted({*getattr(before, name), *getattr(after, name)}) for name in ("kv_cache", "serves")}
    return before.model_copy(update={"loads": loads, **both})


def _process(plan: Plan, backend: str, say: Callable[[str], None]) -> EngineRow:
    """One backend in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        model = folder
        if plan.model.folder is None:
            Path(folder, "config.json").write_text(json.dumps(plan.model.config))
        else:
            model = str(plan.model.folder)
        asked, answered, log = (Path(folder, name) for name in ("request", "answer", "log"))
        request = {
            "engine": plan.engine, "options": plan.arguments(backend, model), "vocabulary": plan.model.vocabulary,
            "runs": plan.runs, "loads": plan.loads,
        }  # fmt: skip
        asked.write_text(json.dumps(request))
        command = [sys.executable, "-m", "taut.benchmarks.engine_process", str(asked), str(answered)]
        status = follow(command, plan.environment(backend), log, plan.patience, say)
        said = log.read_text(errors="replace")
        if not answered.exists():
            how = f"took longer than {plan.patience:.0f} s" if status is None else f"ended with status {status}"
            raise EngineFailedError(
                f"{plan.engine} with {backend} {how}; the end of its log stands above", said[-5000:]
            )
        serves = sorted({found.group() for found in SERVES.finditer(said)})
        if (backend == OURS) is not bool(serves):
            what = "was not served by taut" if backend == OURS else "was served by taut"
            raise EngineFailedError(f"{plan.engine} with {backend} {what}: `taut doctor` says why", said[-5000:])
        return EngineRow(
            engine=plan.engine,
            model=plan.model.name,
            backend=backend,
            options=plan.options,
            loads=loads_of(plan.loads, json.loads(answered.read_text())),
            kv_cache=sorted(set(KV_CACHE.findall(said))),
            serves=serves,
        )


def follow(
    command: list[str], environment: dict[str, str], log: Path, patience: float, say: Callable[[str], None]
) -> int | None:
    """Run a command to its end, saying where it is; its exit status, or None where it took too long.

    It is the head of a group of processes; whatever ends this function, an interruption too, ends all of them.
    """
    end = time.monotonic() + patience
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True
        )
        try:
            while process.poll() is None and time.monotonic() < end:
                time.sleep(0.3)
                said = WHERE.findall(log.read_text(errors="replace"))
                say(said[-1] if said else "starting")
            return process.poll()
        finally:
            _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # all of them have ended by themselves
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def loads_of(loads: Sequence[tuple[int, int, int]], answer: list[list[dict[str, Any]]]) -> list[Load]:
    """What `engine_process` answers, summed up."""
    return [
        Load(
            requests=requests,
            tokens_in=tokens_in,
            tokens_out=tokens_out,
            runs=[
                EngineRun(
                    seconds=one["seconds"],
                    warm_up=number == 0,
                    first_token_ms=spread([times[0] for times in one["times"]]),
                    between_tokens_ms=spread(
                        [later - sooner for times in one["times"] for sooner, later in itertools.pairwise(times)]
                    ),
                )
                for number, one in enumerate(runs)
            ],
        )
        for (requests, tokens_in, tokens_out), runs in zip(loads, answer, strict=True)
    ]
