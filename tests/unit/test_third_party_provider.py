"""A provider from a package of its own: installed with pip, found through its entry point, chosen and used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).parent.parent / "third_party_provider"

# Run by a fresh interpreter, as an engine's worker process would be.
USE_IT = """
import json
from dataclasses import replace

import torch
from taut.common_kernels.problem import Problem
from taut.common_kernels.providers import ProviderError, registry
from taut.common_kernels.step import Mask, PageTable, Step

problem = Problem("paged_attention", "cpu", "float32", "float32", 1, 1, 24, 24, 16, features=frozenset({"causal"}))
found = registry()
choice = found.choose(problem)
loaded_early = "kernels" in vars(choice.provider)
out = torch.full((1, 1, 24), float("nan"))
cache = torch.zeros(1, 16, 1, 24)
step = Step(torch.tensor([0, 1]), torch.tensor([1]), PageTable(torch.tensor([[0]]), 16), 1, 1)
kernels = choice.provider.kernels
workspace = kernels.workspace(problem, 1, 1, "cpu")
workspace.prepare(step)
kernels.paged_attention(torch.zeros(1, 1, 24), cache, cache, step, Mask(), out, scale=1.0, workspace=workspace)
try:
    found.choose(replace(problem, head_size=16), "answer")
    refusal = ""
except ProviderError as error:
    refusal = str(error)
print(json.dumps({
    "providers": [p.name for p in found.providers],
    "failures": found.failures,
    "automatic": choice.provider.name,
    "explained": choice.explain(),
    "by_name": found.choose(problem, "answer").provider.name,
    "other_by_name": found.choose(problem, "reference").provider.name,
    "other_problem": found.choose(replace(problem, head_size=16)).provider.name,
    "refusal": refusal,
    "loaded_early": loaded_early,
    "out": out.unique().tolist(),
}))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package installed in it, apart from this environment."""
    folder = tmp_path_factory.mktemp("third_party")
    source, target = folder / "source", folder / "site"
    shutil.copytree(PACKAGE, source)  # a build leaves things behind in its source
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    installed = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert installed.returncode == 0, installed.stderr
    return target


def run(code: str, folder: Path) -> Any:
    """What a fresh interpreter prints that has this folder on its path, as JSON."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TAUT_")}
    environment["PYTHONPATH"] = str(folder)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_it_is_found_chosen_and_used(site: Path) -> None:
    said = run(USE_IT, site)
    assert said["failures"] == {}
    assert {"answer", "reference"} <= set(said["providers"])
    assert not said["loaded_early"]
    assert said["automatic"] == said["by_name"] == "answer"
    assert "not reference: answer comes first" in said["explained"]
    assert said["out"] == [42.0]
    assert said["other_by_name"] == "reference"
    assert said["other_problem"] == "reference"  # a head size that it has not
    assert "answer: head size 16 is not among 24" in said["refusal"]


def test_it_is_there_only_because_it_was_installed(tmp_path: Path) -> None:
    list_them = "import json; from taut.common_kernels.providers import registry; "
    list_them += "print(json.dumps([p.name for p in registry().providers]))"
    names = run(list_them, tmp_path)
    assert "answer" not in names
    assert "reference" in names
