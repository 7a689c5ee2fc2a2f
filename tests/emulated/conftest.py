"""Runs the Gluon kernels of the provider `hopper` on a CPU, emulated, and the Triton ones beside them interpreted.

Both must be asked for before triton is imported. That is so when this folder has a pytest of its own: `pytest
tests/emulated`. In a process that has imported triton for something else, these tests are skipped.
"""

from __future__ import annotations

import os
import sys

ALONE = "triton" not in sys.modules
if ALONE:
    os.environ["TRITON_INTERPRET"] = "1"
    import gluon_emulator

    gluon_emulator.install()

    from triton.language.extra import cuda

    # Of the kernels beside, which the interpreter runs one after another: the one ahead has ended.
    cuda.gdc_wait = cuda.gdc_launch_dependents = lambda: None
else:
    collect_ignore_glob = ["test_*.py"]
