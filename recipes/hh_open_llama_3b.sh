#!/bin/sh
# Train a reward model of Open LLaMA 3B on HH-RLHF's helpful part, after SFT, on 8 GPUs.
#
#   hardware  8 A100 or H100 in one machine, without SLURM: one process takes them all
#   start     python -m weights.convert --read=path/to/open_llama_3b --run=runs/open-llama-3b
#   data      hf download Anthropic/hh-rlhf --repo-type=dataset --local-dir=runs/hh-rlhf
#   batch     SFT 64 rows of 512 tokens, packed; reward model 64 comparisons of at most 512
#   rate      SFT 2e-5, reward model 5e-6, linear to 0
#   steps     SFT on the chosen responses 1,400, some two passes; data/epoch in metrics.jsonl tells.
#             Reward model 1,700, about one pass
#   differs   what is longer than 512 tokens is cut on the left, not left out; the authors' rows of
#             SFT have 1,024 tokens; their reward model trains on the first 6,275 test rows too and
#             is judged by the others; their batches are not known
#   remat     full
#   mesh      fsdp 8
#   aims at   0.755 of the helpful part's last 6,226 test pairs (Dong et al. 2023, RAFT, arXiv
#             2304.06767; card of weqweasdas/hh_rlhf_rm_open_llama_3b)
#   not run   at full size
#   plan      .venv/bin/python plan.py train_sft --model.vocab=32000 --model.width=3200 \
#               --model.mlp_width=8640 --model.layers=26 --model.heads=32 --model.kv_heads=32 \
#               --model.head_dim=100 --model.context=2048 --model.tied=False --model.remat=full \
#               --topology=a100:8 --mesh.fsdp=8 --batch_size=64 --microbatches=1 --length=512
#   plan      .venv/bin/python plan.py train_rm --model.vocab=32000 --model.width=3200 \
#               --model.mlp_width=8640 --model.layers=26 --model.heads=32 --model.kv_heads=32 \
#               --model.head_dim=100 --model.context=2048 --model.tied=False --model.remat=full \
#               --topology=a100:8 --mesh.fsdp=8 --batch_size=64 --microbatches=1 --length=512

set -eu
PYTHON=${PYTHON:-.venv/bin/python}
INIT=${INIT:-runs/open-llama-3b}
DATA=${DATA:-'runs/hh-rlhf/helpful-*/train.jsonl.gz'}
HELD_OUT=${HELD_OUT:-'runs/hh-rlhf/helpful-*/test.jsonl.gz'}
RUN=${RUN:-runs/hh}

sh recipes/until_done.sh "$PYTHON" train_sft.py \
  --init="$INIT" \
  --data="$DATA" \
  --run="$RUN-sft" \
  --on_bad_row=skip \
  --steps=1400 \
  --batch_size=64 \
  --length=512 \
  --microbatches=1 \
  --model.remat=full \
  --optimizer.lr=2e-5 \
  --optimizer.schedule=linear \
  --optimizer.warmup=0 \
  --optimizer.final_lr=0 \
  --optimizer.beta2=0.999 \
  --optimizer.weight_decay=0 \
  --mesh.fsdp=8 \
  --eval_every=200 \
  --save_every=200

sh recipes/until_done.sh "$PYTHON" train_rm.py \
  --init="$RUN-sft" \
  --data="$DATA" \
  --eval_data="$HELD_OUT" \
  --run="$RUN-rm" \
  --on_bad_row=skip \
  --steps=1700 \
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
  --eval_every=850 \
  --eval_records=10000 \
  --save_every=500
