#!/bin/sh
# Train Tulu 3 70B DPO by PPO on checked answers to GSM8K, on 512 TPUs.
#
#   hardware  TPU v5p, 512 chips as 8 x 8 x 8 (v5p-1024 to Google Cloud, which counts cores); every
#             host runs this script
#   hosts     all see the folder of runs: RUNS=/mnt/runs sh recipes/v5p512_70b_ppo.sh
#   start     python -m weights.convert --read=path/to/Llama-3.1-Tulu-3-70B-DPO \
#               --run=$RUNS/tulu3-70b-dpo
#   batch     640 rollouts, the paper's, of at most 1,024 + 512 tokens, one update on all of them,
#             four passes. Eight worked examples stand before each question
#   rate      1e-7, linear to 0 after 10 % of warm-up; beta 0.07; a right answer scores 10, a
#             response without an end -10
#   steps     625 iterations, 400,000 rollouts, about 56 passes: the paper's data is larger
#   differs   the paper's data has MATH and IFEval too, its lengths are 2,048 + 2,048, and its
#             critic starts from a reward model
#   remat     full
#   mesh      fsdp 128 x tensor 4; tensor 8 while sampling
#   aims at   GSM8K 93.5, from 93.5: Tulu 3 70B (Lambert et al. 2024, arXiv 2411.15124)
#   not run   at full size
#   plan      .venv/bin/python plan.py train_ppo --model.preset=llama3-70b --topology=v5p:8x8x8 \
#               --mesh.fsdp=128 --mesh.tensor=4 --rollout.tensor=8 --batch_size=640 \
#               --minibatches=1 --microbatches=1 --epochs=4 --max_prompt=1024 \
#               --max_new_tokens=512 --reward=tasks.answers:number

set -eu
PYTHON=${PYTHON:-.venv/bin/python}
RUNS=${RUNS:?name a folder that all hosts see}
INIT=${INIT:-$RUNS/tulu3-70b-dpo}
DATA=${DATA:-hf:allenai/RLVR-GSM}
RUN=${RUN:-$RUNS/tulu3-70b-ppo}

sh recipes/until_done.sh "$PYTHON" train_ppo.py \
  --init="$INIT" \
  --data="$DATA" \
  --run="$RUN" \
  --reward=tasks.answers:number \
  --combine=weighted \
  --weights=10 \
  --steps=625 \
  --batch_size=640 \
  --minibatches=1 \
  --microbatches=1 \
  --epochs=4 \
  --max_prompt=1024 \
  --max_new_tokens=512 \
  --temperature=1.0 \
  --kl_coef=0.07 \
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
  --optimizer.lr=1e-7 \
  --optimizer.schedule=linear \
  --optimizer.warmup=250 \
  --optimizer.final_lr=0 \
  --optimizer.eps=1e-8 \
  --optimizer.weight_decay=0.01 \
  --value_optimizer.lr=1e-7 \
  --value_optimizer.schedule=linear \
  --value_optimizer.warmup=250 \
  --value_optimizer.final_lr=0 \
  --value_optimizer.eps=1e-8 \
  --value_optimizer.weight_decay=0.01 \
  --mesh.fsdp=128 \
  --mesh.tensor=4 \
  --rollout.tensor=8 \
  --save_every=20
