#!/bin/sh
# Expert iteration with a process model's search, after run.sh: sh experiments/arithmetic/search.sh SEED [PYTHON].
set -e
seed=$1 python=${2:-.venv/bin/python} r=runs/arithmetic$1
policy=$r/sft
for round in 1 2 3; do
    test -s $r/search$round.jsonl || $python -m decoding.step_beam --policy=$policy --model=$r/gold --beams=2 --branch=4 --split=train --prompts=500 --solutions=$r/search$round.jsonl --seed=$((100 * round + seed))
    $python train_sft.py --init=$policy --data=$r/search$round.jsonl --steps=200 --optimizer.lr=5e-4 --eval_every=0 --run=$r/search$round --seed=$seed
    policy=$r/search$round
    $python -m decoding.rerank --policy=$policy --models $r/gold --n=1 --out=$policy.json --seed=$seed
done
