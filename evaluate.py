"""Evaluation: gold criteria and KL in the world; perplexity, accuracy and win rate on any data.

Base, SFT and PPO of `make align`, as a table and a report; then the others, one table each:

    python evaluate.py --run=runs/align
    python evaluate.py --measure=perplexity --policy=runs/sft --data=my_chats.jsonl
    python evaluate.py --measure=accuracy --reward=runs/rm --data=my_comparisons.jsonl
    python evaluate.py --measure=win_rate --policy=runs/ppo --against=runs/sft \
        --reward=runs/rm --data=my.jsonl
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
from evaluation.alignment import STAGES, gold_table, sample_rows, summarise_alignment
from evaluation.gold import make_kl_sampler
from evaluation.reward_model import make_comparison_evaluation
from evaluation.win_rate import win_rate_table
from model import LanguageModel, init_and_apply
from objectives.likelihood import likelihood_objective
from responses import load_run
from rewards.models import make_text_scorer
from runtime import flags
from runtime.errors import UserError, require
from runtime.report import alignment_report
from runtime.run_folder import read_rows
from sampling import SamplingConfig
from sharding import MeshConfig, make_mesh
from tasks import world
from train_step import make_evaluation

Role = Literal["base", "sft", "reward", "policy"]
FOLDERS: dict[Role, str] = {"base": "lm", "sft": "sft", "reward": "rm", "policy": "ppo"}
"""Role of a run -> its folder in --run."""
# Rows a batch (perplexity).
BATCH_SIZE = 32


@dataclasses.dataclass(frozen=True)
class Config:
    run: str = "runs/align"
    """Folder for summary.json and report.html; the runs below default to folders in it."""
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
    """Sampling temperature."""
    max_prompt: int = 32
    """Longest prompt, in tokens."""
    max_new_tokens: int = 24
    """Longest response, in tokens."""
    length: int = 256
    """Longest sequence, in tokens (perplexity, accuracy)."""
    seed: int = 0
    """Seed of the held-out prompts and samples."""

    def folder(self, role: Role) -> str:
        """Return the folder of the run that plays `role`: the field's value, or one in --run."""
        return getattr(self, role) or f"{self.run}/{FOLDERS[role]}"

    @property
    def sampling(self) -> SamplingConfig:
        """Return how responses are sampled."""
        return SamplingConfig(self.temperature, max_new_tokens=self.max_new_tokens)


def evaluate_alignment(config: Config) -> dict[str, Any]:
    """Measure base, SFT and PPO in the world; write summary.json and report.html into --run.

    Returns what summary.json holds: {"base", "sft", "ppo", "reward_model"}, each a dict of
    measures, see evaluation.alignment.summarise_alignment. Raises UserError for a run that is
    missing, or of another tokenizer.
    """
    # The prompts, and the reference of the KL.
    requests = [world.prompt(i, split="heldout", seed=config.seed) for i in range(config.n)]
    prompts = [request.text for request in requests]
    reference_run = config.folder("sft")
    model, tokenizer, reference = load_run(reference_run)
    sample_with_kl = make_kl_sampler(model, config.sampling, tokenizer, config.max_prompt)

    # A response of each model to each prompt; all have SFT's shape and tokenizer.
    runs = {
        "base": config.folder("base"),
        "sft": reference_run,
        "ppo": config.folder("policy"),
    }
    sampled = {}
    for stage in tqdm(STAGES, desc="evaluate", unit="model"):
        _, own_tokenizer, params = load_run(runs[stage])
        if own_tokenizer.sha256 != tokenizer.sha256:
            raise UserError(
                f"{runs[stage]}: its tokenizer is not that of {reference_run}; evaluate them apart"
            )
        sampled[stage] = sample_with_kl(params, reference, prompts, config.seed)

    # What the reward model's training measured last.
    reward_run = config.folder("reward")
    reward_metrics = read_rows(reward_run)
    require(bool(reward_metrics), f"{reward_run}: no metrics.jsonl; name the run of train_rm.py")
    summary, rows = summarise_alignment(requests, sampled, reward_metrics[-1])

    # Files, then the table.
    out = pathlib.Path(config.run)
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    report = alignment_report(
        config.run,
        runs["base"],
        runs["sft"],
        reward_run,
        runs["ppo"],
        summary,
        sample_rows(requests, rows),
    )
    print(gold_table(summary))
    print(f"report: {report}")
    return summary


