#!/usr/bin/env bash
# Sampling of Llama-3.2-1B's shape beside transformers, then a short PPO of 135 million parameters beside TRL: three
# minutes at most. Needs an NVIDIA GPU, jax with its CUDA plugin, flax and optax; for the peers torch, transformers and
# trl 1.12. Flags that are given come last, and so they hold, for both.
cd "$(dirname "$0")/../.." || exit 2
failed=0
"${PYTHON:-python3}" -m benchmarks.decode --rows full --model llama3.2-1b --batches 64 --prompt 1024 --new 256 --peers transformers --rounds 3 --row_limits 62 "$@" || failed=1
"${PYTHON:-python3}" -m benchmarks.ppo --rows full --model 135m --batch 64 --prompt 64 --new 128 --rounds 2 --row_limits 72 "$@" || failed=1
exit $failed
