#!/bin/sh
# ALiBi beside RoPE: the same script, data, steps and seed; only the first folder on Python's path differs.
#   sh experiments/alibi/run.sh SEED
set -e
export PYTHONSAFEPATH=1
python=${PYTHON:-.venv/bin/python}
seed=${1:-0}
for model in rope alibi; do
    path=.
    [ $model = alibi ] && path=experiments/alibi:.
    run=runs/alibi/$model-$seed
    PYTHONPATH=$path $python train_lm.py --length=32 --batch_size=64 --steps=600 --eval_every=600 --seed=$seed --run=$run
    PYTHONPATH=$path $python experiments/alibi/measure.py --run=$run
done
