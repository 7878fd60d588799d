#!/bin/sh
# Fine-tune Llama 3.1 8B on the conversations of Tulu 3, on 256 TPUs.
#
#   hardware  TPU v5e-256; every host runs this script
#   hosts     all see the folder of runs: RUNS=/mnt/runs sh recipes/v5e256_8b_sft.sh
#   start     Write the chat_template of allenai/Llama-3.1-Tulu-3-8B-SFT's tokenizer_config.json
#             to path/to/Llama-3.1-8B/chat_template.jinja first: a base has none. Then
#             python -m weights.convert --read=path/to/Llama-3.1-8B --run=$RUNS/llama3.1-8b
#   batch     64 rows of 2,048 tokens, packed, one for each shard. They hold somewhat more tokens
#             than the paper's 128 conversations of at most 4,096, a row each
#   rate      5e-6, linear to 0 after 3 % of warm-up, as the paper's
#   steps     9,200, about two passes; data/epoch in metrics.jsonl tells
#   remat     full
#   mesh      fsdp 64 x tensor 4
#   aims at   GSM8K 76.2, average of twelve 60.6: Tulu 3 8B SFT (Lambert et al. 2024, arXiv
#             2411.15124, table 6)
#   not run   at full size
#   plan      .venv/bin/python plan.py train_sft --model.preset=llama3-8b --topology=v5e:16x16 \
#               --mesh.fsdp=64 --mesh.tensor=4 --batch_size=64 --length=2048

set -eu
PYTHON=${PYTHON:-.venv/bin/python}
RUNS=${RUNS:?name a folder that all hosts see}
INIT=${INIT:-$RUNS/llama3.1-8b}
DATA=${DATA:-hf:allenai/tulu-3-sft-mixture}
RUN=${RUN:-$RUNS/tulu3-8b-sft}

sh recipes/until_done.sh "$PYTHON" train_sft.py \
  --init="$INIT" \
  --data="$DATA" \
  --run="$RUN" \
  --on_bad_row=skip \
  --steps=9200 \
  --batch_size=64 \
  --length=2048 \
  --microbatches=1 \
  --model.remat=full \
  --model.dtype=bfloat16 \
  --optimizer.lr=5e-6 \
  --optimizer.schedule=linear \
  --optimizer.warmup=276 \
  --optimizer.final_lr=0 \
  --optimizer.beta2=0.999 \
  --optimizer.weight_decay=0 \
  --mesh.fsdp=64 \
  --mesh.tensor=4 \
  --eval_every=1000 \
  --save_every=500
