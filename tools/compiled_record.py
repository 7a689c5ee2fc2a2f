"""A plugin of pytest: whatever a test compiles with `triton.compile` is noted under the test's name.

Loaded with `-p compiled_record`. Each process writes one line of JSON an instance to a file of its own in the folder
COMPILED_RECORD. Where COMPILED_KEEP names a folder, the program and its assembly are kept there as well.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends import nvidia

from compiled_elf import amd_resources, nvidia_resources, sections

LAUNCHED_WITH = ("shared", "num_warps", "num_ctas", "tmem_size", "global_scratch_size", "launch_pdl")
TEXTS = {"cubin": "ptx", "hsaco": "amdgcn"}

compile_kernel = triton.compile
compiled_by: Counter[str] = Counter()
running = ""


def described(compiled: Any, kind: str) -> dict[str, Any]:
    """What is compared of an instance."""
    program, metadata = compiled.asm[kind], compiled.metadata
    resources = {name: int(getattr(metadata, name, 0)) for name in LAUNCHED_WITH}
    if kind == "hsaco":
        resources |= amd_resources(compiled.asm["amdgcn"])
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(program)
            file.flush()
            tool = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
            command = [str(tool), "--dump-resource-usage", file.name]
            dump = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        resources |= nvidia_resources(dump)
    return {"resources": resources, "sections": sections(program, metadata.name)}


def recorded(*arguments: Any, **named: Any) -> Any:
    """Stands in for `triton.compile`."""
    target = named["target"].arch
    key = f"{running} {target if named['target'].backend == 'hip' else f'sm_{target}'} {compiled_by[running]}"
    compiled_by[running] += 1
    entry: dict[str, Any] = {"instance": key}
    try:
        compiled = compile_kernel(*arguments, **named)
        (kind,) = TEXTS.keys() & compiled.asm.keys()
        entry |= described(compiled, kind)
        if folder := os.environ.get("COMPILED_KEEP"):
            stem = Path(folder) / re.sub(r"[^\w.]+", "-", key)
            stem.with_name(f"{stem.name}.{kind}").write_bytes(compiled.asm[kind])
            stem.with_name(f"{stem.name}.{TEXTS[kind]}").write_text(compiled.asm[TEXTS[kind]])
    except Exception as error:
        entry["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        raise
    finally:
        with (Path(os.environ["COMPILED_RECORD"]) / f"{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
    return compiled


triton.compile = recorded


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """What is compiled from here on is this test's."""
    global running
    running = item.nodeid.removeprefix("tests/compile/")
