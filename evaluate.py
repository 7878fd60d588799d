"""Evaluation: gold criteria and KL in the world; perplexity, accuracy and win rate on any data.

Base, SFT and PPO of `make align`, as a table and a report; then the others, one table each:

    python evaluate.py --run=runs/align
    python evaluate.py --measure=perplexity --policy=runs/sft --data=my_chats.jsonl
    python evaluate.py --measure=accuracy --reward=runs/rm --data=my_comparisons.jsonl
    python evaluate.py --measure=win_rate --policy=runs/ppo --against=runs/sft \
        --reward=runs/rm --data=my.jsonl
"""

import runtime.interrupt  # noqa: F401

import dataclasses
import json
import pathlib
import sys
from functools import partial
from typing import Any, Literal

from tqdm import tqdm

from data.bad_rows import OnBadRow, set_on_bad_row
from data.batches import (
    encode_chat,
    encode_comparison,
    encode_or_leave_out,
    encode_prompt,
    is_refused,
)
from data.lengths import MEASURED, Encode, lengths_line
from data.records import Schema
from data.sources import Source, Split, evaluated_split, open_source
from data.tokenizer import Tokenizer
from evaluation.alignment import STAGES, gold_table, sample_rows, summarise_alignment
from evaluation.gold import make_kl_sampler
from evaluation.perplexity import make_perplexity_evaluation
from evaluation.reward_model import make_comparison_evaluation
from evaluation.win_rate import make_judge, ruled, win_rate_table
from model import LanguageModel, init_and_apply
from model_config import check_fit
from responses import load_run
from runtime import flags
from runtime.errors import UserError, refuse_unread, require
from runtime.foreign import refuse_other_object
from runtime.report import alignment_report
from runtime.rows import read_rows
from runtime.writes import atomic_text, disk_faults
from sampling import SamplingConfig
from sharding import MeshConfig, make_mesh
from tasks import world

Role = Literal["base", "sft", "reward", "policy"]
FOLDERS: dict[Role, str] = {"base": "lm", "sft": "sft", "reward": "rm", "policy": "ppo"}
"""Role of a run -> its folder in --run."""


@dataclasses.dataclass(frozen=True)
class Config:
    # What is measured, and on which data
    run: str = "runs/align"
    """Folder for summary.json and report.html; the runs below default to folders in it."""
    measure: Literal["gold", "perplexity", "accuracy", "win_rate"] = "gold"
    """gold: the world's criteria for base, sft and ppo. The others print one table for --data."""
    data: str = "world"
    """World, files, or tfds:<name>; not read by gold."""
    on_bad_row: OnBadRow = "stop"
    """stop: end at the first bad row of a file; skip: leave bad rows out, with a note."""
    split: Split | None = None
    """Part of --data; None: all of a file, else what is held out."""
    # The runs that are measured, by their roles
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
    # How much is read and sampled
    n: int = 1000
    """Prompts, or records, at most: the first so many, each once."""
    temperature: float = 1.0
    """Sampling temperature."""
    max_prompt: int = 32
    """Longest prompt, in tokens."""
    max_new_tokens: int = 24
    """Longest response, in tokens."""
    missing_eos: Literal["lowest", "none"] = "lowest"
    """Rule for a response without an end (win_rate). lowest: it loses to all that ended; none: as
    any."""
    length: int = 256
    """Longest sequence, in tokens (perplexity, accuracy)."""
    seed: int = 0
    """Seed of the held-out prompts and samples."""

    def folder(self, role: Role) -> str:
        """Return the path of `role`'s run: the field of that name; where it is None, one in --run.

        In --run it is FOLDERS[role]: lm for base, sft, rm for reward, ppo for policy. It need not
        exist.
        """
        return getattr(self, role) or f"{self.run}/{FOLDERS[role]}"

    @property
    def part(self) -> Split:
        """Return the split of --data that is read: a property.

        It is --split; where that is None, "all" for files and "heldout" for what is built in and
        for tfds:<name>.
        """
        return self.split or evaluated_split(self.data)

    @property
    def sampling(self) -> SamplingConfig:
        """Return how responses are sampled, without top-k and top-p: a property.

        By the fields `temperature` and `max_new_tokens`; raises UserError where one is out of
        range.
        """
        return SamplingConfig(self.temperature, max_new_tokens=self.max_new_tokens)


