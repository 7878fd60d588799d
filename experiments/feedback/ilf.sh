#!/bin/sh
# One seed of the study of refinements, from a run of `make align`: sh experiments/feedback/ilf.sh ALIGN SEED OUT [PYTHON].
set -e
align=$1 seed=$2 r=$3 python=${4:-.venv/bin/python}
mkdir -p $r
for n in 1 4; do  # revisions, of which the reward model picks one
    [ $n = 1 ] && pick="" || pick="--reward=$align/rm"
    test -s $r/of$n.jsonl || $python -m collect.feedback --write=revisions --init=$align/sft --samples=$n --rounds=1 $pick --prompts=6000 --out=$r/of$n.jsonl --seed=$seed
    $python train_sft.py --init=$align/sft --data=$r/of$n.jsonl --steps=300 --optimizer.lr=1e-3 --eval_every=0 --run=$r/of$n --seed=$seed
done
$python -m experiments.policies --runs $align/sft $r/of1 $r/of4 --out=$r/summary.json --seed=$((1000 + seed))
