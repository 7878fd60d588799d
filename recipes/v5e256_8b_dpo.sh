#!/bin/sh
# Align an SFT model of Llama 3 8B by DPO on UltraFeedback, on 256 TPUs.
#
#   hardware  TPU v5e-256; every host runs this script
#   hosts     all see the folder of runs: RUNS=/mnt/runs sh recipes/v5e256_8b_dpo.sh
#   start     python -m weights.convert --read=path/to/Llama-3-Base-8B-SFT \
#               --run=$RUNS/llama3-8b-sft
#             It is princeton-nlp's, as the paper's. Write "eos_token_id": [128001, 128009] into its
#             generation_config.json first: its template ends a turn with 128009, which the file
#             does not name, and is refused without
#   batch     256 comparisons of at most 1,024 tokens; the paper's: 128 of 2,048
#   rate      5e-7, cosine after 10 % of warm-up; beta 0.01
#   steps     238, about one pass
#   remat     full
#   mesh      fsdp 64 x tensor 4
#   aims at   AlpacaEval 2 LC 18.2, Arena-Hard 15.9: DPO in SimPO's table (Meng et al. 2024, arXiv
#             2405.14734)
#   not run   at full size
#   plan      .venv/bin/python plan.py train_dpo --model.preset=llama3-8b --topology=v5e:16x16 \
#               --mesh.fsdp=64 --mesh.tensor=4 --batch_size=256 --length=1024

set -eu
PYTHON=${PYTHON:-.venv/bin/python}
RUNS=${RUNS:?name a folder that all hosts see}
INIT=${INIT:-$RUNS/llama3-8b-sft}
DATA=${DATA:-hf:HuggingFaceH4/ultrafeedback_binarized@train_prefs}
RUN=${RUN:-$RUNS/llama3-8b-dpo}

sh recipes/until_done.sh "$PYTHON" train_dpo.py \
  --init="$INIT" \
  --data="$DATA" \
  --run="$RUN" \
  --on_bad_row=skip \
  --loss=dpo \
  --beta=0.01 \
  --reference=cached \
  --steps=238 \
  --batch_size=256 \
  --length=1024 \
  --microbatches=1 \
  --model.remat=full \
  --model.dtype=bfloat16 \
  --optimizer.lr=5e-7 \
  --optimizer.schedule=cosine \
  --optimizer.warmup=24 \
  --optimizer.final_lr=0 \
  --optimizer.beta2=0.999 \
  --optimizer.weight_decay=0 \
  --mesh.fsdp=64 \
  --mesh.tensor=4 \
  --eval_every=100 \
  --save_every=100
