#!/bin/sh
# Train Tulu 3 8B DPO by PPO on checked answers to GSM8K, on 256 TPUs.
#
#   hardware  TPU v5e-256; every host runs this script
#   hosts     all see the folder of runs: RUNS=/mnt/runs sh recipes/v5e256_8b_ppo.sh
#   start     python -m weights.convert --read=path/to/Llama-3.1-Tulu-3-8B-DPO \
#               --run=$RUNS/tulu3-8b-dpo
#   batch     256 rollouts of at most 1,024 + 512 tokens, one update on all of them, in 2
#             micro-batches, four passes; the paper's 224 do not divide by 64. Eight worked
#             examples stand before each question
#   rate      3e-7, linear to 0; beta 0.05; a right answer scores 10, a response without an end
#             -10
#   steps     390 iterations, 100,000 rollouts, about 14 passes
#   differs   the paper's data has MATH and IFEval too, its lengths are 2,048 + 2,048, and its
#             critic starts from a reward model; open-instruct's command plans 10 million rollouts,
#             of which an early checkpoint was kept
#   remat     full
#   mesh      fsdp 64 x tensor 4; tensor 8 while sampling
#   aims at   GSM8K 87.6, from 84.3: Tulu 3 8B (Lambert et al. 2024, arXiv 2411.15124)
#   not run   at full size
#   plan      .venv/bin/python plan.py train_ppo --model.preset=llama3-8b --topology=v5e:16x16 \
#               --mesh.fsdp=64 --mesh.tensor=4 --rollout.tensor=8 --batch_size=256 \
#               --minibatches=1 --microbatches=2 --epochs=4 --max_prompt=1024 \
#               --max_new_tokens=512 --reward=tasks.answers:number

set -eu
PYTHON=${PYTHON:-.venv/bin/python}
RUNS=${RUNS:?name a folder that all hosts see}
INIT=${INIT:-$RUNS/tulu3-8b-dpo}
DATA=${DATA:-hf:allenai/RLVR-GSM}
RUN=${RUN:-$RUNS/tulu3-8b-ppo}

sh recipes/until_done.sh "$PYTHON" train_ppo.py \
  --init="$INIT" \
  --data="$DATA" \
  --run="$RUN" \
  --reward=tasks.answers:number \
  --combine=weighted \
  --weights=10 \
  --steps=390 \
  --batch_size=256 \
  --minibatches=1 \
  --microbatches=2 \
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
  --mesh.fsdp=64 \
  --mesh.tensor=4 \
  --rollout.tensor=8 \
  --save_every=40
