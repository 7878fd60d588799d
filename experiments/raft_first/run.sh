#!/bin/sh
# One seed of the study, from a run of `make align`: sh experiments/raft_first/run.sh ALIGN SEED OUT [PYTHON].
set -e
align=$1 seed=$2 r=$3 python=${4:-.venv/bin/python}
$python train_raft.py --init=$align/sft --reward=$align/rm --steps=20 --eval_every=1 --run=$r/raft --seed=$seed
for start in $align/sft $r/raft; do
    $python train_ppo.py --init=$start --reward=$align/rm --eval_every=2 --run=$r/from_$(basename $start) --seed=$seed
done
$python -m experiments.raft_first.measure --run=$r
$python -m experiments.policies --runs $align/sft $r/raft $r/from_sft $r/from_raft --out=$r/policies.json --seed=$((1000 + seed))
