"""`tools/machine_code.py`: what of a program counts, and when two records are the same."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from compiled_elf import AMD_GPU, amd_resources, nvidia_resources, sections
from machine_code import compare, renamed

NVIDIA, PROGRAM, NO_BITS = 190, 1, 8


def elf(machine: int, contents: dict[str, bytes | int]) -> bytes:
    """A file with these sections; a number is the size of a section that has no bytes in the file."""
    names, body, headers = b"\0", b"", [bytes(64)]
    for name, content in [*contents.items(), (".shstrtab", b"")]:
        place, names = len(names), names + name.encode() + b"\0"
        bytes_of_it = names if name == ".shstrtab" else b"" if isinstance(content, int) else content
        kind, size = (NO_BITS, content) if isinstance(content, int) else (PROGRAM, len(bytes_of_it))
        headers.append(struct.pack("<2I4Q2I2Q", place, kind, 0, 0, 64 + len(body), size, 0, 0, 0, 0))
        body += bytes_of_it
    count = len(headers)
    sizes = struct.pack("<2HI3QI6H", 2, machine, 1, 0, 0, 64 + len(body), 0, 64, 0, 0, 64, count, count - 1)
    return b"\x7fELF\x02" + bytes(11) + sizes + body + b"".join(headers)


def test_names_and_source_lines_do_not_count() -> None:
    code = {".text.old": b"code", ".nv.constant0.old": bytes(8)}
    before = elf(NVIDIA, code | {".debug_line": b"file.py:1", ".nv.merc.debug_line": b"1"})
    renamed_code = {name.replace("old", "new"): content for name, content in code.items()}
    now = elf(NVIDIA, {".debug_line": b"other.py:7", ".rel.debug_line": b"x"} | renamed_code)
    assert sections(before, "old") == sections(now, "new")
    assert sections(before, "old").keys() == {".text", ".nv.constant0"}


@pytest.mark.parametrize(
    "now",
    [
        {".text.k": b"edoc", ".nv.shared.k": 16},
        {".text.k": b"code", ".nv.shared.k": 32},
        {".text.k": b"code"},
        {".text.k": b"code", ".nv.shared.k": 16, ".unheard.of": b"1"},
    ],
)
def test_bytes_sizes_and_sections_count(now: dict[str, Any]) -> None:
    before = {".text.k": b"code", ".nv.shared.k": 16}
    assert sections(elf(NVIDIA, before), "k") != sections(elf(NVIDIA, now), "k")


def test_of_a_descriptor_all_counts_but_where_in_the_file_the_code_is() -> None:
    def described(entry: int, registers: int) -> dict[str, str]:
        descriptor = bytes(16) + struct.pack("<2Q", entry, 0) + bytes([registers] * 32)
        return sections(elf(AMD_GPU, {".rodata": descriptor}), "k")

    assert described(256, 3) == described(512, 3)
    assert described(256, 3) != described(256, 4)


def test_what_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match="not an ELF file"):
        sections(b"#!/bin/sh", "k")


def test_resources() -> None:
    dump = "Resource usage:\n Common:\n  GLOBAL:0\n Function k:\n  REG:168 STACK:16 SHARED:0 CONSTANT[0]:616\n"
    assert nvidia_resources(dump) == {"REG": 168, "STACK": 16, "SHARED": 0, "CONSTANT[0]": 616}
    metadata = (
        "  - .agpr_count:     4\n        .size:  8\n    .group_segment_fixed_size: 512\n    .vgpr_count:     14\n"
    )
    assert amd_resources(metadata) == {"agpr_count": 4, "group_segment_fixed_size": 512, "vgpr_count": 14}


def instance(registers: int = 32, code: str = "4 bytes aa") -> dict[str, Any]:
    return {"resources": {"REG": registers}, "sections": {".text": code}}


def test_equal_records() -> None:
    report, same = compare({"t[a] sm_90 0": instance()}, {"t[a] sm_90 0": instance()})
    assert same
    assert report.splitlines()[1].split() == ["sm_90", "1", "0", "0"]


def test_every_difference_is_named() -> None:
    before = {
        "t[a] sm_90 0": instance(),
        "t[b] sm_90 0": instance(),
        "t[c] sm_90 0": instance(),
        "t[d] sm_80 0": instance(),
    }
    now = {
        "t[a] sm_90 0": instance(registers=40, code="4 bytes bb"),
        "t[b] sm_90 0": {"error": "OutOfResources: shared memory"},
        "t[c] sm_90 0": instance(),
        "t[e] sm_80 0": instance(),
    }
    report, same = compare(before, now)
    assert not same
    assert report.splitlines()[1:4] == [
        "      sm_80          0          0          2",
        "      sm_90          1          2          0",
        "        all          1          2          2",
    ]
    assert report.splitlines()[4:] == [
        "t[a] sm_90 0: REG 32 -> 40; .text 4 bytes aa -> 4 bytes bb",
        "t[b] sm_90 0: does not compile: OutOfResources: shared memory",
        "t[d] sm_80 0: only in the first record",
        "t[e] sm_80 0: only in the second record",
        "4 differences",
    ]


def test_nothing_compared_is_not_equal() -> None:
    assert not compare({}, {})[1]


def test_tests_of_other_names() -> None:
    kernels = {"t[a_kernel-sm_90] sm_90 0": instance(1), "t[my_a_kernel] sm_90 0": instance(2)}
    assert renamed(kernels, [("a_kernel", "taut_a")]).keys() == {"t[taut_a-sm_90] sm_90 0", "t[my_a_kernel] sm_90 0"}