def evaluate_perplexity(config: Config) -> dict[str, float]:
    """Measure a policy's perplexity per assistant token on conversations.

    Returns `rows` (packed rows that were read), `loss` (nats a token) and `perplexity`.
    """
    # The policy, and packed conversations.
    model, tokenizer, params = load_run(config.folder("policy"))
    source = open_source(config.data, "chat", "heldout", seed=config.seed)
    batches = chat_batches(source, tokenizer, batch_size=BATCH_SIZE, length=config.length)

    # The loss of fine-tuning: the assistant's tokens alone count.
    _, apply = init_and_apply(LanguageModel(model))
    evaluate = make_evaluation(partial(likelihood_objective, apply))

    # Rows are packed: about two conversations each.
    count = max(1, min(config.n, len(source)) // (2 * BATCH_SIZE))
    parts: list[Any] = [next(batches) for _ in range(count)]
    loss = evaluate(params, parts)["eval/loss"]
    return {"rows": BATCH_SIZE * count, "loss": loss, "perplexity": float(np.exp(loss))}


def evaluate_accuracy(config: Config) -> dict[str, float]:
    """Measure a reward model on comparisons: `eval/accuracy`, `eval/pairs`, `eval/margin`, ...

    They are those of evaluation.reward_model.comparison_table, each as `eval/NAME`.
    """
    # As the reward model's own training measures it.
    model, tokenizer, params = load_run(config.folder("reward"), reward=True)
    source = open_source(config.data, "comparison", "heldout", seed=config.seed)
    evaluate = make_comparison_evaluation(model, source, tokenizer, config.length, config.n)
    return evaluate(params)


def evaluate_win_rate(config: Config) -> dict[str, Any]:
    """Measure how often the reward model prefers the policy's response to the other run's.

    Returns `n`, `win_rate`, `win_rate_ci` [low, high], `reward` and `reward_against`, the mean
    rewards (evaluation.win_rate.win_rate_table). Raises UserError for a --data of raw text.
    """
    # Prompts that have an answer to be judged.
    source = open_source(config.data, "prompt", "heldout", seed=config.seed)
    records = source.first(config.n)
    if any("prompt" not in record for record in records):
        raise UserError(
            f"--data={config.data}: holds raw text; win rates are of answers to prompts"
        )
    prompts = [record["prompt"] for record in records]

    # The reward model, which scores the responses of each policy.
    model, tokenizer, params = load_run(config.folder("reward"), reward=True)
    score_texts = make_text_scorer(model, tokenizer, config.max_prompt + config.max_new_tokens)

    def rewards_of(run: str) -> np.ndarray:
        """Return the rewards of the run's responses, [N]."""
        # Both texts are scored, so policies may have tokenizers of their own.
        policy_model, policy_tokenizer, policy = load_run(run)
        sample_with_kl = make_kl_sampler(
            policy_model, config.sampling, policy_tokenizer, config.max_prompt
        )
        responses = sample_with_kl(policy, policy, prompts, config.seed)
        return np.array(score_texts(params, prompts, [response.text for response in responses]))

    ours = rewards_of(config.folder("policy"))
    theirs = rewards_of(config.against or config.folder("sft"))
    return win_rate_table(ours, theirs)


def print_table(table: dict[str, Any]) -> None:
    """Print a line for each item of `table`, its name and value, to at most four decimals.

    A value is a number, or a list [low, high], printed as `low to high`.
    """
    # Four digits, without zeros at the end.
    for name, value in table.items():
        ends = value if isinstance(value, list) else [value]
        texts = [f"{end:.4f}".rstrip("0").rstrip(".") for end in ends]
        print(f"{name:28} " + " to ".join(texts))


def main(config: Config) -> dict[str, Any]:
    """Measure and print; return what was measured, as of the function that --measure names."""
    if config.n < 1:
        raise UserError(f"--n={config.n}: must be at least 1")
    make_mesh(MeshConfig())

    # The world's evaluation prints a table of its own; the others are one each.
    if config.measure == "gold":
        return evaluate_alignment(config)
    evaluations = {
        "perplexity": evaluate_perplexity,
        "accuracy": evaluate_accuracy,
        "win_rate": evaluate_win_rate,
    }
    table = evaluations[config.measure](config)
    print_table(table)
    return table


if __name__ == "__main__":
    flags.run(main, Config)
