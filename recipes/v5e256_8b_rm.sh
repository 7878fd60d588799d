#!/bin/sh
# Train a reward model of Llama 3 8B Instruct on 700,000 comparisons, on 256 TPUs.
#
#   hardware  TPU v5e-256; every host runs this script
#   hosts     all see the folder of runs: RUNS=/mnt/runs sh recipes/v5e256_8b_rm.sh
#   start     python -m weights.convert --read=path/to/Meta-Llama-3-8B-Instruct \
#               --run=$RUNS/llama3-8b-instruct
#   batch     256 comparisons of at most 2,048 tokens; the paper's: 512 of 4,096
#   rate      2e-6, cosine after 3 % of warm-up
#   steps     2,730, about one pass
#   remat     full
#   mesh      fsdp 64 x tensor 4
#   aims at   RewardBench: chat 99.4, chat hard 65.1, safety 87.8, reasoning 86.4:
#             FsfairX-LLaMA3-RM (Dong et al. 2024, arXiv 2405.07863, table 1)
#   not run   at full size
#   plan      .venv/bin/python plan.py train_rm --model.preset=llama3-8b --topology=v5e:16x16 \
#               --mesh.fsdp=64 --mesh.tensor=4 --batch_size=256 --length=2048

set -eu
PYTHON=${PYTHON:-.venv/bin/python}
RUNS=${RUNS:?name a folder that all hosts see}
INIT=${INIT:-$RUNS/llama3-8b-instruct}
DATA=${DATA:-hf:hendrydong/preference_700K}
RUN=${RUN:-$RUNS/llama3-8b-rm}

sh recipes/until_done.sh "$PYTHON" train_rm.py \
  --init="$INIT" \
  --data="$DATA" \
  --run="$RUN" \
  --on_bad_row=skip \
  --steps=2730 \
  --batch_size=256 \
  --length=2048 \
  --microbatches=1 \
  --model.remat=full \
  --model.dtype=bfloat16 \
  --optimizer.lr=2e-6 \
  --optimizer.schedule=cosine \
  --optimizer.warmup=82 \
  --optimizer.final_lr=0 \
  --optimizer.beta2=0.999 \
  --optimizer.weight_decay=0.001 \
  --mesh.fsdp=64 \
  --mesh.tensor=4 \
  --eval_every=500 \
  --save_every=250
