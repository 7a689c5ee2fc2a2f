"""SGLang in processes of its own, its attention watched in the one that computes.

    python -m taut.audit.run_sglang FOLDER/request.json RECORD.json

The request is a `work.Request`, RECORD a `records.Run`; both as JSON. SGLang computes in a process that it spawns: it
runs `run_scheduler` there, which leaves its record in FOLDER after each step that was recorded. Which source records
the coming steps, this process says by a file there.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from taut.audit.device import Profiler
from taut.audit.records import Layer, Padding, Run, Step
from taut.audit.trace import Trace
from taut.audit.watch import Watch
from taut.audit.work import (
    Request,
    class_name,
    device_name,
    held_bytes,
    interpreted,
    modules_of,
    prompts,
    read_request,
    say,
    scheduled_partials,
    write,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

FOLDER = "_AUDIT_FOLDER"  # the variable that tells the spawned process where both meet
SWITCH, SEEN = "recording", "seen.json"  # which source records the coming steps; what was recorded
USUAL = {
    "skip_server_warmup": True,
    "disable_overlap_schedule": True,
    "log_level": "error",
    "disable_radix_cache": True,
}
ON_A_CPU = {"device": "cpu", "mem_fraction_static": 0.2}


class Audited:
    """A model runner of SGLang's whose attention is watched.

    Args:
        runner: its backends are built.
        watch: stands in for its methods.
        request: what is to be done.
        record: where the record goes.
    """

    def __init__(self, runner: Any, watch: Watch, request: Request, record: Path) -> None:
        from taut.adapters.sglang import bridge

        self.runner = runner
        self.watch = watch
        self.record = record
        self.switch = record.with_name(SWITCH)
        backend = runner.attn_backend
        layers = _layers(runner)
        device = torch.device(runner.device).type
        self.trace = Trace(device, modules_of([backend, *getattr(backend, "delegates", ())]))
        self.found = Run(
            asked=request.asked,
            engine="sglang",
            release=bridge.engine_version(),
            device=device_name(device),
            backend=class_name(backend),
            kernels=next((service.provider.name for service in getattr(backend, "services", {}).values()), ""),
            interpreted=interpreted(),
            layers=[_facts(name, layer, runner) for name, layer in layers.items()],
            steps=self.trace.steps,
            padding=Padding(0, None, "rows without work are tried with vLLM alone"),
        )
        for name in ("init_forward_metadata", "init_forward_metadata_out_graph", "init_forward_metadata_in_graph"):
            watch.method(backend, name, "metadata", "metadata", "backend")
        for name, layer in layers.items():
            watch.method(layer, "forward", name, "layer", "engine")
        # One backend serves every layer: the layer's name is that of the scope it is called in.
        for method in ("forward", "forward_decode", "forward_extend"):
            watch.method(backend, method, "layer", "layer", "backend")
        watch.steps(runner, "forward", self.has_work, self.describe)
        self._switched(runner)

    def _switched(self, runner: Any) -> None:
        """Record a step as the other process says, and leave the record when it has run."""
        forward = runner.forward
        profiler = Profiler()

        def recorded(*arguments: Any, **named: Any) -> Any:
            asked = self.switch.read_text() if self.switch.exists() else ""
            decodes = (arguments[0] if arguments else named["forward_batch"]).forward_mode.is_decode()
            self.watch.use({"trace": self.trace, "profile": profiler if decodes else None}.get(asked))
            result = forward(*arguments, **named)
            if self.watch.source is not None:
                self.found.captured_splits = self.watch.captured
                self.found.observed = profiler.device if asked == "profile" else None
                self.found.held = held_bytes([runner.attn_backend], [runner], self.trace.device)
                self.found.partials = scheduled_partials([runner.attn_backend])
                write(self.record, self.found)
            return result

        runner.forward = recorded

    def has_work(self, arguments: Sequence[Any]) -> bool:
        """Whether there are rows: a rank without any takes part in the steps of the others."""
        return bool(arguments[0].batch_size)

    def describe(self, step: Step, arguments: Sequence[Any]) -> None:
        """What the step that has just run was."""
        batch = arguments[0]
        step.kind = "decode" if batch.forward_mode.is_decode() else "prefill"
        step.lengths = batch.seq_lens.tolist()
        step.tokens = int(batch.input_ids.shape[0])
        step.padded = 0 if batch.batch_size == len(step.lengths) else None


def _layers(runner: Any) -> dict[str, Any]:
    from taut.adapters.sglang import bridge

    found = set(bridge.attention_layers(runner.model))
    return {name: module for name, module in runner.model.named_modules() if module in found}


def _facts(name: str, layer: Any, runner: Any) -> Layer:
    latent = bool(getattr(runner, "use_mla_backend", False)) and layer.tp_k_head_num == 1
    window = layer.sliding_window_size if layer.sliding_window_size is not None else -1
    return Layer(
        name,
        layer.tp_q_head_num,
        layer.tp_k_head_num,
        layer.qk_head_dim,
        layer.v_head_dim,
        runner.dtype.itemsize,
        runner.kv_cache_dtype.itemsize,
        window if window >= 0 else -1,  # SGLang does not count the query itself
        latent,
    )


def run_scheduler(*arguments: Any, **named: Any) -> Any:
    """What SGLang's spawned process runs: its scheduler, with the attention of its model watched."""
    from taut.adapters.sglang import bridge

    folder = Path(os.environ[FOLDER])
    request = read_request(folder / "request.json")
    watch = Watch()
    if request.plugin:
        _register(request.plugin)
    seen: list[Audited] = []

    def attach(runner: Any) -> None:
        if not seen and not getattr(runner, "is_draft_worker", False):
            seen.append(Audited(runner, watch, request, folder / SEEN))

    bridge.when_backends_are_built(attach)
    return bridge.run_scheduler_process(*arguments, **named)


