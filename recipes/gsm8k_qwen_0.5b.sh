#!/bin/sh
# Train adapters of Qwen 2.5 0.5B Instruct by GRPO on checked answers to GSM8K, on 8 GPUs.
#
#   hardware  8 A100 or H100 in one machine, without SLURM: one process takes them all
#   start     python -m weights.convert --read=path/to/Qwen2.5-0.5B-Instruct --run=runs/qwen2.5-0.5b
#   batch     320 rollouts, 5 for each of 64 prompts, at most 512 + 1,024 tokens; one update
#   rate      3e-5, constant; LoRA of rank 32; beta 0.001 in the loss, a mean over all tokens
#   steps     111 iterations, about one pass
#   differs   the questions stand alone, and the last number is the answer. verl's rows ask for
#             "####" before it: its examples/data_preprocess/gsm8k.py writes them, and
#             DATA=path/to/train.parquet reads them. verl's bonus for entropy, 0.001 in the loss,
#             is left out
#   remat     full
#   mesh      data 8
#   aims at   GSM8K 54.3 by GRPO with LoRA (verl's documentation, algorithm baselines, and the log
#             that it links)
#   not run   at full size
#   plan      .venv/bin/python plan.py train_grpo --model.vocab=151936 --model.width=896 \
#               --model.mlp_width=4864 --model.layers=24 --model.heads=14 --model.kv_heads=2 \
#               --model.head_dim=64 --model.context=32768 --model.qkv_bias=True \
#               --model.remat=full --lora.rank=32 --lora.alpha=32 --topology=a100:8 \
#               --mesh.data=8 --batch_size=320 --samples_per_prompt=5 --minibatches=1 \
#               --microbatches=4 --epochs=1 --max_prompt=512 --max_new_tokens=1024 \
#               --reward=tasks.answers:number

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
  --steps=111 \
  --batch_size=320 \
  --samples_per_prompt=5 \
  --minibatches=1 \
  --microbatches=4 \
  --epochs=1 \
  --max_prompt=512 \
  --max_new_tokens=1024 \
  --temperature=1.0 \
  --kl_coef=0.001 \
  --kl_in=loss \
  --kl_estimator=k3 \
  --average=tokens \
  --unbiased_std=True \
  --clip=0.2 \
  --clip_high=0.2 \
  --missing_eos=none \
  --lora.rank=32 \
  --lora.alpha=32 \
  --model.remat=full \
  --optimizer.lr=3e-5 \
  --optimizer.schedule=constant \
  --optimizer.beta2=0.999 \
  --optimizer.eps=1e-8 \
  --optimizer.weight_decay=0.01 \
  --mesh.data=8 \
  --save_every=20
