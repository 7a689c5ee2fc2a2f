"""`taut demo`: the same prompts through the engine's own attention and through ours, side by side."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from taut.cli import UserError

QUESTIONS = (
    "What is the capital of France?",
    "Name the three primary colours.",
    "Write one sentence about a little robot.",
    "What is 2 + 2?",
)
# An engine may write the name of its process before the line.
SERVES = re.compile(r"\btaut INFO \[.*serves .* attention")


@dataclass(frozen=True)
class Run:
    """One run of the engine: what came out, and what its processes logged."""

    result: dict[str, Any]
    log: str

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over the seconds of the generation, all prompts together."""
        return sum(map(len, self.result["token_ids"])) / float(self.result["seconds"])

    @property
    def proof(self) -> list[str]:
        """The lines by which processes of the engine say that our attention serves in them."""
        return [line for line in self.log.splitlines() if SERVES.search(line)]


class EngineFailedError(UserError):
    """The engine's process ended without a result; holds the end of its log."""


@dataclass(frozen=True)
class Engine:
    """An engine as the demo runs it.

    Args:
        name: what people call it.
        module: what is imported under that name.
        runs: the module that runs it once.
        arguments: of its Python interface.
        on_cpu: further ones on a CPU.
        on_gpu: further ones on a GPU.
        stock_on_cpu: further ones on a CPU where its own attention is to serve.
        variables_on_cpu: what its processes need in their environment there.
    """

    name: str
    module: str
    runs: str
    arguments: dict[str, Any]
    on_cpu: dict[str, Any]
    on_gpu: dict[str, Any]
    stock_on_cpu: dict[str, Any] = field(default_factory=dict)
    variables_on_cpu: dict[str, str] = field(default_factory=dict)


ENGINES = (
    Engine(
        name="vLLM",
        module="vllm",
        runs="taut.cli.generate",
        arguments={"max_model_len": 512, "enforce_eager": True},
        on_cpu={"dtype": "float32"},
        on_gpu={"dtype": "bfloat16"},
    ),
    Engine(
        name="SGLang",
        module="sglang",
        runs="taut.cli.generate_sglang",
        arguments={"context_length": 512, "disable_cuda_graph": True, "log_level": "error"},
        on_cpu={"device": "cpu", "dtype": "float32", "max_total_tokens": 4096, "mem_fraction_static": 0.2},
        on_gpu={"dtype": "bfloat16"},
        # Which of its own backends runs there depends on the machine and on what is built for it; this one always does.
        stock_on_cpu={"attention_backend": "torch_native"},
        # Its helpers are written in Triton, which runs them on a CPU under its interpreter.
        variables_on_cpu={
            "SGLANG_USE_CPU_ENGINE": "1", "TRITON_INTERPRET": "1", "TOKENIZERS_PARALLELISM": "false",
            "OMP_WAIT_POLICY": "PASSIVE",
        },
    ),
)  # fmt: skip


def run_engine(
    request: dict[str, Any],
    attention: str | None,
    environment: dict[str, str] | None = None,
    runs: str = ENGINES[0].runs,
) -> Run:
    """Run an engine once, in a process of its own.

    Args:
        request: as `taut.cli.generate` takes it.
        attention: TAUT_ATTENTION for that process; None leaves it unset.
        environment: further variables.
        runs: the module that does it.

    Raises:
        EngineFailedError: it did not end well.
    """
    variables = {name: value for name, value in os.environ.items() if not name.startswith("TAUT_")}
    variables |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        **(environment or {}),
    }
    if attention is not None:
        variables["TAUT_ATTENTION"] = attention
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "request.json"), Path(folder, "result.json")
        asked.write_text(json.dumps(request))
        command = [sys.executable, "-m", runs, str(asked), str(answered)]
        file = Path(folder, "log.txt")
        with file.open("w") as sink:
            process = subprocess.run(command, env=variables, stdout=sink, stderr=sink, check=False)
        log = file.read_text(errors="replace")
        if not answered.exists():  # written when all is done; how the engine then takes itself down is its own affair
            raise EngineFailedError(f"the engine ended with status {process.returncode}. Its log ends:\n{log[-8000:]}")
        return Run(json.loads(answered.read_text()), log)


def demo(engine: Engine, model: Path, tokens: int, console: Console) -> bool:
    """Generate with both, print them side by side.

    Args:
        engine: which one.
        model: a folder in Hugging Face format.
        tokens: to generate per prompt, greedily.
        console: where to print.

    Returns:
        whether every text is equal, token by token, and ours really served.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    request = {
        "model": str(model),
        "chats": list(QUESTIONS),
        "tokens": tokens,
        "ignore_eos": False,
    }
    arguments = engine.arguments | (engine.on_gpu if on_gpu else engine.on_cpu)
    stock_arguments = arguments | ({} if on_gpu else engine.stock_on_cpu)
    variables = {} if on_gpu else engine.variables_on_cpu
    runs = {}
    for attention, given, words in (
        ("off", stock_arguments, "the engine's own attention"),
        ("on", arguments, "taut attention"),
    ):
        with console.status(f"{words}: starting {engine.name} and generating (a minute on a small machine)"):
            runs[attention] = run_engine(request | {"engine": given}, attention, variables, engine.runs)
        console.print(f"==> {words}: {runs[attention].tokens_per_second:.0f} tokens/s")
    stock, ours = runs["off"], runs["on"]
    equal = [a == b for a, b in zip(stock.result["token_ids"], ours.result["token_ids"], strict=True)]

    table = Table(box=box.SIMPLE_HEAD, show_lines=True)
    for heading in ("prompt", "the engine's own", "taut", "token by token"):
        table.add_column(heading, overflow="fold")
    for i, question in enumerate(QUESTIONS):
        verdict = "[green]equal[/]" if equal[i] else "[red]different[/]"
        table.add_row(question, stock.result["texts"][i].strip(), ours.result["texts"][i].strip(), verdict)
    console.print(table)

    speeds = Table(box=box.SIMPLE_HEAD)
    for heading in ("TAUT_ATTENTION", "attention", "tokens", "tokens/s"):
        speeds.add_column(heading)
    for attention, run in runs.items():
        count = sum(map(len, run.result["token_ids"]))
        name = "taut" if run.proof else "the engine's own"
        speeds.add_row(attention, name, str(count), f"{run.tokens_per_second:.0f}")
    console.print(speeds)
    console.print("The line of the engine's process that says who served:")
    for line in ours.proof or ["(none: our attention did not serve)"]:
        console.print("  " + line, highlight=False, markup=False, soft_wrap=True)
    if on_gpu and not all(equal):
        console.print("In bfloat16 two right kernels may differ in the last bit, and a greedy text from there on.")
    return all(equal) and bool(ours.proof) and not stock.proof


def command(
    model: Annotated[Path, typer.Option(help="A model's folder in Hugging Face format, with a chat template.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each prompt, at most.")] = 48,
) -> None:
    """Generate with the engine's own attention and with ours, side by side: vLLM where it is installed, else SGLang.

    Example: taut demo --model .models/SmolLM2-135M-Instruct

    The exit status is 1 when a text differs or when ours did not serve.
    """
    engine = next((engine for engine in ENGINES if find_spec(engine.module)), None)
    if engine is None or find_spec("torch") is None:
        missing = "an engine" if engine is None else "torch"
        raise UserError(f"the demo runs a real engine and {missing} is missing here: `make demo` sets both up")
    if not (model / "config.json").exists():
        raise UserError(f"{model} holds no config.json: name a model's folder, or run `make model`")
    if not demo(engine, model, tokens, Console()):
        raise typer.Exit(1)
