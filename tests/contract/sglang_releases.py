"""Real releases of SGLang, unpacked: `python tests/contract/sglang_releases.py 0.5.18 0.5.23` fetches those named.

A wheel is downloaded with pip and unpacked whole to `.releases/sglang/VERSION`, 130 MB each, since the CPU engine runs
from there on the dependencies of the release that is installed. What is there already is not fetched again.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / ".releases" / "sglang"
# Every difference between releases lies between two of these.
RELEASES = (
    "0.5.11", "0.5.12.post1", "0.5.13.post1", "0.5.15.post1", "0.5.17", "0.5.18", "0.5.20", "0.5.22", "0.5.23",
)  # fmt: skip


def fetch(release: str) -> Path:
    """The folder that holds the package `sglang` of a release, fetched if need be."""
    folder = FOLDER / release
    if folder.exists():
        return folder
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-cache-dir", "-d", place]
        # Nothing compiled of a wheel is run: one for any machine will do.
        command += ["--only-binary", ":all:", "--platform", "manylinux_2_34_x86_64", f"sglang=={release}"]
        subprocess.run(command, check=True)
        unpacked = Path(place) / "unpacked"
        with zipfile.ZipFile(next(Path(place).glob("*.whl"))) as archive:
            archive.extractall(unpacked)
        FOLDER.mkdir(parents=True, exist_ok=True)
        shutil.move(unpacked, folder)
    return folder


if __name__ == "__main__":
    for wanted in sys.argv[1:] or RELEASES:
        sys.stdout.write(f"SGLang {wanted}: {fetch(wanted)}\n")
