#!/usr/bin/env bash
# Attention at 4,096 tokens beside cuDNN (`library`), first plain rows, then packed ones: three minutes at most.
# Needs an NVIDIA GPU, jax with its CUDA plugin, flax and optax. Flags that are given come last, and so they hold.
cd "$(dirname "$0")/../.." || exit 2
exec "${PYTHON:-python3}" -m benchmarks.attention --implementations library pallas_hopper xla_chunked pallas_gpu --lengths 4096 --tokens 16384 --heads 16 --width 128 --rounds 3 --row_limits 38 38 38 38 "$@"
