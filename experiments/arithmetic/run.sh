#!/bin/sh
# One seed of the study: sh experiments/arithmetic/run.sh SEED [PYTHON].
set -e
seed=$1 python=${2:-.venv/bin/python} r=runs/arithmetic$1
$python train_sft.py --data=arithmetic --steps=600 --model.vocab=320 --eval_every=0 --run=$r/sft --seed=$seed
problems=768
for labels in gold outcome completions; do
    [ $labels = completions ] && problems=384  # eight completions of every step take longest
    test -s $r/$labels.jsonl || $python -m collect.steps --init=$r/sft --labels=$labels --prompts=$problems --samples=4 --out=$r/$labels.jsonl --seed=$seed
    $python train_prm.py --init=$r/sft --data=$r/$labels.jsonl --eval_data=arithmetic --run=$r/$labels --seed=$seed
done
$python -m decoding.rerank --policy=$r/sft --models $r/outcome $r/gold $r/completions --out=$r/rerank.json --seed=$seed
for beams in 1 2 4; do
    $python -m decoding.step_beam --policy=$r/sft --model=$r/gold --beams=$beams --branch=4 --out=$r/beam$beams.json --seed=$seed
done
$python train_ppo.py --init=$r/sft --reward=$r/gold --step_rewards=product --data=arithmetic --max_prompt=16 --max_new_tokens=48 --steps=20 --kl_coef=0.05 --eval_every=0 --run=$r/ppo --seed=$seed
$python -m decoding.rerank --policy=$r/ppo --models $r/gold --n=1 --out=$r/ppo.json --seed=$seed
