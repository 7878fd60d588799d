#!/bin/sh
# Fine-tune Llama 3.1 70B on the conversations of Tulu 3, on 512 TPUs.
#
#   hardware  TPU v5p, 512 chips as 8 x 8 x 8 (v5p-1024 to Google Cloud, which counts cores); every
#             host runs this script
#   start     python -m weights.convert --read=path/to/Llama-3.1-70B --run=runs/llama3.1-70b
#   batch     512 rows of 4,096 tokens, packed
#   rate      2e-6, linear to 0 after 18 steps of warm-up, as the paper's
#   steps     600, some two passes; data/epoch in metrics.jsonl tells. The paper's batch is 128
#             conversations, unpacked
#   remat     full
#   mesh      fsdp 128 x tensor 4
#   aims at   GSM8K 91.1, average of twelve 72.6: Tulu 3 70B SFT (Lambert et al. 2024, arXiv
#             2411.15124)
#   not run   at full size
#   plan      .venv/bin/python plan.py train_sft --model.preset=llama3-70b --topology=v5p:8x8x8 \
#               --mesh.fsdp=128 --mesh.tensor=4 --batch_size=512 --length=4096

set -eu
PYTHON=${PYTHON:-.venv/bin/python}
INIT=${INIT:-runs/llama3.1-70b}
DATA=${DATA:-hf:allenai/tulu-3-sft-mixture}
RUN=${RUN:-runs/tulu3-70b-sft}

sh recipes/until_done.sh "$PYTHON" train_sft.py \
  --init="$INIT" \
  --data="$DATA" \
  --run="$RUN" \
  --on_bad_row=skip \
  --steps=600 \
  --batch_size=512 \
  --length=4096 \
  --microbatches=1 \
  --model.remat=full \
  --model.dtype=bfloat16 \
  --optimizer.lr=2e-6 \
  --optimizer.schedule=linear \
  --optimizer.warmup=18 \
  --optimizer.final_lr=0 \
  --optimizer.beta2=0.999 \
  --optimizer.weight_decay=0 \
  --mesh.fsdp=128 \
  --mesh.tensor=4 \
  --eval_every=100 \
  --save_every=50
