"""The adapter holds in every release of its range: registration, choice and hooks, on the Python of real wheels.

Needs SGLang's environment, and unpacked wheels: `make sglang-contract` fetches them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sglang", reason="needs SGLang's environment: make sglang")

from contract.sglang_releases import FOLDER, RELEASES

ROOT = Path(__file__).resolve().parents[2]
# What a release may lack, by the beginning of its entry in the ledger.
OF_SOME_RELEASES = (
    "add_draft_attention_backend_choices",
    "metadata for CUDA graphs",
    "disable_piecewise_cuda_graph",
    "maybe_create_verify_mask",
    "shared_read_ends",
)
# Hooks for backends that keep their metadata in a captured prefill, which ours does not ask for.
NOT_ASKED_FOR = {
    "init_forward_metadata_for_breakable_cuda_graph_capture",
    "prepare_forward_metadata_for_breakable_cuda_graph_replay",
}


@pytest.mark.parametrize("release", RELEASES)
def test_the_adapter_holds(release: str) -> None:
    if not (FOLDER / release / "sglang").is_dir():
        pytest.skip(f"{FOLDER.relative_to(ROOT)}/{release} holds no unpacked wheel")
    path = os.pathsep.join(map(str, (ROOT / "tests" / "standins", FOLDER / release)))
    variables = os.environ | {"PYTHONPATH": path, "SGLANG_USE_CPU_ENGINE": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(Path(__file__).with_name("sglang_probes.py"))]
    process = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    found = json.loads(process.stdout.splitlines()[-1])
    wrong = {what: verdict for what, verdict in found["verdicts"].items() if verdict not in ("here", "not probed")}
    assert [what for what in wrong if not what.startswith(OF_SOME_RELEASES)] == []
    assert not any(verdict.startswith("failed") for verdict in wrong.values())
    assert found["registered"]
    assert found["abstract"] == []
    assert set(found["absent"]) <= NOT_ASKED_FOR
    assert len(found["hooked"]) == 3, found["hooked"]
    assert found["made"] == ["triton", "taut", "taut"]
    assert [("did not take effect" in why) for why in found["refused"]] == [True, True, False], found["refused"]
    assert found["drafts"] == ["3 steps", "what was accepted"]
    assert any(found["chunked prefixes"])
