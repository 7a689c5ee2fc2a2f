#!/bin/sh
# Everything that benchmarks/results keeps, measured on a GPU, and the pictures of it:
#
#   sh tools/measure_published.sh FOLDER [vllm] [sglang]
#
# Engines seldom share an environment: run it once in each, into the same folder. What the folder holds already is not
# measured again, so an interrupted run goes on where it was. A part that fails costs no other and is named at the end.
# TAUT="echo taut" shows the calls. The pictures: taut bench plot FOLDER/*.json --folder docs/pictures
set -u
folder=${1:?name the folder}
shift
taut=${TAUT:-taut}
failed=

measure() { # the name of the file, and the arguments of `taut bench`
    name=$1
    shift
    if [ -e "$folder/$name.json" ]; then
        echo "$folder/$name.json is there already: remove it to measure it again" >&2
    else
        $taut bench "$@" -o "$folder/$name.json" || failed="$failed $name"
    fi
}

mkdir -p "$folder"
for engine in "$@"; do
    case $engine in
    vllm)
        measure vllm_llama engines vllm llama FLASH_ATTN TRITON_ATTN taut
        measure vllm_deepseek engines vllm deepseek FLASH_ATTN_MLA FLASHMLA TRITON_MLA taut
        ;;
    sglang)
        measure sglang_llama engines sglang llama triton taut
        measure sglang_deepseek engines sglang deepseek triton taut
        ;;
    *) failed="$failed $engine" ;;
    esac
done
measure kernels kernels
[ -z "$failed" ] || { echo "failed:$failed" >&2 && exit 1; }
