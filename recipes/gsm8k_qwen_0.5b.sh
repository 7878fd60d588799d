#!/bin/sh
# Train Qwen 2.5 0.5B Instruct by GRPO on checked answers to GSM8K, on 8 GPUs.
#
#   hardware  8 A100 or H100 in one machine, without SLURM: one process takes them all
#   start     python -m weights.convert --read=path/to/Qwen2.5-0.5B-Instruct --run=runs/qwen2.5-0.5b
#   batch     1,024 rollouts, 8 for each of 128 prompts, at most 512 + 512 tokens; four updates
#   rate      1e-6, constant; beta 0.001 in the loss
#   steps     870 iterations, 15 passes
#   remat     full
#   mesh      data 8
#   aims at   GSM8K 54.3 by GRPO with LoRA, 56.7 by PPO, from 36.4 (verl's documentation, algorithm
#             baselines)
#   not run   at full size
#   plan      .venv/bin/python plan.py train_grpo --model.vocab=151936 --model.width=896 \
#               --model.mlp_width=4864 --model.layers=24 --model.heads=14 --model.kv_heads=2 \
#               --model.head_dim=64 --model.context=32768 --model.qkv_bias=True \
#               --model.remat=full --topology=a100:8 --mesh.data=8 --batch_size=1024 \
#               --samples_per_prompt=8 --minibatches=4 --microbatches=4 --epochs=1 \
#               --max_prompt=512 --max_new_tokens=512 --reward=tasks.answers:number

set -eu
PYTHON=${PYTHON:-.venv/bin/python}
INIT=${INIT:-runs/qwen2.5-0.5b}
DATA=${DATA:-hf:openai/gsm8k:main}
RUN=${RUN:-runs/gsm8k}

sh recipes/until_done.sh "$PYTHON" train_grpo.py \
  --init="$INIT" \
  --data="$DATA" \
  --run="$RUN" \
  --method=grpo \
  --reward=tasks.answers:number \
  --steps=870 \
  --batch_size=1024 \
  --samples_per_prompt=8 \
  --minibatches=4 \
  --microbatches=4 \
  --epochs=1 \
  --max_prompt=512 \
  --max_new_tokens=512 \
  --temperature=1.0 \
  --kl_coef=0.001 \
  --kl_in=loss \
  --kl_estimator=k3 \
  --clip=0.2 \
  --clip_high=0.2 \
  --missing_eos=replace \
  --missing_eos_score=0 \
  --model.remat=full \
  --optimizer.lr=1e-6 \
  --optimizer.schedule=constant \
  --mesh.data=8 \
  --save_every=50
