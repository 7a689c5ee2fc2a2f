"""What a compiled kernel is made of, whatever it is called and wherever its source stood.

NVIDIA's cubin and AMD's hsaco are both ELF files of 64 bits. Sections that hold names, source lines or the file's own
layout are left out. Every other section counts, also one of a kind that only a later compiler writes.
"""

from __future__ import annotations

import hashlib
import re
import struct

# Source lines; NVIDIA's second copy of a program ("merc"), which has them too; tables of names; addresses in the file.
LEFT_OUT = re.compile(
    r"(\.rela?)?\.(nv_)?debug_.*|\.nv\.(cap)?merc\..*|\.(shstr|str|sym)tab|\.note.*|\.comment|\.nv\.callgraph|\.nv\.info"
    r"|\.dyn(sym|str|amic)|\.(gnu\.)?hash|\.relro_padding"
)
AMD_GPU, NO_BITS = 224, 8
DESCRIPTOR, ENTRY = (
    64,
    slice(16, 24),
)  # bytes of AMD's kernel descriptor, and where in it the distance to the code stands


def sections(elf: bytes, kernel: str) -> dict[str, str]:
    """The sections that count, by their names without the kernel's: for each its size in bytes, and a hash of them.

    Args:
        elf: the file.
        kernel: the kernel's name, which NVIDIA writes into the names of sections.

    Raises:
        ValueError: this is no ELF file.
    """
    if elf[:5] != b"\x7fELF\x02":
        raise ValueError(f"not an ELF file of 64 bits: it begins with {elf[:5]!r}")
    (machine,) = struct.unpack_from("<H", elf, 18)
    (table,) = struct.unpack_from("<Q", elf, 40)
    entry_size, count, names_at = struct.unpack_from("<3H", elf, 58)
    # Of a section: name, type, flags, address, offset, size.
    headers = [struct.unpack_from("<2I4Q", elf, table + index * entry_size) for index in range(count)]
    names = headers[names_at][4]
    found: dict[str, str] = {}
    for place, kind, _flags, _address, offset, size in headers:
        start = names + place
        name = elf[start : elf.index(b"\0", start)].decode()
        if not size or LEFT_OUT.fullmatch(name):
            continue
        content = bytearray() if kind == NO_BITS else bytearray(elf[offset : offset + size])
        if machine == AMD_GPU and name == ".rodata" and size == DESCRIPTOR:
            content[ENTRY] = bytes(8)
        found[name.removesuffix(f".{kernel}")] = f"{size} bytes {hashlib.sha256(content).hexdigest()[:16]}"
    return found


def amd_resources(assembly: str) -> dict[str, int]:
    """Registers, spills and memory of a kernel, from the metadata at the end of its assembly."""
    return {
        name: int(number)
        for name, number in re.findall(r"^[ -]+\.(\w+_count|\w+_fixed_size): +(\d+)$", assembly, flags=re.MULTILINE)
    }


def nvidia_resources(dump: str) -> dict[str, int]:
    """Registers, stack and memory of a kernel, from what `cuobjdump --dump-resource-usage` prints."""
    (line,) = re.findall(r"^ +(REG:.*)$", dump, flags=re.MULTILINE)
    return {name: int(number) for name, number in re.findall(r"(\S+):(\d+)", line)}
