#!/usr/bin/env bash
# A training step of 1.5 billion parameters and its share of the peak (mfu), beside transformers, then beside the same
# under torch.compile: three minutes at most. Needs an NVIDIA GPU of 141 GB (with `--peers` alone, 80 GB: nobody else
# then), jax with its CUDA plugin, flax and optax; for the peers torch and transformers. Flags that are given come last,
# and so they hold.
cd "$(dirname "$0")/../.." || exit 2
exec "${PYTHON:-python3}" -m benchmarks.train --model 1.5b --batch 4 --length 2048 --peers transformers compiled --rounds 3 --row_limits 65 90 "$@"
