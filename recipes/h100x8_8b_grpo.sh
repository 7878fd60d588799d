#!/bin/sh
# Train Tulu 3 8B DPO by GRPO on checked answers to GSM8K, on 8 GPUs.
#
#   hardware  8 H100 or H200 in one machine, without SLURM: one process takes them all
#   start     python -m weights.convert --read=path/to/Llama-3.1-Tulu-3-8B-DPO \
#               --run=runs/tulu3-8b-dpo
#   batch     1,024 rollouts, 16 for each of 64 prompts, at most 1,024 + 512 tokens; two updates
#             in 32 micro-batches each. Eight worked examples stand before each question. As in
#             open-instruct's script for one machine, tulu3/grpo_fast_8b_single_node.sh; the model's
#             own run had 48 prompts
#   rate      5e-7, constant; beta 0.01 in the loss
#   steps     1,950 iterations, 2 million rollouts, about 18 passes: the model's data is larger
#   differs   the model's data has MATH and IFEval too, and its lengths are 2,048 + 2,048. A right
#             answer scores 1, not 10, which GRPO's advantages cannot tell
#   remat     full
#   mesh      fsdp 8; decoding weights over tensor 8
#   aims at   GSM8K 90.0: Tulu 3.1 8B (Lambert et al. 2024, arXiv 2411.15124; card of
#             allenai/Llama-3.1-Tulu-3.1-8B)
#   not run   at full size
#   plan      .venv/bin/python plan.py train_grpo --model.preset=llama3-8b --topology=h100:8 \
#               --mesh.fsdp=8 --rollout.tensor=8 --batch_size=1024 \
#               --samples_per_prompt=16 --minibatches=2 --microbatches=32 --epochs=1 \
#               --max_prompt=1024 --max_new_tokens=512 --reward=tasks.answers:number

set -eu
PYTHON=${PYTHON:-.venv/bin/python}
INIT=${INIT:-runs/tulu3-8b-dpo}
DATA=${DATA:-hf:allenai/RLVR-GSM}
RUN=${RUN:-runs/tulu3-8b-grpo}

sh recipes/until_done.sh "$PYTHON" train_grpo.py \
  --init="$INIT" \
  --data="$DATA" \
  --run="$RUN" \
  --method=grpo \
  --reward=tasks.answers:number \
  --steps=1950 \
  --batch_size=1024 \
  --samples_per_prompt=16 \
  --minibatches=2 \
  --microbatches=32 \
  --epochs=1 \
  --max_prompt=1024 \
  --max_new_tokens=512 \
  --temperature=1.0 \
  --kl_coef=0.01 \
  --kl_in=loss \
  --kl_estimator=k3 \
  --average=tokens \
  --unbiased_std=True \
  --clip=0.2 \
  --clip_high=0.2 \
  --missing_eos=replace \
  --missing_eos_score=0 \
  --model.remat=full \
  --model.dtype=bfloat16 \
  --optimizer.lr=5e-7 \
  --optimizer.schedule=constant \
  --optimizer.eps=1e-8 \
  --mesh.fsdp=8 \
  --rollout.tensor=8 \
  --save_every=40
