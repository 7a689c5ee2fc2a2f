#!/bin/sh
# The sources as one package `taut`, for tools that read a tree instead of an installation: .types/taut/*
set -eu
cd "$(dirname "$0")/.."
mkdir -p .types/taut
for folder in adapters audit benchmarks cli common_kernels configs engine_plugins; do
    ln -sfn "../../$folder" ".types/taut/$folder"
done
ln -sf ../../package/__init__.py .types/taut/__init__.py
