#!/bin/sh
# Align an SFT model of Llama 3 8B by DPO on UltraFeedback, on 8 GPUs.
#
#   hardware  8 H100 or H200 in one machine, without SLURM: one process takes them all
#   start     python -m weights.convert --read=path/to/Llama-3-Base-8B-SFT \
#               --run=runs/llama3-8b-sft
#             It is princeton-nlp's, as the paper's. Write "eos_token_id": [128001, 128009] into its
#             generation_config.json first: its template ends a turn with 128009, which the file
#             does not name, and is refused without
#   batch     128 comparisons of at most 2,048 tokens, in 8 micro-batches
#   rate      5e-7, cosine after 10 % of warm-up; beta 0.01
#   steps     477, about one pass
#   remat     full
#   mesh      fsdp 8
#   aims at   AlpacaEval 2 LC 18.2, Arena-Hard 15.9: DPO in SimPO's table (Meng et al. 2024, arXiv
#             2405.14734)
#   not run   at full size
#   plan      .venv/bin/python plan.py train_dpo --model.preset=llama3-8b --topology=h100:8 \
#               --mesh.fsdp=8 --batch_size=128 --microbatches=8 --length=2048

set -eu
PYTHON=${PYTHON:-.venv/bin/python}
INIT=${INIT:-runs/llama3-8b-sft}
DATA=${DATA:-hf:HuggingFaceH4/ultrafeedback_binarized@train_prefs}
RUN=${RUN:-runs/llama3-8b-dpo}

sh recipes/until_done.sh "$PYTHON" train_dpo.py \
  --init="$INIT" \
  --data="$DATA" \
  --run="$RUN" \
  --on_bad_row=skip \
  --loss=dpo \
  --beta=0.01 \
  --reference=cached \
  --steps=477 \
  --batch_size=128 \
  --length=2048 \
  --microbatches=8 \
  --model.remat=full \
  --model.dtype=bfloat16 \
  --optimizer.lr=5e-7 \
  --optimizer.schedule=cosine \
  --optimizer.warmup=48 \
  --optimizer.final_lr=0 \
  --optimizer.beta2=0.999 \
  --optimizer.weight_decay=0 \
  --mesh.fsdp=8 \
  --eval_every=100 \
  --save_every=100
