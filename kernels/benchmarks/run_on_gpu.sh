#!/usr/bin/env bash
# The full answer from ten minutes with a GPU: correctness first, then every form at every size.
#
#   kernels/benchmarks/run_on_gpu.sh [FOLDER] [--tiny]
#
# Needs Python with torch (a CUDA build), triton and safetensors; pytest and matplotlib are used where they are
# installed. With --tiny it runs small sizes, without a GPU with interpreted kernels: that is what CI does. Writes
# cuda.json, cuda.csv, verdict.csv, aot.json and plots into FOLDER (default: kernels/benchmarks/results).
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
folder="$here/results" tiny=""
for argument in "$@"; do
  if [ "$argument" = --tiny ]; then tiny=--tiny; else folder="$argument"; fi
done
python="${PYTHON:-python3}"
export PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$folder"
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.max.sm --format=csv | tee "$folder/gpu.txt"
  if "$python" -c 'import pytest' 2>/dev/null; then
    timeout 180 "$python" -m pytest -q -m gpu -p no:cacheprovider "$here/../../tests/kernels"
  fi
elif [ -n "$tiny" ]; then
  export TRITON_INTERPRET=1
fi
timeout 540 "$python" -m kar_kernels_bench "$folder" $tiny
if [ -z "$tiny" ]; then
  env -u TRITON_INTERPRET "$python" -m kar_kernels.aot "$folder/aot.json"
fi
