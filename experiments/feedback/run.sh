#!/bin/sh
# One seed of the study of reward models, from a run of `make align`: sh experiments/feedback/run.sh ALIGN SEED OUT [PYTHON].
set -e
align=$1 seed=$2 r=$3 python=${4:-.venv/bin/python}
rm="--init=$align/sft --steps=400 --eval_data=$align/held_out.jsonl --demonstrations=world --lm_coef=0.5 --seed=$seed"
rl="--init=$align/sft --eval_every=0 --seed=$seed"
mkdir -p $r
grep -v '^harmless' tasks/principles.txt > $r/two.txt
for labels in judge blind; do
    [ $labels = judge ] && principles=tasks/principles.txt || principles=$r/two.txt
    test -s $r/$labels.jsonl || $python -m collect.feedback --init=$align/sft --principles=$principles --prompts=5000 --out=$r/$labels.jsonl --seed=$seed
    $python train_rm.py $rm --data=$r/$labels.jsonl --run=$r/${labels}_rm
done
$python train_ppo.py $rl --reward=$r/judge_rm --run=$r/judge
$python train_ppo.py $rl --reward=$align/round1/rm --run=$r/labellers
$python train_grpo.py $rl --steps=56 --reward=$r/blind_rm --run=$r/blind
$python train_grpo.py $rl --steps=56 --reward $r/blind_rm tasks.rules:harmless --combine=gated --gate=1 --run=$r/gated
$python -m experiments.policies --runs $align/sft $r/judge $r/labellers $r/blind $r/gated --out=$r/summary.json --seed=$((1000 + seed))
