#!/bin/sh
# Train Tulu 3 8B DPO by PPO on checked answers to GSM8K, on 8 GPUs.
#
#   hardware  8 H100 or H200 in one machine, without SLURM: one process takes them all
#   start     python -m weights.convert --read=path/to/Llama-3.1-Tulu-3-8B-DPO \
#               --run=runs/tulu3-8b-dpo
#   batch     224 rollouts, the paper's, of at most 1,024 + 512 tokens, one update on all of them,
#             in 14 micro-batches, four passes. Eight worked examples stand before each question
#   rate      3e-7, linear to 0; beta 0.05; a right answer scores 10, a response without an end
#             -10
#   steps     446 iterations, 100,000 rollouts, about 14 passes
#   differs   the paper's data has MATH and IFEval too, its lengths are 2,048 + 2,048, and its
#             critic starts from a reward model; open-instruct's command plans 10 million rollouts,
#             of which an early checkpoint was kept
#   remat     full
#   mesh      fsdp 8; decoding weights over tensor 8
#   aims at   GSM8K 87.6, from 84.3: Tulu 3 8B (Lambert et al. 2024, arXiv 2411.15124)
#   not run   at full size
#   plan      .venv/bin/python plan.py train_ppo --model.preset=llama3-8b --topology=h100:8 \
#               --mesh.fsdp=8 --rollout.tensor=8 --batch_size=224 \
#               --minibatches=1 --microbatches=14 --epochs=4 --max_prompt=1024 \
#               --max_new_tokens=512 --reward=tasks.answers:number

set -eu
PYTHON=${PYTHON:-.venv/bin/python}
INIT=${INIT:-runs/tulu3-8b-dpo}
DATA=${DATA:-hf:allenai/RLVR-GSM}
RUN=${RUN:-runs/tulu3-8b-ppo}

sh recipes/until_done.sh "$PYTHON" train_ppo.py \
  --init="$INIT" \
  --data="$DATA" \
  --run="$RUN" \
  --reward=tasks.answers:number \
  --combine=weighted \
  --weights=10 \
  --steps=446 \
  --batch_size=224 \
  --minibatches=1 \
  --microbatches=14 \
  --epochs=4 \
  --max_prompt=1024 \
  --max_new_tokens=512 \
  --temperature=1.0 \
  --kl_coef=0.05 \
  --missing_eos=replace \
  --missing_eos_score=-10 \
  --score_at=after \
  --whiten_unbiased=True \
  --gamma=1.0 \
  --gae_lambda=0.95 \
  --clip=0.2 \
  --value_clip=0.2 \
  --model.remat=full \
  --model.dtype=bfloat16 \
  --optimizer.lr=3e-7 \
  --optimizer.schedule=linear \
  --optimizer.final_lr=0 \
  --optimizer.eps=1e-8 \
  --optimizer.weight_decay=0.01 \
  --value_optimizer.lr=3e-7 \
  --value_optimizer.schedule=linear \
  --value_optimizer.final_lr=0 \
  --value_optimizer.eps=1e-8 \
  --value_optimizer.weight_decay=0.01 \
  --mesh.fsdp=8 \
  --rollout.tensor=8 \
  --save_every=40
