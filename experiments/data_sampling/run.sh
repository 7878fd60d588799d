#!/bin/sh
# The whole study: its SFT model (some 10 minutes on two cores), learning rates, runs, verdicts.
# What is there is not made again. About 0.3 million parameters.
set -e
WORK=${1:-runs/data_sampling}
PYTHON=.venv/bin/python
SHAPE="--model.width=64 --model.mlp_width=224 --model.head_dim=16"

$PYTHON train_lm.py --run=$WORK/lm $SHAPE
$PYTHON train_sft.py --init=$WORK/lm --run=$WORK/sft
test -s experiments/data_sampling/pilot.jsonl || $PYTHON -m experiments.data_sampling.pilot --study.init=$WORK/sft --study.work=$WORK
$PYTHON -m experiments.data_sampling.runs --init=$WORK/sft --work=$WORK
test -s experiments/data_sampling/chosen.jsonl || $PYTHON -m experiments.data_sampling.chosen --study.init=$WORK/sft --study.work=$WORK
$PYTHON -m experiments.data_sampling.verdicts
