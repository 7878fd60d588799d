"""Best of n: of n samples the one with the highest reward; its gold criteria, and the KL it costs.

    python -m decoding.best_of_n --policy=runs/align/sft --reward=runs/align/rm --n=64
    python -m decoding.best_of_n --policy=runs/maths --data=maths.jsonl \
        --reward=tasks.answers:number --n=16
"""

import runtime.interrupt  # noqa: F401

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np

from data.bad_rows import OnBadRow, set_on_bad_row
from data.batches import encode_prompt, pad_prompts, say_cut
from data.records import Record
from data.sources import Split, evaluated_split, open_source
from data.tokenizer import Tokenizer
from decoding.report import powers_of_two
from evaluation.gold import CRITERIA, gold_rows, gold_shares
from evaluation.intervals import Interval, mean_interval
from evaluation.tables import cells
from model import LanguageModel, init_and_apply
from model_config import check_fit, stored_model
from objectives.imitate import best_of_n_kl
from objectives.policy import missing_eos
from responses import filled, in_parts, refuse_not_finite, split_evenly
from rewards.models import refuse_nan
from rewards.scorer import make_reward_scorer
from rollout import ended, make_rollout
from runtime import flags
from runtime.errors import UserError
from sampling import SamplingConfig
from sharding import MeshConfig, abstract, make_mesh, to_mesh
from tasks import world
from train_state import load_params

# Responses a call, at least one for each device.
ROWS = 512


@dataclasses.dataclass(frozen=True)
class Config:
    policy: str = "runs/align/sft"
    """Run to sample from."""
    reward: str = "runs/align/rm"
    """A run of train_rm.py, module:function, called with (response, record), or http://host:port
    of rewards/serve.py."""
    data: str = "world"
    """Prompts: world, files, or tfds:<name>."""
    split: Split | None = None
    """Part of --data; None: all of a file, else what is held out."""
    on_bad_row: OnBadRow = "stop"
    """stop: end at the first bad row of a file; skip: leave bad rows out, with a note."""
    n: int = 16
    """Samples a prompt; reported are the best of the first 1, 2, 4, ... and of all."""
    prompts: int = 500
    """Prompts, at most."""
    temperature: float = 1.0
    """Sampling temperature."""
    max_prompt: int = 32
    """Longest prompt, in tokens."""
    max_new_tokens: int = 24
    """Longest response, in tokens."""
    missing_eos: Literal["lowest", "none"] = "lowest"
    """Rule for a response without an end. lowest: chosen only where none ended; none: as any."""
    seed: int = 0
    """Seed of the prompts and samples."""


class Scored(NamedTuple):
    """N responses to each of P prompts."""

    rewards_PN: np.ndarray
    ranks_PN: np.ndarray
    """Scores by which the best is chosen: the rewards after --missing_eos."""
    texts: list[list[str]]
    """P lists of N."""


