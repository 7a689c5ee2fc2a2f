"""A wheel built from the tree: what it brings, and that it is found in an environment that holds nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("adapters", "audit", "benchmarks", "cli", "common_kernels", "configs", "engine_plugins")


def pip(python: Path | str, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what is tracked and what is about to be, so that the tree stays as it is."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    pip(sys.executable, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), str(tree))
    return next(out.glob("*.whl"))


def test_every_source_is_in_the_wheel_and_nothing_else(wheel: Path) -> None:
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    patterns = [*((folder, "*.py") for folder in SOURCES), ("configs", "*.json")]
    expected = {
        f"taut/{path.relative_to(ROOT)}" for folder, pattern in patterns for path in (ROOT / folder).rglob(pattern)
    }
    assert inside == expected | {"taut/__init__.py", "taut/py.typed"}


def test_an_empty_environment_finds_it(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path, with_pip=True)
    python = tmp_path / "bin" / "python"
    site = next(tmp_path.glob("lib/python*/site-packages"))
    before = {path.name for path in site.iterdir()}
    pip(python, "install", "-q", "--no-deps", "--no-index", str(wheel))
    added = {path.name for path in site.iterdir()} - before
    assert {name for name in added if not name.endswith(".dist-info")} == {"taut"}
    code = (
        "import json, taut\n"
        "from importlib.metadata import distribution\n"
        "found = distribution('taut-attention')\n"
        "points = {p.group: [p.name, p.value] for p in found.entry_points}\n"
        "print(json.dumps([taut.__version__, found.version, points]))"
    )
    said = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    version, of_distribution, points = json.loads(said)
    assert version == of_distribution
    assert points == {
        "console_scripts": ["taut", "taut.cli.main:run"],
        "vllm.general_plugins": ["taut", "taut.engine_plugins.vllm_plugin:register"],
        "sglang.srt.plugins": ["taut", "taut.engine_plugins.sglang_plugin:register"],
    }


def test_nothing_is_required_that_would_replace_the_users_own(wheel: Path) -> None:
    metadata = next(name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("/METADATA"))
    lines = zipfile.ZipFile(wheel).read(metadata).decode().splitlines()
    required = [line.split()[1] for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert {name.split(">")[0] for name in required} == {"pluggy", "pydantic", "rich", "typer"}
