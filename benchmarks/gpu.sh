#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: correctness first, then the timings, ten minutes in all; what fails does not keep
# the rest from running, but is the exit code. Needs `pip install -r requirements-gpu.txt`, and
# `-r requirements-bench.txt` for the peers.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
export JAX_PLATFORMS=cuda,cpu
export XLA_PYTHON_CLIENT_PREALLOCATE=false  # torch needs a part of the memory too
export JAX_DISABLE_MOST_OPTIMIZATIONS=0     # which the tests set, to compile faster on a CPU
failed=0
run() { echo "== $*"; "$@" || failed=1; }
# Float32 as float32: by default a GPU multiplies in TensorFloat-32, which is not what the tests promise.
run env JAX_DEFAULT_MATMUL_PRECISION=highest "$PYTHON" -m pytest -q tests/test_attention.py tests/test_generate.py -k "not sharded"
# The Hopper kernels take bfloat16 only; all their cases, also those that the quick tests leave out.
run "$PYTHON" -m pytest -q tests/test_hopper.py -m "slow or not slow"
run "$PYTHON" -m benchmarks.attention --lengths 1024 4096 16384 --rounds=3
for name in train decode ppo; do
  run "$PYTHON" -m "benchmarks.$name" --rounds=3
done
exit $failed
