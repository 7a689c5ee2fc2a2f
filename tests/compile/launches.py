"""What a launch of a kernel in Triton or Gluon would compile, compiled for a GPU that is not there.

An operation is called on CPU tensors with its kernel replaced by a `Recorder`; the launch that it would have made is
then compiled for any target, and the shared memory of the result is held against the target's.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from taut.common_kernels.workspace import DeviceFacts

if TYPE_CHECKING:
    from collections.abc import Callable

# Bytes of shared memory that one program may use.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 166_912),
    "sm_86": (GPUTarget("cuda", 86, 32), 101_376),
    "sm_89": (GPUTarget("cuda", 89, 32), 101_376),
    "sm_90": (GPUTarget("cuda", 90, 32), 232_448),
    "sm_100": (GPUTarget("cuda", 100, 32), 232_448),
    "sm_120": (GPUTarget("cuda", 120, 32), 101_376),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65_536),
    "gfx950": (GPUTarget("hip", "gfx950", 64), 163_840),
}
OPTIONS = ("num_warps", "num_stages", "maxnreg")
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def facts_of(target: str) -> DeviceFacts:
    """The facts of a device of this target, as `device_facts` would tell them."""
    return DeviceFacts(target, TARGETS[target][1], 128)


@dataclass
class Recorder:
    """Stands in for a jitted kernel and keeps its launches.

    Args:
        kernel: the jitted kernel.
        launches: the arguments of each launch by name, in order.
    """

    kernel: Any
    launches: list[dict[str, Any]] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **named: Any) -> None:
            self.launches.append(dict(zip(self.kernel.arg_names, arguments, strict=False)) | named)

        return launch


def compile_for(kernel: Any, launch: dict[str, Any], target: str) -> Any:
    """Compile a recorded launch, specialised as Triton's own launcher does, and check its shared memory.

    Returns:
        Triton's compiled kernel.
    """
    device, limit = TARGETS[target]
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, parameter in enumerate(kernel.params):
        name, value = parameter.name, launch[parameter.name]
        free = parameter.do_not_specialize
        one = type(value) is int and value == 1 and not free  # Triton makes a constant of it
        if parameter.is_constexpr or value is None or isinstance(value, bool) or one:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            box = ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{POINTERS[value.base.dtype][1:]}[{box}],{value.layout!r}>"
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not free:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    source_of = GluonASTSource if kernel.is_gluon() else ASTSource
    source = source_of(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=device, options={name: launch[name] for name in OPTIONS if name in launch})
    assert compiled.metadata.shared <= limit, f"{compiled.metadata.shared} bytes of shared memory, {target} has {limit}"
    return compiled


class Resources(NamedTuple):
    """What the assembler gives a kernel: registers of a thread at its start, bytes of its stack, spills included."""

    registers: int
    stack: int


def resources_of(compiled: Any) -> Resources:
    """The resources of a kernel compiled for NVIDIA."""
    tool = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        told = subprocess.run([tool, "--dump-resource-usage", cubin], check=True, capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", told).groups()  # type: ignore[union-attr]
    return Resources(int(registers), int(stack))


def threads_of(ptx: str) -> int:
    """The threads of a program, those of all its partitions."""
    return int(re.search(r"\.reqntid (\d+)", ptx).group(1))  # type: ignore[union-attr]


def said_by_assembler(ptx: str) -> str:
    """What the assembler says of a program for sm_90, its warnings among it."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", source, "-o", "/dev/null"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr
