"""Evaluation: gold criteria and KL in the world; perplexity, reward-model accuracy and win rate on any data.

python evaluate.py --run=runs/align                     # base, sft and ppo of `make align`: table and report
python evaluate.py --measure=perplexity --policy=runs/sft --data=my_chats.jsonl
python evaluate.py --measure=accuracy --reward=runs/rm --data=my_comparisons.jsonl
python evaluate.py --measure=win_rate --policy=runs/ppo --against=runs/sft --reward=runs/rm --data=my.jsonl
"""

import dataclasses
import json
import pathlib
from functools import partial
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from data.batches import chat_batches
from data.sources import open_source
from evaluation.gold import CRITERIA, distinct_answers, gold_rows, make_measure, summarise
from evaluation.intervals import mean
from evaluation.reward_model import make_comparison_evaluation, make_scorer
from model import LanguageModel, init_and_apply
from objectives.likelihood import likelihood_objective
from responses import load_run
from runtime import flags
from runtime.errors import UserError
from runtime.report import alignment_report
from sampling import SamplingConfig
from sharding import MeshConfig, make_mesh
from tasks import world
from train_step import make_evaluation

# --- reward models


# --- the script


@dataclasses.dataclass(frozen=True)
class Config:
    run: str = "runs/align"
    """Folder for summary.json and report.html; base, sft, reward and policy default to folders in it."""
    measure: Literal["gold", "perplexity", "accuracy", "win_rate"] = "gold"
    """gold: the world's criteria for base, sft and ppo. The others print one table for --data."""
    data: str = "world"
    """Held-out split of: world, a .jsonl file, or tfds:<name>."""
    base: str | None = None
    """Pre-trained run; None: <run>/lm."""
    sft: str | None = None
    """Fine-tuned run, reference of the KL; None: <run>/sft."""
    reward: str | None = None
    """Reward model's run; None: <run>/rm."""
    policy: str | None = None
    """Aligned run, or the one to measure; None: <run>/ppo."""
    against: str | None = None
    """Run that the policy's responses are compared with (win_rate; default: the SFT run)."""
    n: int = 1000
    """Held-out prompts, or records."""
    temperature: float = 1.0
    max_prompt: int = 32
    """Longest prompt, in tokens."""
    max_new_tokens: int = 24
    """Longest response, in tokens."""
    length: int = 128
    """Longest sequence, in tokens (perplexity, accuracy)."""
    seed: int = 0

    def folder(self, name: str) -> str:
        """The run that plays `name`."""
        return (
            getattr(self, name)
            or f"{self.run}/{ {'base': 'lm', 'reward': 'rm', 'policy': 'ppo'}.get(name, name) }"
        )


def gold_measure(config: Config) -> dict[str, Any]:
    """Base, SFT and PPO in the world: writes summary.json and report.html, prints the table."""
    requests = [world.prompt(i, split="heldout", seed=config.seed) for i in range(config.n)]
    model, tokenizer, sft = load_run(config.folder("sft"))
    sampling = SamplingConfig(config.temperature, max_new_tokens=config.max_new_tokens)
    measure = make_measure(model, sampling, tokenizer, config.max_prompt)
    summary, rows = {}, {}
    for name in tqdm(("base", "sft", "ppo"), desc="evaluate", unit="model"):
        run = config.folder({"ppo": "policy"}.get(name, name))
        _, its_tokenizer, params = load_run(run)
        if its_tokenizer.sha256 != tokenizer.sha256:
            raise UserError(
                f"{run}: its tokenizer is not that of {config.folder('sft')}; evaluate them apart"
            )
        responses, lengths, kls = zip(
            *measure(params, sft, [r.text for r in requests], config.seed), strict=True
        )
        rows[name] = gold_rows(requests, responses)
        summary[name] = summarise(rows[name], lengths, kls)
        summary[name]["distinct_answers"] = distinct_answers(requests, responses)
    wins = [(a["all"], b["all"]) for a, b in zip(rows["ppo"], rows["sft"], strict=True)]
    summary["ppo"]["win_rate"] = float(np.mean([(a > b) + 0.5 * (a == b) for a, b in wins]))
    last = (pathlib.Path(config.folder("reward")) / "metrics.jsonl").read_text().splitlines()[-1]
    reward = {
        k.removeprefix("eval/"): v for k, v in json.loads(last).items() if k.startswith("eval/")
    }
    by_criterion = {
        k.removeprefix("accuracy/"): v for k, v in reward.items() if k.startswith("accuracy/")
    }
    summary["reward_model"] = {**reward, "by_criterion": by_criterion}
    out = pathlib.Path(config.run)
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    samples = [
        {"prompt": request.text, "kind": request.kind, **{name: rows[name][i] for name in rows}}
        for i, request in enumerate(requests[:40])
    ]
    runs = [config.folder(name) for name in ("base", "sft", "reward", "policy")]
    report = alignment_report(config.run, *runs, summary, samples)
    print(gold_table(summary))
    print(f"report: {report}")
    return summary


