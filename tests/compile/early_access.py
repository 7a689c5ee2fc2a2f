"""What a kernel does before it has waited for the kernel ahead, read from its PTX along every path."""

from __future__ import annotations

import re
from itertools import pairwise

WAIT = "griddepcontrol.wait"
# Accesses to global memory, and leave for the next kernel, which may count on the end of the one ahead of this one.
TOO_EARLY = re.compile(r"\b(?:(?:ld|st|atom|red)\.\S*global|cp\.async\S*global|griddepcontrol\.launch_dependents)")
LABEL = re.compile(r"^(\$L__BB\w+):", re.MULTILINE)
TARGETS = re.compile(r"\$L__BB\w+")


def early_accesses(ptx: str) -> list[str]:
    """Lines of a kernel's PTX that some path reaches without having waited."""
    _, *pieces = LABEL.split("$L__BB_entry:\n" + ptx[ptx.index("\n{") :])
    names, blocks = pieces[::2], dict(zip(pieces[::2], pieces[1::2], strict=True))
    following = dict(pairwise(names))
    found, seen, left = [], set(), [names[0]]
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in blocks[name].splitlines():
            before_wait = line.partition(WAIT)[0]
            if TOO_EARLY.search(before_wait):
                found.append(line.strip())
            if before_wait != line:
                break
            if "bra" in line:
                left += TARGETS.findall(line)
            if re.match(r"\s*(?:ret|exit|trap|bra(?:\.uni)?\s+\$L__BB|brx)", line):
                break
        else:
            if name in following:
                left.append(following[name])
    return found
