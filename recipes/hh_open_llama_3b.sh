#!/bin/sh
# Train a reward model of Open LLaMA 3B on HH-RLHF, on 8 GPUs.
#
#   hardware  8 A100 or H100 in one machine, without SLURM: one process takes them all
#   start     python -m weights.convert --read=path/to/open_llama_3b --run=runs/open-llama-3b
#   batch     64 comparisons of at most 512 tokens
#   rate      5e-6, linear to 0
#   steps     2,500, one pass. The authors fine-tune on the chosen responses first, for two passes
#             at 2e-5, and leave out the harmless part
#   remat     full
#   mesh      fsdp 8
#   aims at   0.755 of held-out pairs of the helpful part (Dong et al. 2023, RAFT, arXiv 2304.06767;
#             card of weqweasdas/hh_rlhf_rm_open_llama_3b)
#   not run   at full size
#   plan      .venv/bin/python plan.py train_rm --model.vocab=32000 --model.width=3200 \
#               --model.mlp_width=8640 --model.layers=26 --model.heads=32 --model.kv_heads=32 \
#               --model.head_dim=100 --model.context=2048 --model.tied=False --model.remat=full \
#               --topology=a100:8 --mesh.fsdp=8 --batch_size=64 --microbatches=1 --length=512

set -eu
PYTHON=${PYTHON:-.venv/bin/python}
INIT=${INIT:-runs/open-llama-3b}
DATA=${DATA:-hf:Anthropic/hh-rlhf}
RUN=${RUN:-runs/hh-rm}

sh recipes/until_done.sh "$PYTHON" train_rm.py \
  --init="$INIT" \
  --data="$DATA" \
  --run="$RUN" \
  --on_bad_row=skip \
  --steps=2500 \
  --batch_size=64 \
  --length=512 \
  --microbatches=1 \
  --model.remat=full \
  --optimizer.lr=5e-6 \
  --optimizer.schedule=linear \
  --optimizer.warmup=0 \
  --optimizer.final_lr=0 \
  --optimizer.beta2=0.999 \
  --optimizer.weight_decay=0 \
  --mesh.fsdp=8 \
  --eval_every=500 \
  --save_every=500
