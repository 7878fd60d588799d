#!/bin/sh
# One seed of the study, from a run of `make align`: sh experiments/spin/run.sh ALIGN SEED OUT [PYTHON].
set -e
align=$1 seed=$2 r=$3 python=${4:-.venv/bin/python}
policy=$align/sft
for round in 1 2; do
    test -s $r/$round.jsonl || $python -m collect.spin --init=$policy --prompts=8000 --out=$r/$round.jsonl --seed=$((100 * round + seed))
    $python train_dpo.py --init=$policy --data=$r/$round.jsonl --length=48 --beta=0.5 --optimizer.lr=3e-4 --steps=240 --eval_every=0 --run=$r/round$round --seed=$seed
    policy=$r/round$round
done
$python -m experiments.policies --runs $align/sft $r/round1 $r/round2 --out=$r/summary.json --seed=$((1000 + seed))
