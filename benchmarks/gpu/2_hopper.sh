#!/usr/bin/env bash
# The Hopper kernels (H100, H200) against float64 on small cases, then their time beside cuDNN: three minutes at most.
# Needs jax with its CUDA plugin, flax and optax. Flags that are given come last, and so they hold.
cd "$(dirname "$0")/../.." || exit 2
exec "${PYTHON:-python3}" -m benchmarks.hopper --length 4096 --tokens 16384 --heads 16 --width 128 --rounds 3 --row_limits 30 25 25 35 40 "$@"
