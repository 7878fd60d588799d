#!/bin/sh
# Fine-tune Llama 3.1 70B on the conversations of Tulu 3, on 512 TPUs.
#
#   hardware  TPU v5p, 512 chips as 8 x 8 x 8 (v5p-1024 to Google Cloud, which counts cores); every
#             host runs this script
#   hosts     all see the folder of runs: RUNS=/mnt/runs sh recipes/v5p512_70b_sft.sh
#   start     Write the chat_template of allenai/Llama-3.1-Tulu-3-70B-SFT's tokenizer_config.json
#             to path/to/Llama-3.1-70B/chat_template.jinja first: a base has none. Then
#             python -m weights.convert --read=path/to/Llama-3.1-70B --run=$RUNS/llama3.1-70b
#   batch     128 rows of 4,096 tokens, packed, one for each shard. They hold about five times the
#             tokens of the paper's 128 conversations, a row each
#   rate      2e-6, linear to 0 after 3 % of warm-up: the paper's, not raised for the larger batch
#   steps     2,400, about two passes; data/epoch in metrics.jsonl tells
#   remat     full
#   mesh      fsdp 128 x tensor 4
#   aims at   GSM8K 91.1, average of twelve 72.6: Tulu 3 70B SFT (Lambert et al. 2024, arXiv
#             2411.15124)
#   not run   at full size
#   plan      .venv/bin/python plan.py train_sft --model.preset=llama3-70b --topology=v5p:8x8x8 \
#               --mesh.fsdp=128 --mesh.tensor=4 --batch_size=128 --length=4096

set -eu
PYTHON=${PYTHON:-.venv/bin/python}
RUNS=${RUNS:?name a folder that all hosts see}
INIT=${INIT:-$RUNS/llama3.1-70b}
DATA=${DATA:-hf:allenai/tulu-3-sft-mixture}
RUN=${RUN:-$RUNS/tulu3-70b-sft}

sh recipes/until_done.sh "$PYTHON" train_sft.py \
  --init="$INIT" \
  --data="$DATA" \
  --run="$RUN" \
  --on_bad_row=skip \
  --steps=2400 \
  --batch_size=128 \
  --length=4096 \
  --microbatches=1 \
  --model.remat=full \
  --model.dtype=bfloat16 \
  --optimizer.lr=2e-6 \
  --optimizer.schedule=linear \
  --optimizer.warmup=72 \
  --optimizer.final_lr=0 \
  --optimizer.beta2=0.999 \
  --optimizer.weight_decay=0 \
  --mesh.fsdp=128 \
  --mesh.tensor=4 \
  --eval_every=400 \
  --save_every=100