def sample_and_score(config: Config, records: list[Record], mesh: jax.sharding.Mesh) -> Scored:
    """Sample `config.n` responses to the prompt of each record, and score them, in order.

    `records`: at least one. Raises UserError for a policy or reward that cannot be loaded, and
    where prompt and response do not fit the model. Waits for the device.
    """
    # The policy, on the mesh, and the reward.
    model = stored_model(config.policy)
    tokenizer = Tokenizer.load(config.policy)
    check_fit(model, tokenizer.size, config.max_prompt + config.max_new_tokens)
    models, score = make_reward_scorer([config.reward], tokenizer, mesh)
    init, apply = init_and_apply(LanguageModel(model))
    shapes = jax.eval_shape(init, jax.random.key(0))
    params = load_params(config.policy, shapes=abstract(shapes, mesh))
    sampling = SamplingConfig(config.temperature, max_new_tokens=config.max_new_tokens)
    sample_rollout = make_rollout(
        apply, model, sampling, eos=tokenizer.ends, pad=tokenizer.pad, n=config.n
    )

    # In parts of one shape; the last one is filled up.
    devices = mesh.shape["data"]
    rows = devices * max(1, ROWS // (config.n * devices))
    rewards: list[np.ndarray] = []
    are_ended: list[np.ndarray] = []
    texts: list[str] = []
    for start in in_parts(len(records), rows, "sample"):
        part = filled(records[start : start + rows], rows)
        tokens = []
        for record in part:
            encoded = encode_prompt(record, tokenizer, config.max_prompt)
            tokens += encoded.rows
            if encoded.truncated:
                say_cut()
        padded = pad_prompts(tokens, config.max_prompt, tokenizer.pad, fixed=True)
        batch = to_mesh(padded, mesh)
        key = jax.random.fold_in(jax.random.key(config.seed), start)

        # The responses, n to each prompt, and their rewards.
        rollout = sample_rollout(params, batch, key)
        refuse_not_finite(np.asarray(rollout["sampler_logp_BR"]))
        scores, _ = score(models, rollout, part)
        rewards.append(np.asarray(scores[config.reward]))
        are_ended.append(np.asarray(ended(rollout, tokenizer.ends)))
        responses_BR = np.asarray(rollout["response_BR"])
        texts += [tokenizer.decode(response_R.tolist()) for response_R in responses_BR]

    # By prompt, without what the last part was filled up with.
    count = len(records)
    shape = (-1, config.n)
    rewards_PN = np.concatenate(rewards).reshape(shape)[:count]
    refuse_nan(config.reward, rewards_PN)
    ended_PN = np.concatenate(are_ended).reshape(shape)[:count]
    ranks_PN = missing_eos(rewards_PN, ended_PN, config.missing_eos)
    texts_PN = split_evenly(texts, config.n)
    return Scored(rewards_PN, np.asarray(ranks_PN), texts_PN[:count])


def best_of_first(
    scored: Scored, n: int, requests: Sequence[world.Request] | None
) -> dict[str, Interval]:
    """Measure each prompt's best of its first `n` samples, the first of equal ones.

    Returns {name: interval}: `reward`, the mean reward of the best, and with the world's
    `requests`, one a prompt, the share that meets each of CRITERIA. `requests` None: the reward
    alone.
    """
    best_P = scored.ranks_PN[:, :n].argmax(1)
    reward_P = scored.rewards_PN[np.arange(len(best_P)), best_P]
    row = {"reward": mean_interval(reward_P)}
    if requests is not None:
        chosen = [scored.texts[p][i] for p, i in enumerate(best_P)]
        row |= gold_shares(gold_rows(requests, chosen))
    return row


def main(config: Config) -> dict[int, dict[str, Interval]]:
    """Print a row for each number of samples; return the rows, {n: {"reward", criteria}}.

    n is 1, 2, 4, ... and --n. Criteria are measured on the world's prompts alone. Raises UserError
    for settings, a run or a reward that cannot be used.
    """
    if config.n < 1 or config.prompts < 1:
        raise UserError(f"--n={config.n}, --prompts={config.prompts}: must be at least 1")
    set_on_bad_row(config.on_bad_row)
    mesh = make_mesh(MeshConfig())

    # Prompts; in the world also what they request, which the gold program needs.
    split = config.split or evaluated_split(config.data)
    source = open_source(config.data, "prompt", split, seed=config.seed)
    records = source.first(config.prompts)
    requests = None
    if config.data == "world" and split != "all":
        numbers = range(len(records))
        requests = [world.prompt(i, split=split, seed=config.seed) for i in numbers]

    scored = sample_and_score(config, records, mesh)

    # A row for each number of samples.
    criteria = "" if requests is None else cells(CRITERIA, ">13")
    print(f"{'n':>5}{'KL bound':>9}{'reward':>14}{criteria}")
    table = {}
    for n in powers_of_two(config.n):
        row = best_of_first(scored, n, requests)
        print(f"{n:5}{best_of_n_kl(n):9.3f} {cells(row.values(), '>13')}")
        table[n] = row
    print(
        f"{len(records)} prompts ({config.data}, {split}), 95 % intervals; "
        "KL of the best of n to the policy: at most, in nats"
    )
    return table


if __name__ == "__main__":
    flags.run(main, Config)
