#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: correctness first, then the timings; ten minutes in all. Needs
# `pip install -r requirements-gpu.txt`, and `-r requirements-bench.txt` for the peers.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
export JAX_PLATFORMS=cuda
export XLA_PYTHON_CLIENT_PREALLOCATE=false  # torch needs a part of the memory too
# Float32 as float32: by default a GPU multiplies in TensorFloat-32, which is not what the tests promise.
JAX_DEFAULT_MATMUL_PRECISION=highest "$PYTHON" -m pytest -q tests/test_attention.py tests/test_generate.py -k "not sharded"
# The Hopper kernels take bfloat16 only; all their cases, also those that the quick tests leave out.
"$PYTHON" -m pytest -q tests/test_hopper.py -m "slow or not slow"
"$PYTHON" benchmarks/attention.py --lengths 512 1024 2048 4096 8192 16384
for name in train decode ppo; do
  "$PYTHON" "benchmarks/$name.py" --rounds=3
done