def gold_table(summary: dict[str, Any]) -> str:
    """The summary for a terminal of 80 columns."""
    names = (*CRITERIA, "kl", "length")
    lines = [f"{'':8}" + "".join(f"{name:>14}" for name in names[:4]) + f"{'KL':>8}{'length':>8}"]
    for model in ("base", "sft", "ppo"):
        row = summary[model]
        cells = [
            f"{row[n]:.3f} ±{(row[n + '_ci'][1] - row[n + '_ci'][0]) / 2:.3f}" for n in CRITERIA
        ]
        lines.append(
            f"{model:8}"
            + "".join(f"{cell:>14}" for cell in cells)
            + f"{row['kl']:>z8.2f}{row['length']:>8.1f}"
        )
    lines.append(
        f"share of {summary['sft']['n']} held-out prompts, 95 % intervals; KL to sft in nats a response"
    )
    kinds = summary["sft"]["kinds"]
    lines += ["", f"{'passes all, by kind':22}{'base':>10}{'sft':>10}{'ppo':>10}{'n':>8}"]
    for kind in kinds:
        cells = "".join(
            f"{summary[m]['kinds'][kind]['all']:>10.3f}" for m in ("base", "sft", "ppo")
        )
        lines.append(f"{kind:22}{cells}{kinds[kind]['n']:>8}")
    ratios = "".join(f"{summary[m]['distinct_answers']:>10.3f}" for m in ("base", "sft", "ppo"))
    lines.append(f"{'distinct answers':22}{ratios}")
    accuracy = summary["reward_model"]["by_criterion"]
    shown = ", ".join(f"{name} {value:.3f}" for name, value in accuracy.items())
    return "\n".join(
        [
            *lines,
            "",
            f"reward model on held-out pairs: {summary['reward_model'].get('accuracy', float('nan')):.3f}",
            f"  {shown}",
        ]
    )


def perplexity_measure(config: Config) -> dict[str, float]:
    """Perplexity per assistant token of a policy on conversations."""
    model, tokenizer, params = load_run(config.folder("policy"))
    source = open_source(config.data, "chat", "heldout", seed=config.seed)
    batches = chat_batches(source, tokenizer, batch_size=32, length=config.length)
    evaluate = make_evaluation(
        partial(likelihood_objective, init_and_apply(LanguageModel(model))[1])
    )
    parts = [next(batches) for _ in range(max(1, min(config.n, len(source)) // 64))]
    loss = evaluate(params, parts)["eval/loss"]
    return {"rows": 32 * len(parts), "loss": loss, "perplexity": float(np.exp(loss))}


def accuracy_measure(config: Config) -> dict[str, float]:
    """Accuracy, calibration and length correlation of a reward model on comparisons."""
    model, tokenizer, params = load_run(config.folder("reward"), reward=True)
    source = open_source(config.data, "comparison", "heldout", seed=config.seed)
    return make_comparison_evaluation(model, source, tokenizer, config.length, config.n)(params)


def win_rate_measure(config: Config) -> dict[str, Any]:
    """How often the reward model prefers the policy's response to the other run's; ties count half."""
    source = open_source(config.data, "prompt", "heldout", seed=config.seed)
    records = [source[i] for i in range(min(config.n, len(source)))]
    if any("prompt" not in record for record in records):
        raise UserError(
            f"--data={config.data}: holds raw text; win rates are of answers to prompts"
        )
    prompts = [record["prompt"] for record in records]
    sampling = SamplingConfig(config.temperature, max_new_tokens=config.max_new_tokens)

    def responses(run: str) -> list[str]:
        model, tokenizer, params = load_run(run)
        measure = make_measure(model, sampling, tokenizer, config.max_prompt)
        return [text for text, _, _ in measure(params, params, prompts, config.seed)]

    reward_model, tokenizer, reward = load_run(config.folder("reward"), reward=True)
    score = make_scorer(reward_model, tokenizer, config.max_prompt + config.max_new_tokens)
    runs = config.folder("policy"), config.against or config.folder("sft")
    ours, theirs = (np.array(score(reward, prompts, responses(run))) for run in runs)
    rate, interval = mean((ours > theirs) + 0.5 * (ours == theirs))
    return {
        "n": len(prompts),
        "win_rate": rate,
        "win_rate_ci": interval,
        "reward": float(ours.mean()),
        "reward_against": float(theirs.mean()),
    }


def main(config: Config) -> dict[str, Any]:
    """Measures and prints; returns what was measured."""
    if config.n < 1:
        raise UserError(f"--n={config.n}: must be at least 1")
    make_mesh(MeshConfig())
    measures = {
        "gold": gold_measure,
        "perplexity": perplexity_measure,
        "accuracy": accuracy_measure,
        "win_rate": win_rate_measure,
    }
    table = measures[config.measure](config)
    if config.measure != "gold":
        for name, value in table.items():
            ends = value if isinstance(value, list) else [value]
            print(
                f"{name:28} " + " to ".join(f"{end:.4f}".rstrip("0").rstrip(".") for end in ends)
            )
    return table


if __name__ == "__main__":
    flags.run(main, Config)
