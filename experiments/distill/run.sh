#!/bin/sh
# One seed of the study, from a run of `make align`: sh experiments/distill/run.sh ALIGN SEED OUT [PYTHON].
set -e
align=$1 seed=$2 r=$3 python=${4:-.venv/bin/python}
student="--model.layers=2 --steps=900 --eval_every=0 --seed=$seed"
$python train_sft.py --tokenizer=$align/sft $student --run=$r/sft
$python train_distill.py --teacher=$align/ppo $student --run=$r/distilled
$python -m experiments.policies --runs $align/ppo $r/sft $r/distilled --out=$r/summary.json --seed=$((1000 + seed))