def evaluate_alignment(config: Config) -> dict[str, Any]:
    """Measure base, SFT and PPO in the world; write summary.json and report.html into --run.

    The runs are `config.folder` of base, sft, policy (PPO) and reward; each model answers the
    first --n held-out prompts of tasks/world.py, made by --seed. --data is not read. Prints a
    table, and returns what summary.json holds: {"base", "sft", "ppo", "reward_model"}, each a dict
    of measures, see evaluation.alignment.summarise_alignment. Files of an earlier call are
    replaced. Raises UserError where --run has such files of another command, for a model that is
    missing or has another tokenizer than the SFT run, and for a reward run without metrics.jsonl.
    """
    # What lies in the folder already must be an earlier call's.
    out = pathlib.Path(config.run)
    with disk_faults(out):
        is_known = refuse_other_object(out / "summary.json", STAGES)
        require(
            is_known or not (out / "report.html").exists(),
            f"{out / 'report.html'}: exists, and is not of this command; name the folder of "
            "the whole alignment, as runs/align",
        )

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
        # The KL compares probabilities of the same tokens.
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
    with atomic_text(str(out / "summary.json")) as file:
        file.write(json.dumps(summary, indent=1) + "\n")
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


def open_part(config: Config, schema: Schema) -> Source:
    """Open the split of --data that is measured, `config.part`, as records of `schema`.

    All of its records: --n is for the caller. What is built in is made by --seed. Raises UserError
    for data that is missing or malformed or lacks the schema, and for the split "all" of what is
    no file.
    """
    return open_source(config.data, schema, config.part, seed=config.seed)


def what_is_read(config: Config, source: Source) -> dict[str, Any]:
    """Return the head of a table, {"data": --data, "split": its part, "records": an int}.

    `records` is --n, or all of `source`, of `open_part`, where it has fewer.
    """
    records = min(config.n, len(source))
    return {"data": config.data, "split": config.part, "records": records}


def tell_lengths(config: Config, source: Source, encode: Encode, tokenizer: Tokenizer) -> None:
    """Print on stderr how many tokens records have, and the shares that are cut or dropped.

    Measured are the first of `source`, --n at most and no more than data.lengths.MEASURED, at
    --max_prompt where `encode` is data.batches.encode_prompt, else at --length. `encode`: the
    function that makes rows of tokens of the records, of data/batches.py.
    """
    # What is cut: prompts before they are answered, or whole rows.
    length, flag = config.length, "--length"
    if encode is encode_prompt:
        length, flag = config.max_prompt, "--max_prompt"
    records = min(config.n, MEASURED)
    # What the chat template refuses has no length.
    leaving_out = partial(encode_or_leave_out, encode, source.name)
    line = lengths_line(source, leaving_out, tokenizer, length, flag=flag, records=records)
    print(line, file=sys.stderr)


def evaluate_perplexity(config: Config) -> dict[str, Any]:
    """Measure a policy's perplexity per assistant token on conversations.

    The run is `config.folder("policy")`. Read are the first --n conversations of --data, cut on
    the right to --length tokens. Returns the keys of `what_is_read` as they are; `tokens`, how
    many were predicted, ends of the assistant's turns included; `loss`, their mean negative
    log-probability in nats; and `perplexity`, its exp. Raises UserError for a run or --data that
    cannot be read, for a --length beyond the model's context, and where no token of an assistant
    is left.
    """
    # The policy, and the conversations that it is to predict.
    model, tokenizer, params = load_run(config.folder("policy"))
    check_fit(model, tokenizer.size, config.length)
    source = open_part(config, "chat")
    tell_lengths(config, source, encode_chat, tokenizer)

    # As a policy's own training measures it.
    _, apply = init_and_apply(LanguageModel(model))
    evaluate = make_perplexity_evaluation(apply, source, tokenizer, config.length, config.n)
    return what_is_read(config, source) | evaluate(params)


def evaluate_accuracy(config: Config) -> dict[str, Any]:
    """Measure a reward model on comparisons: {"eval/accuracy", "eval/pairs", "eval/margin", ...}.

    The run is `config.folder("reward")`. Returns the keys of `what_is_read` as they are, then
    those of evaluation.reward_model.comparison_table as `eval/NAME`: an accuracy counts equal
    rewards half. Of the first --n records, those whose responses do not fit --length are left out,
    with a note on stderr; `records` counts them too. A prompt is cut on the left. Raises UserError
    for a run or --data that cannot be read, for a --length beyond the model's context, and where
    no record is left, or --data ranks no response above another.
    """
    # The reward model, and the comparisons that it is to rank.
    model, tokenizer, params = load_run(config.folder("reward"), reward=True)
    check_fit(model, tokenizer.size, config.length)
    source = open_part(config, "comparison")
    tell_lengths(config, source, encode_comparison, tokenizer)

    # As its own training measures it.
    evaluate = make_comparison_evaluation(model, source, tokenizer, config.length, config.n)
    return what_is_read(config, source) | evaluate(params)


