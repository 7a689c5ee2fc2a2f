"""vLLM in a process of its own, its attention watched.

    python -m taut.audit.run_vllm REQUEST.json RECORD.json

REQUEST is a `work.Request`, RECORD a `records.Run`; both as JSON. Lines that begin with `work.SAYS` tell how far it is.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taut.adapters.vllm import bridge
from taut.audit.records import Layer, Run, Step
from taut.audit.trace import Trace
from taut.audit.watch import Watch
from taut.audit.work import Request, class_name, device_name, held_bytes, modules_of, prompts, read_request, say, write

if TYPE_CHECKING:
    from collections.abc import Sequence


class Audited:
    """A worker of vLLM's whose attention is watched.

    Args:
        worker: as `LLM.collective_rpc` hands it over.
        watch: stands in for its methods.

    Attributes:
        parts: of the worker.
        batch: the `CommonAttentionMetadata` of the last step.
    """

    def __init__(self, worker: Any, watch: Watch) -> None:
        self.parts = bridge.audited_parts(worker)
        self.batch: Any = None
        for builder in self.parts.builders:
            watch.method(builder, "build", "metadata", "metadata", "backend")
            self._note_batches(builder)
        for name, layer in self.parts.layers.items():
            watch.method(layer, "forward", name, "layer", "engine")
            for method in ("do_kv_cache_update", "forward", "forward_mqa", "forward_mha"):
                watch.method(layer.impl, method, name, "layer", "backend")
        watch.steps(self.parts.runner, "execute_model", self.describe)

    @property
    def implementation(self) -> Any:
        """The first layer's."""
        return next(iter(self.parts.layers.values())).impl

    def _note_batches(self, builder: Any) -> None:
        build = builder.build

        def noting(*arguments: Any, **named: Any) -> Any:
            self.batch = bridge.audited_batch(arguments, named)
            return build(*arguments, **named)

        builder.build = noting

    def describe(self, step: Step, arguments: Sequence[Any]) -> None:
        """What the step that has just run was."""
        asked = len(arguments[0].num_scheduled_tokens)
        step.kind = "decode" if self.batch.max_query_len == 1 else "prefill"
        step.lengths = self.batch.seq_lens[:asked].tolist()
        step.tokens = int(self.batch.num_actual_tokens)
        step.padded = int(self.batch.num_reqs) - asked

    def layers(self) -> list[Layer]:
        """What the layers have to work on."""
        itemsize = self.parts.runner.vllm_config.model_config.dtype.itemsize
        return [_facts(name, layer, itemsize) for name, layer in self.parts.layers.items()]


def _facts(name: str, layer: Any, itemsize: int) -> Layer:
    stored = layer.kv_cache.element_size()
    latent = getattr(layer, "kv_lora_rank", None)
    if latent is not None:
        return Layer(name, layer.num_heads, 1, latent + layer.qk_rope_head_dim, latent, itemsize, stored, latent=True)
    values = getattr(layer, "head_size_v", None) or layer.head_size
    window = getattr(layer, "sliding_window", None) or 0
    left = window - 1 if window > 0 else -1  # a window counts the query itself
    return Layer(name, layer.num_heads, layer.num_kv_heads, layer.head_size, values, itemsize, stored, left)


def run(request: Request) -> Run:
    """Start vLLM, warm it up, and record one prefill and the decode steps that follow it."""
    import vllm

    if request.plugin:
        _register(request.plugin)
    watch = Watch()
    say("starting vLLM")
    total = sum(map(len, prompts(request.rows, request.context)))
    engine = vllm.LLM(
        request.model,
        load_format="dummy" if request.made_up else "auto",
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=request.context + request.steps + 16,
        max_num_seqs=request.rows,
        max_num_batched_tokens=max(2048, total),
        hf_overrides={"num_hidden_layers": request.layers} if request.layers else {},
        **({"attention_backend": request.flag} if request.flag else {}),
        **request.options,
    )
    audited: list[Audited] = engine.collective_rpc(lambda worker: Audited(worker, watch))
    here = audited[0]
    device = next(iter(here.parts.layers.values())).kv_cache.device.type
    found = Run(
        request.asked,
        "vllm",
        vllm.__version__,
        device_name(device),
        class_name(here.implementation),
        getattr(getattr(here.implementation, "kernels", None), "__name__", ""),
        here.layers(),
        held_bytes([*here.parts.builders, *(layer.impl for layer in here.parts.layers.values())]),
    )
    trace = Trace(device, modules_of([here.implementation, *here.parts.builders]))
    say("warming up")
    _generate(engine, request, "warm-up", 3)
    say("tracing")
    watch.source = trace
    _generate(engine, request, "traced", request.steps + 1)
    watch.source = None
    found.steps = trace.steps
    found.captured_splits = watch.captured
    return found


def _generate(engine: Any, request: Request, name: str, tokens: int) -> None:
    from vllm import SamplingParams

    core = engine.llm_engine
    for i, prompt in enumerate(prompts(request.rows, request.context)):
        parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        core.add_request(f"{name}-{i}", {"prompt_token_ids": prompt}, parameters)
    while core.has_unfinished_requests():
        core.step()


def _register(plugin: str) -> None:
    """Let a class of the user's stand where vLLM looks for a backend: as CUSTOM, and as the only one of a CPU."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    for member in ("CUSTOM", "CPU_ATTN"):
        register_backend(AttentionBackendEnum[member], plugin)


if __name__ == "__main__":
    write(Path(sys.argv[2]), run(read_request(Path(sys.argv[1]))))
