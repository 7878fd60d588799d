#!/bin/sh
# One seed of the study, from a run of `make align`: sh experiments/rounds/run.sh ALIGN SEED OUT [PYTHON].
set -e
align=$1 seed=$2 r=$3 python=${4:-.venv/bin/python}
settings="--init=$align/round1/rm --eval_data=$align/held_out.jsonl --demonstrations=world --lm_coef=0.5 --seed=$seed"
test -s $r/pairs.jsonl || $python -m collect.rank --init=$align/round1/ppo --out=$r/pairs.jsonl --split=heldout --prompts=500 --pairs --seed=$seed
$python train_rm.py $settings --data=$align/round1/ppo.jsonl --run=$r/rm
$python -m experiments.rounds.measure --align=$align --run=$r
