"""vLLM in a process of its own, its attention watched.

    python -m taut.audit.run_vllm REQUEST.json RECORD.json

REQUEST is a `work.Request`, RECORD a `records.Run`; both as JSON. Lines that begin with `work.SAYS` tell how far it is.
"""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taut.adapters.vllm import bridge
from taut.audit import padding
from taut.audit.device import Profiler
from taut.audit.records import Layer, Run, Step
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
    from collections.abc import Callable, Mapping, Sequence


class Audited:
    """A worker of vLLM's whose attention is watched.

    Args:
        worker: as `LLM.collective_rpc` hands it over.
        watch: stands in for its methods.

    Attributes:
        parts: of the worker.
        batch: the `CommonAttentionMetadata` of the last step.
        trace: the first source.
    """

    def __init__(self, worker: Any, watch: Watch) -> None:
        self.parts = bridge.audited_parts(worker)
        self.batch: Any = None
        self.device: str = self.first_layer.kv_cache.device.type
        self.trace = Trace(self.device, modules_of([self.first_layer.impl, *self.parts.builders]))
        for builder in self.parts.builders:
            watch.method(builder, "build", "metadata", "metadata", "backend")
            self._note_batches(builder)
        for name, layer in self.parts.layers.items():
            watch.method(layer, "forward", name, "layer", "engine")
            for method in ("do_kv_cache_update", "forward", "forward_mqa", "forward_mha"):
                watch.method(layer.impl, method, name, "layer", "backend")
        watch.steps(self.parts.runner, "execute_model", self.has_work, self.describe)

    @property
    def first_layer(self) -> Any:
        """The model's first layer of attention."""
        return next(iter(self.parts.layers.values()))

    def _note_batches(self, builder: Any) -> None:
        build = builder.build

        def noting(*arguments: Any, **named: Any) -> Any:
            self.batch = bridge.audited_batch(arguments, named)
            return build(*arguments, **named)

        builder.build = noting

    def has_work(self, arguments: Sequence[Any]) -> bool:
        """Whether any token is scheduled: a scheduler that is a step ahead has nothing left for the last call."""
        return bool(arguments[0].num_scheduled_tokens)

    def describe(self, step: Step, arguments: Sequence[Any]) -> None:
        """What the step that has just run was."""
        asked = len(arguments[0].num_scheduled_tokens)
        step.kind = "decode" if self.batch.max_query_len == 1 else "prefill"
        step.lengths = self.batch.seq_lens[:asked].tolist()
        step.tokens = int(self.batch.num_actual_tokens)
        step.padded = int(self.batch.num_reqs) - asked

    def record(self, request: Request, watch: Watch) -> Run:
        """What has been seen so far."""
        import vllm

        implementation = self.first_layer.impl
        layers = list(self.parts.layers.values())
        backend = [*self.parts.builders, *(layer.impl for layer in layers)]
        itemsize = self.parts.runner.vllm_config.model_config.dtype.itemsize
        return Run(
            asked=request.asked,
            engine="vllm",
            release=vllm.__version__,
            device=device_name(self.device),
            backend=class_name(implementation),
            kernels=getattr(getattr(implementation, "kernels", None), "__name__", "").rpartition(".")[2],
            interpreted=interpreted(),
            layers=[_facts(name, layer, itemsize) for name, layer in self.parts.layers.items()],
            held=held_bytes(backend, [self.parts.runner, *layers], self.device),
            partials=scheduled_partials(backend),
            steps=self.trace.steps,
            captured_splits=watch.captured,
        )


def _facts(name: str, layer: Any, itemsize: int) -> Layer:
    stored = layer.kv_cache.element_size()
    latent = getattr(layer, "kv_lora_rank", None)
    if latent is not None:
        return Layer(name, layer.num_heads, 1, latent + layer.qk_rope_head_dim, latent, itemsize, stored, latent=True)
    values = getattr(layer, "head_size_v", None) or layer.head_size
    window = getattr(layer, "sliding_window", None) or 0
    left = window - 1 if window > 0 else -1  # a window counts the query itself
    return Layer(name, layer.num_heads, layer.num_kv_heads, layer.head_size, values, itemsize, stored, left)


def run(request: Request, path: Path) -> Run:
    """Start vLLM, warm it up, and record one prefill and the decode steps that follow it; see `records.Run`."""
    import vllm
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if request.plugin:
        _register(request.plugin)
    watch = Watch()
    say("starting vLLM")
    arguments: dict[str, Any] = {
        "model": request.model,
        "load_format": "dummy" if request.made_up else "auto",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "max_model_len": request.context + request.steps + 16,
        "max_num_seqs": request.rows + padding.ROWS,
        "max_num_batched_tokens": max(2048, sum(map(len, prompts(request.rows, request.context)))),
    }
    if request.options.get("enforce_eager", True):  # no graph to be captured: nothing to be compiled or tuned for it
        arguments["optimization_level"] = 0
    if request.layers:
        arguments["hf_overrides"] = {"num_hidden_layers": request.layers}
    flag = "CUSTOM" if request.plugin and not current_platform.is_cpu() else request.flag
    if flag:
        arguments["attention_backend"] = AttentionBackendEnum[flag]  # vLLM names those there are, if this is none
    engine = vllm.LLM(**(arguments | request.options))
    audited: list[Audited] = engine.collective_rpc(lambda worker: Audited(worker, watch))
    here = audited[0]
    served = here.parts.backends[0].get_name()
    if request.flag not in ("", served):
        raise SystemExit(f"taut: vLLM took {served} in place of {request.flag}, which it does not offer on this device")
    say("warming up")
    _generate(engine, request, "warm-up", 3)
    say("tracing")
    watch.source = here.trace
    _generate(engine, request, "traced", request.steps + 1)
    watch.source = None
    found = here.record(request, watch)
    write(path, found)
    if here.device == "cuda":
        say("profiling")
        profiler = Profiler()
        # The first step prefills, the second is the first to decode.
        _generate(engine, request, "profiled", 4, {2: lambda: watch.use(profiler), 3: lambda: watch.use(None)})
        found.observed = profiler.device
        write(path, found)
    say("trying rows without work")
    found.padding = padding.try_padding(here.parts.builders[0], here.first_layer, here.batch)
    write(path, found)
    return found


def _generate(
    engine: Any, request: Request, name: str, tokens: int, before: Mapping[int, Callable[[], None]] | None = None
) -> None:
    """Generate so many tokens for each prompt; `before` is called before the steps of these numbers, from 0 on."""
    from vllm import SamplingParams

    core = engine.llm_engine
    for i, prompt in enumerate(prompts(request.rows, request.context)):
        parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        core.add_request(f"{name}-{i}", {"prompt_token_ids": prompt}, parameters)
    for step in count():
        if not core.has_unfinished_requests():
            return
        if before and step in before:
            before[step]()
        core.step()


def _register(plugin: str) -> None:
    """Let a class of the user's stand where vLLM looks for a backend: as CUSTOM, and as the only one of a CPU."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    for member in ("CUSTOM", "CPU_ATTN"):
        register_backend(AttentionBackendEnum[member], plugin)


if __name__ == "__main__":
    run(read_request(Path(sys.argv[1])), Path(sys.argv[2]))
