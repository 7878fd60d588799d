#!/bin/sh
# Train a reward model of Llama 3 8B Instruct on 700,000 comparisons, on 8 GPUs.
#
#   hardware  8 H100 or H200 in one machine, without SLURM: one process takes them all
#   start     python -m weights.convert --read=path/to/Meta-Llama-3-8B-Instruct \
#               --run=runs/llama3-8b-instruct
#   batch     512 comparisons of at most 2,048 tokens, in 16 micro-batches; the paper's lengths go
#             up to 4,096
#   rate      2e-6, cosine after 3 % of warm-up
#   steps     1,365, about one pass
#   remat     full
#   mesh      fsdp 8
#   aims at   RewardBench: chat 99.4, chat hard 65.1, safety 87.8, reasoning 86.4:
#             FsfairX-LLaMA3-RM (Dong et al. 2024, arXiv 2405.07863, table 1)
#   not run   at full size
#   plan      .venv/bin/python plan.py train_rm --model.preset=llama3-8b --topology=h100:8 \
#               --mesh.fsdp=8 --batch_size=512 --microbatches=16 --length=2048

set -eu
PYTHON=${PYTHON:-.venv/bin/python}
INIT=${INIT:-runs/llama3-8b-instruct}
DATA=${DATA:-hf:hendrydong/preference_700K}
RUN=${RUN:-runs/llama3-8b-rm}

sh recipes/until_done.sh "$PYTHON" train_rm.py \
  --init="$INIT" \
  --data="$DATA" \
  --run="$RUN" \
  --on_bad_row=skip \
  --steps=1365 \
  --batch_size=512 \
  --length=2048 \
  --microbatches=16 \
  --model.remat=full \
  --model.dtype=bfloat16 \
  --optimizer.lr=2e-6 \
  --optimizer.schedule=cosine \
  --optimizer.warmup=41 \
  --optimizer.final_lr=0 \
  --optimizer.beta2=0.999 \
  --optimizer.weight_decay=0.001 \
  --mesh.fsdp=8 \
  --eval_every=500 \
  --save_every=250
