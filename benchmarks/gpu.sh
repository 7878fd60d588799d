#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: correctness first, then the timings. Needs `pip install -r requirements-gpu.txt`.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
export JAX_PLATFORMS=cuda
# Float32 as float32: by default a GPU multiplies in TensorFloat-32, which is not what the tests promise.
JAX_DEFAULT_MATMUL_PRECISION=highest "$PYTHON" -m pytest -q tests/test_attention.py -k "not sharded"
"$PYTHON" benchmarks/attention.py --lengths 512 1024 2048 4096 8192 16384
