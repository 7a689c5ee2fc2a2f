"""The machine code of two commits, compared: every instance that tests/compile compiles, for every GPU target.

    python tools/machine_code.py record --checkout f4a855e --triton 3.6.0 -o before.json
    python tools/machine_code.py record --triton 3.6.0 -o now.json
    python tools/machine_code.py compare before.json now.json

`record` runs tests/compile of a commit or a folder with that release of Triton and notes what each test compiled:
sections of the program, registers, stack, shared memory. `compare` exits with 1 where an instance differs or is in one
record alone. Names of kernels, source lines and debug sections do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parent
NOT_SHIPPED = ("test_tuning.py", "test_compiling.py")  # tiles that no table has, kernels of the test's own

Instances = dict[str, dict[str, Any]]


def checked_out(checkout: str, stack: ExitStack) -> Path:
    """The folder itself, or a temporary one with the files of a commit."""
    if Path(checkout).is_dir():
        return Path(checkout).resolve()
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="checkout-")))
    archive = subprocess.run(["git", "archive", checkout], check=True, capture_output=True, cwd=ROOT).stdout
    subprocess.run(["tar", "-x", "-C", folder], check=True, input=archive)
    return folder


def triton_at(release: str) -> Path:
    """The folder in which this release of Triton lies unpacked, fetched where it is not there yet."""
    if Path(release).is_dir():
        return Path(release).resolve()
    folder = ROOT / ".releases" / "triton" / release
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
        subprocess.run([*pip, "--target", folder, f"triton=={release}"], check=True)
    return folder


def record(checkout: str, release: str, only: str, workers: int, keep: Path | None, output: Path) -> int:
    """Compile, and write the record.

    Returns:
        1 where nothing was compiled.
    """
    with ExitStack() as stack:
        folder, triton = checked_out(checkout, stack), triton_at(release)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compiled-")))
        (scratch / "record").mkdir()
        subprocess.run(["sh", "tools/link_sources.sh"], check=True, cwd=folder)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, (triton, folder / ".types", TOOLS))),
            "TRITON_CACHE_DIR": str(scratch / "cache"),
            "TRITON_DISABLE_LINE_INFO": "1",  # which steers ptxas: other lines give other registers and orders
            "COMPILED_RECORD": str(scratch / "record"),
        }
        if keep:
            keep.mkdir(parents=True, exist_ok=True)
            environment["COMPILED_KEEP"] = str(keep.resolve())
        command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", "-p", "compiled_record"]
        command += ["--rootdir", str(folder), "-n", str(workers), "-k", only, "tests/compile"]
        command += [f"--ignore=tests/compile/{name}" for name in NOT_SHIPPED]
        tested = subprocess.run(command, cwd=folder, env=environment)
        lines = [line for file in (scratch / "record").iterdir() for line in file.read_text().splitlines()]
        version = "import triton; print(triton.__version__)"
        told = subprocess.run(
            [sys.executable, "-c", version], check=True, env=environment, capture_output=True, text=True
        )
    instances = {entry.pop("instance"): entry for entry in map(json.loads, lines)}
    whole = {"checkout": checkout, "triton": told.stdout.strip(), "instances": dict(sorted(instances.items()))}
    output.write_text(json.dumps(whole, indent=1) + "\n")
    print(f"{len(instances)} instances of {checkout} on Triton {whole['triton']}: {output}")
    if tested.returncode:
        print("Some tests failed. Where only their bounds did, the record is whole.")
    return 0 if instances else 1


def renamed(instances: Instances, names: list[tuple[str, str]]) -> Instances:
    """The same instances under new names: whole words of them replaced."""
    for old, new in names:
        instances = {re.sub(rf"(?<!\w){re.escape(old)}(?!\w)", new, key): entry for key, entry in instances.items()}
    return instances


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What of one instance differs, one phrase a section or resource."""
    if errors := [entry["error"] for entry in (before, now) if "error" in entry]:
        return [f"does not compile: {errors[0]}"]
    return [
        f"{name} {before[kind].get(name, 'absent')} -> {now[kind].get(name, 'absent')}"
        for kind in ("resources", "sections")
        for name in sorted(before[kind].keys() | now[kind].keys())
        if before[kind].get(name) != now[kind].get(name)
    ]


def compare(before: Instances, now: Instances) -> tuple[str, bool]:
    """Both records held against each other.

    Returns:
        A table by targets with a line for each instance that differs below it, and whether there is no difference.
    """
    rows, told = Counter[tuple[str, str]](), []
    for key in sorted(before.keys() | now.keys()):
        target = key.split()[-2]
        if key not in before or key not in now:
            rows[target, "one side"] += 1
            told.append(f"{key}: only in the {'first' if key in before else 'second'} record")
            continue
        found = differences(before[key], now[key])
        rows[target, "different" if found else "equal"] += 1
        told += [f"{key}: {'; '.join(found)}"] if found else []
    columns = ("equal", "different", "one side")
    targets = sorted({target for target, _ in rows})
    numbers = [(target, [rows[target, column] for column in columns]) for target in targets]
    totals = [sum(rows[target, column] for target in targets) for column in columns]
    table = [("target", *columns), *((name, *map(str, row)) for name, row in [*numbers, ("all", totals)])]
    lines = ["".join(cell.rjust(11) for cell in row) for row in table]
    same = bool(before) and not told
    return "\n".join([*lines, *told, "no difference" if same else f"{len(told)} differences"]), same


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    recording = verbs.add_parser("record", help="compile and write what came out")
    recording.add_argument("--checkout", default=str(ROOT), help="a folder or a commit; else the tree of this file")
    recording.add_argument("--triton", required=True, help="a release, or a folder with one unpacked")
    recording.add_argument("--only", default="", help="an expression for pytest's -k")
    recording.add_argument("--workers", type=int, default=0, help="processes that compile side by side")
    recording.add_argument("--keep", type=Path, help="a folder for each instance's program and assembly")
    recording.add_argument("-o", dest="output", type=Path, required=True)
    comparing = verbs.add_parser("compare", help="hold two records against each other")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("now", type=Path)
    comparing.add_argument("--renamed", action="append", default=[], metavar="OLD=NEW", help="a word in names of tests")
    comparing.add_argument("--recorded-only", action="store_true", help="leave out what the second record has not")
    asked = parser.parse_args()
    if asked.verb == "record":
        return record(asked.checkout, asked.triton, asked.only, asked.workers, asked.keep, asked.output)
    records = [json.loads(path.read_text()) for path in (asked.before, asked.now)]
    if len({one["triton"] for one in records}) != 1:
        parser.error(f"the records are of different releases of Triton: {', '.join(one['triton'] for one in records)}")
    names = [(old, new) for old, _, new in (pair.partition("=") for pair in asked.renamed)]
    before, now = renamed(records[0]["instances"], names), records[1]["instances"]
    if asked.recorded_only:
        before = {key: entry for key, entry in before.items() if key in now}
    report, same = compare(before, now)
    print(report)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
