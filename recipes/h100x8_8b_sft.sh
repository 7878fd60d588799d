#!/bin/sh
# Fine-tune Llama 3.1 8B on the conversations of Tulu 3, on 8 GPUs.
#
#   hardware  8 H100 or H200 in one machine, without SLURM: one process takes them all
#   start     Write the chat_template of allenai/Llama-3.1-Tulu-3-8B-SFT's tokenizer_config.json
#             to path/to/Llama-3.1-8B/chat_template.jinja first: a base has none. Then
#             python -m weights.convert --read=path/to/Llama-3.1-8B --run=runs/llama3.1-8b
#   batch     24 rows of 4,096 tokens, packed, which hold about as many tokens as the paper's 128
#             conversations, a row each
#   rate      5e-6, linear to 0 after 3 % of warm-up, as the paper's
#   steps     12,300, about two passes; data/epoch in metrics.jsonl tells
#   remat     full
#   mesh      fsdp 8
#   aims at   GSM8K 76.2, average of twelve 60.6: Tulu 3 8B SFT (Lambert et al. 2024, arXiv
#             2411.15124, table 6)
#   not run   at full size
#   plan      .venv/bin/python plan.py train_sft --model.preset=llama3-8b --topology=h100:8 \
#               --mesh.fsdp=8 --batch_size=24 --microbatches=1 --length=4096

set -eu
PYTHON=${PYTHON:-.venv/bin/python}
INIT=${INIT:-runs/llama3.1-8b}
DATA=${DATA:-hf:allenai/tulu-3-sft-mixture}
RUN=${RUN:-runs/tulu3-8b-sft}

sh recipes/until_done.sh "$PYTHON" train_sft.py \
  --init="$INIT" \
  --data="$DATA" \
  --run="$RUN" \
  --on_bad_row=skip \
  --steps=12300 \
  --batch_size=24 \
  --length=4096 \
  --microbatches=1 \
  --model.remat=full \
  --model.dtype=bfloat16 \
  --optimizer.lr=5e-6 \
  --optimizer.schedule=linear \
  --optimizer.warmup=369 \
  --optimizer.final_lr=0 \
  --optimizer.beta2=0.999 \
  --optimizer.weight_decay=0 \
  --mesh.fsdp=8 \
  --eval_every=1000 \
  --save_every=500
