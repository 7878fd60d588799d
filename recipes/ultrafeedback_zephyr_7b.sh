#!/bin/sh
# Reproduce Zephyr 7B: DPO on UltraFeedback from its SFT model, on 8 GPUs.
#
#   hardware  8 H100 in one machine, without SLURM: one process takes them all
#   start     python -m weights.convert --read=path/to/mistral-7b-sft-beta --run=runs/zephyr-sft
#   batch     32 comparisons of at most 1,024 tokens
#   rate      5e-7, linear to 0 after 10 % of warm-up; beta 0.1
#   steps     5,730, about three passes
#   remat     full
#   mesh      fsdp 8
#   aims at   MT-Bench 7.34, AlpacaEval 90.60: Zephyr 7B (Tunstall et al. 2023, arXiv 2310.16944)
#   not run   at full size
#   plan      .venv/bin/python plan.py train_dpo --model.preset=mistral-7b --topology=h100:8 \
#               --mesh.fsdp=8 --batch_size=32 --microbatches=1 --length=1024

set -eu
PYTHON=${PYTHON:-.venv/bin/python}
INIT=${INIT:-runs/zephyr-sft}
DATA=${DATA:-hf:HuggingFaceH4/ultrafeedback_binarized@train_prefs}
RUN=${RUN:-runs/zephyr}

sh recipes/until_done.sh "$PYTHON" train_dpo.py \
  --init="$INIT" \
  --data="$DATA" \
  --run="$RUN" \
  --on_bad_row=skip \
  --loss=dpo \
  --beta=0.1 \
  --reference=cached \
  --steps=5730 \
  --batch_size=32 \
  --length=1024 \
  --microbatches=1 \
  --model.remat=full \
  --optimizer.lr=5e-7 \
  --optimizer.schedule=linear \
  --optimizer.warmup=573 \
  --optimizer.final_lr=0 \
  --optimizer.beta2=0.999 \
  --optimizer.weight_decay=0 \
  --mesh.fsdp=8 \
  --eval_every=500 \
  --save_every=500