def evaluate_win_rate(config: Config) -> dict[str, Any]:
    """Measure how often the reward model prefers the policy's response to that of --against.

    Without --against the other run is the SFT run; policy, sft and reward are of `config.folder`.
    Both answer the first --n prompts of --data, cut on the left to --max_prompt tokens, by --seed,
    as `config.sampling` says. Returns the keys of `what_is_read`, and of
    evaluation.win_rate.win_rate_table: `n`, prompts, `win_rate`, where a tie is half a win, its 95
    % interval `win_rate_ci`, [low, high], and the mean rewards `reward` and `reward_against`, all
    after the rule of --missing_eos on the responses of both together. Prompts that the chat
    template of one of the three runs refuses are not among `n`. Then `ended` and
    `ended_against`, the shares of responses that ended. Raises UserError for a --data of raw text
    or that cannot be read, and for a run that cannot be loaded.
    """
    # Prompts that have an answer to be judged.
    source = open_part(config, "prompt")
    records = source.first(config.n)
    if any("prompt" not in record for record in records):
        raise UserError(
            f"--data={config.data}: holds raw text; win rates are of answers to prompts"
        )
    prompts = [record["prompt"] for record in records]

    # The reward model, which scores the responses of each of two policies.
    reward = load_run(config.folder("reward"), reward=True)
    judge = make_judge(reward, config.sampling, config.max_prompt, config.seed)
    policy = load_run(config.folder("policy"))
    other = load_run(config.against or config.folder("sft"))
    tell_lengths(config, source, encode_prompt, policy.tokenizer)

    # Prompts that all three can read: each may have a chat template of its own.
    for run in (reward, policy, other):
        tokenizer = run.tokenizer
        prompts = [asked for asked in prompts if not is_refused(asked, tokenizer, source.name)]
    require(bool(prompts), f"--data={config.data}: the chat templates refuse all prompts read")

    # The policies, one after the other, on the same prompts.
    ours = judge(policy, prompts)
    theirs = judge(other, prompts)

    # How often ours is preferred, after the rule on responses without an end.
    return {
        **what_is_read(config, source),
        **win_rate_table(*ruled(ours, theirs, config.missing_eos)),
        "ended": float(ours.ended_N.mean()),
        "ended_against": float(theirs.ended_N.mean()),
    }


def print_table(table: dict[str, Any]) -> None:
    """Print a line for each item of `table` on stdout: its name, in 28 columns, and its value.

    A value is a text, a number, to four decimals without zeros at the end, or a list [low, high]
    of two, printed as `low to high`; no None.
    """
    for name, value in table.items():
        if isinstance(value, str):
            print(f"{name:28} {value}")
            continue
        # Four digits, without zeros at the end.
        ends = value if isinstance(value, list) else [value]
        texts = [f"{end:.4f}".rstrip("0").rstrip(".") for end in ends]
        print(f"{name:28} " + " to ".join(texts))


def check(config: Config) -> None:
    """Raise UserError for an --n below 1, and for flags that --measure does not read."""
    measure = config.measure
    require(config.n >= 1, f"--n={config.n}: must be at least 1")
    require(
        measure != "gold" or (config.data == "world" and config.split is None),
        "--measure=gold: is of the world's held-out prompts; leave --data and --split out",
    )
    samples = (measure in ("gold", "win_rate"), "--measure=gold or win_rate")
    refuse_unread(
        config,
        {
            "on_bad_row": (measure != "gold", "a measure of --data"),
            "base": (measure == "gold", "--measure=gold"),
            "sft": (
                measure == "gold" or (measure == "win_rate" and config.against is None),
                "--measure=gold, or win_rate where --against is left out",
            ),
            "reward": (measure != "perplexity", "--measure=gold, accuracy or win_rate"),
            "policy": (measure != "accuracy", "--measure=gold, perplexity or win_rate"),
            "against": (measure == "win_rate", "--measure=win_rate"),
            "temperature": samples,
            "max_prompt": samples,
            "max_new_tokens": samples,
            "missing_eos": (measure == "win_rate", "--measure=win_rate"),
            "length": (
                measure in ("perplexity", "accuracy"),
                "--measure=perplexity or accuracy",
            ),
        },
    )


def main(config: Config) -> dict[str, Any]:
    """Measure what --measure names, print it, and return it: a dict of measures by name.

    gold: `evaluate_alignment`, which also writes summary.json and report.html into --run.
    perplexity, accuracy, win_rate: `evaluate_perplexity` and so on, which write nothing. Raises
    UserError for an --n below 1, for flags that the measure does not read, and as they do. Sets
    the current mesh, and --on_bad_row for the process.
    """
    # Impossible settings are refused before any file is read.
    check(config)
    # For the whole process: what a bad row does, and a mesh of all devices.
    set_on_bad_row(config.on_bad_row)
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