def run(request: Request, folder: Path, record: Path) -> None:
    """Start SGLang, warm it up, and record one prefill and the decode steps that follow it.

    Args:
        request: what is to be done; it stands in `folder`, too.
        folder: where both processes meet.
        record: where the record goes in the end.
    """
    import json

    from taut.adapters.sglang import bridge

    os.environ[FOLDER] = str(folder)
    flag = request.flag
    if request.plugin:
        flag = _register(request.plugin)
    elif request.asked == "taut":
        flag = bridge.NAME
    overrides = {"num_hidden_layers": request.layers} if request.layers else {}
    usual: dict[str, Any] = {
        "model_path": request.model,
        "load_format": "dummy" if request.made_up else "auto",
        "skip_tokenizer_init": True,
        "disable_cuda_graph": True,
        "max_running_requests": max(16, request.rows),
        "max_total_tokens": max(4096, 4 * request.rows * (request.context + request.steps + 16)),
        "json_model_override_args": json.dumps(overrides),
    }
    usual |= USUAL | ({} if torch.cuda.is_available() else ON_A_CPU)
    if flag:
        usual["attention_backend"] = flag
    say("starting SGLang")
    engine = bridge.audited_engine(run_scheduler, **(usual | request.options))
    switch = folder / SWITCH
    say("warming up")
    _generate(engine, request, 3)
    say("tracing")
    switch.write_text("trace")
    _generate(engine, request, request.steps + 1)
    if torch.cuda.is_available():
        say("profiling")
        switch.write_text("profile")
        _generate(engine, request, 3)
    switch.unlink()
    seen = folder / SEEN
    if not seen.exists():
        raise SystemExit(
            "taut: SGLang answered, but none of its steps was seen: its scheduler runs another model runner"
        )
    seen.rename(record)
    engine.shutdown()


def _generate(engine: Any, request: Request, tokens: int) -> None:
    parameters = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    engine.generate(input_ids=prompts(request.rows, request.context), sampling_params=parameters)


def _register(plugin: str) -> str:
    """Let a class of the user's be a backend of SGLang's; gives the name it has there."""
    from taut.adapters.sglang import bridge

    module, _, name = plugin.rpartition(".")
    return bridge.register_audited(name, lambda runner: getattr(import_module(module), name)(runner))


if __name__ == "__main__":  # SGLang's processes are spawned: they import this module again
    if not torch.cuda.is_available():
        os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
        os.environ.setdefault("TRITON_INTERPRET", "1")  # SGLang's own helpers in Triton then run on a CPU
    from taut.audit import run_sglang  # by its own name, so that a spawned process finds `run_scheduler`

    asked = Path(sys.argv[1])
    run_sglang.run(read_request(asked), asked.parent, Path(sys.argv[2]))
