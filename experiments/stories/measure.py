"""Compare stories before and after PPO: reward, KL, collapse, readability.

    PYTHONPATH=. python experiments/stories/measure.py --after runs/stories_ppo0 runs/stories_ppo1

The openings have names that training never saw.

Writes results.json; prints the tables and samples that stand in README.md (a test compares them).
"""

import runtime.interrupt  # noqa: F401

import collections
import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from data.batches import pad_prompts
from data.tokenizer import Tokenizer
from experiments.seeds import half
from experiments.stories import happy
from model import LanguageModel, Params, init_and_apply
from model_config import ModelConfig, stored_model
from objectives.policy import response_logprobs
from rollout import join_responses
from runtime import flags
from runtime.errors import UserError
from runtime.run_folder import finished_steps, load_config
from sampling import SamplingConfig, generate
from train_state import load_params

HERE = pathlib.Path(__file__).parent
ROWS = {  # name: (what the table calls it, decimals)
    "score": ("reward, -1 to 1", 3),
    "happy": ("happy sentences that count, a story", 2),
    "sad": ("sad words, a story", 2),
    "also_happy": ("happy words that are not in the reward, per 100 words", 2),
    "also_sad": ("sad words that are not in the reward, per 100 words", 2),
    "kl": ("KL to the original, nats a story", 2),
    "perplexity": ("perplexity under the original", 2),
    "length": ("length, tokens", 1),
    "sentence": ("words a complete sentence", 2),
    "ended": ("stories that end within their tokens", 3),
    "repeated": ("word triples said before in the story, share", 3),
    "distinct": ("distinct word pairs of all stories, share", 3),
    "first": ("distinct first sentences, share", 3),
    "formula": ("stories with the commonest word triple, share", 3),
}


@dataclasses.dataclass(frozen=True)
class Config:
    before: str = "runs/stories"
    """The run that PPO started from."""
    after: tuple[str, ...] = ("runs/stories_ppo0", "runs/stories_ppo1", "runs/stories_ppo2")
    """Runs of train_ppo.py that differ in their seed; all sampled at temperature 1."""
    out: str = str(HERE / "results.json")
    """File to write."""
    split: str = "test"
    """Openings: test or validation (happy.py)."""
    n: int = 512
    """Stories of each run: the split's openings, in order, again and again."""
    shown: int = 3
    """Samples: of the first seed, the stories of the first so many openings."""
    seed: int = 0
    """Seed of the first run's samples; each later run has the next seed."""


def make_tell(
    model: ModelConfig, tokenizer: Tokenizer, max_prompt: int, max_new_tokens: int, rows: int = 128
):
    """Make tell(policy, reference, openings, seed).

    It returns (stories, {length, ended, kl, nll}: [n] each).
    """
    _, apply = init_and_apply(LanguageModel(model))
    sampling = SamplingConfig(1.0, max_new_tokens=max_new_tokens)

    @jax.jit
    def sample(policy: Params, reference: Params, prompts: dict[str, jax.Array], key: jax.Array):
        samples = generate(
            apply, model, policy, prompts, key, sampling, eos=tokenizer.bos, pad=tokenizer.pad
        )
        reference_BR = response_logprobs(apply, reference, join_responses(prompts, samples), 1.0)
        sums = {
            "length": samples.mask_BR,
            "ended": (samples.response_BR == tokenizer.bos) * samples.mask_BR,
        }
        sums |= {
            "kl": (samples.logp_BR - reference_BR) * samples.mask_BR,
            "nll": -reference_BR * samples.mask_BR,
        }
        return samples.response_BR, {name: x.sum(1) for name, x in sums.items()}

    def tell(policy: Params, reference: Params, openings: Sequence[str], seed: int):
        stories = []
        counts = collections.defaultdict(list)
        for start in range(0, len(openings), rows):
            part = openings[start : start + rows]
            padded = [{"tokens": [tokenizer.bos, *tokenizer.encode(text)]} for text in part]
            padded += padded[:1] * (rows - len(part))
            batch = pad_prompts(padded, max_prompt, tokenizer.pad, fixed=True)
            key = jax.random.fold_in(jax.random.key(seed), start)
            response_BR, sums = jax.device_get(sample(policy, reference, batch, key))
            for text, row in zip(part, response_BR.tolist(), strict=False):
                stories.append(tokenizer.decode([*tokenizer.encode(text), *row])[len(text) :])
            for name, x_B in sums.items():
                counts[name] += x_B[: len(part)].tolist()
        return stories, {name: np.array(x) for name, x in counts.items()}

    return tell


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """Return the runs of `n` words of `text`."""
    tokens = happy.words(text)
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def summarise(
    openings: Sequence[str], stories: Sequence[str], counts: dict[str, np.ndarray]
) -> dict[str, float]:
    """Return the numbers of ROWS for one set of stories."""
    parts = [happy.parts(o, s) for o, s in zip(openings, stories, strict=True)]
    tokens = [happy.words(story) for story in stories]
    complete = [happy.sentences(story)[0] for story in stories]
    triples, pairs = ([ngrams(story, n) for story in stories] for n in (3, 2))
    all_words = sum(map(len, tokens))
    said = [pair for row in pairs for pair in row]
    commonest = collections.Counter(triple for row in triples for triple in set(row)).most_common(
        1
    )[0][1]
    also = {"also_happy": set(happy.ALSO_HAPPY.split()), "also_sad": set(happy.ALSO_SAD.split())}
    lengths = [len(happy.words(sentence)) for row in complete for sentence in row]
    repeated = sum(len(row) - len(set(row)) for row in triples) / max(sum(map(len, triples)), 1)
    out = {name: np.mean([part[name] for part in parts]) for name in ("score", "happy", "sad")}
    out |= {
        name: 100 * sum(word in listed for row in tokens for word in row) / all_words
        for name, listed in also.items()
    }
    out |= {name: counts[name].mean() for name in ("kl", "length", "ended")}
    out |= {
        "perplexity": math.exp(counts["nll"].sum() / counts["length"].sum()),
        "sentence": np.mean(lengths),
        "repeated": repeated,
        "distinct": len(set(said)) / len(said),
        "first": len({row[0] if row else "" for row in complete}) / len(stories),
        "formula": commonest / len(stories),
    }
    return {name: round(float(out[name]), 6) for name in ROWS}


def interval(values: Sequence[float]) -> dict[str, float]:
    """Return the mean over seeds, with its 95 % interval by Student's t; one seed has none."""
    mean = float(np.mean(values))
    width = half(values)
    return {
        "mean": mean,
        **({} if math.isnan(width) else {"low": mean - width, "high": mean + width}),
    }


def markdown(results: dict[str, Any]) -> str:
    """Return the tables of README.md."""

    def cell(values: dict[str, float], digits: int) -> str:
        # Adding 0.0 turns -0.00 into 0.00.
        shown = {name: f"{round(x, digits) + 0.0:.{digits}f}" for name, x in values.items()}
        return shown["mean"] + (f" [{shown['low']}, {shown['high']}]" if "low" in shown else "")

    runs = results["runs"]
    seeds = f"{len(runs)} seed{'s' * (len(runs) > 1)}"
    lines = [
        f"| {results['n']} stories a seed, {seeds} | before | after |",
        "|---|---|---|",
    ]
    for name, (title, digits) in ROWS.items():
        cells = [cell(results[when][name], digits) for when in ("before", "after")]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += [
        "",
        "| seed | iteration | reward before | after | KL | perplexity | commonest word triple |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        before, after = run["before"], run["after"]
        rewards = f"{before['score']:.3f} | {after['score']:.3f}"
        distance = f"{after['kl']:.2f} | {after['perplexity']:.2f}"
        formula = f'"{run["formula"]}", {after["formula"]:.3f}'
        numbers = f"{rewards} | {distance} | {formula}"
        lines.append(f"| {run['seed']} | {run['iteration']} | {numbers} |")
    return "\n".join(lines)


def samples(results: dict[str, Any]) -> str:
    """Return the samples of README.md."""
    blocks = []
    for sample in results["samples"]:
        blocks.append(f"**{sample['opening']}**")
        for when in ("before", "after"):
            story, score = sample[when], sample[f"{when}_score"]
            quoted = "\n".join(f"> {line}" for line in story.strip().splitlines() if line.strip())
            blocks.append(f"{when}, reward {score:.2f}:\n\n{quoted}")
    return "\n\n".join(blocks)


SCRIPTS = ("experiments/stories/train_ppo", "stories_ppo")
"""How a run of train_ppo.py here names its script: today, and in older runs."""


def main(config: Config) -> dict[str, Any]:
    settings = [load_config(run) for run in config.after]
    differing = {"run", "seed", "mesh", "versions", "keep_checkpoints", "eval_every", "save_every"}
    for run, other in zip(config.after, settings, strict=True):
        if other["script"] not in SCRIPTS:
            raise UserError(
                f"--after: {run} is a run of {other['script']}; "
                "name runs of experiments/stories/train_ppo.py"
            )
        for name in other.keys() - differing:
            if other[name] != settings[0][name]:
                raise UserError(
                    f"--after: {run} has another {name} than {config.after[0]}; measure them apart"
                )
    model = stored_model(config.before)
    tokenizer = Tokenizer.load(config.before)
    openings = happy.openings(config.split)
    openings = (openings * -(-config.n // len(openings)))[: config.n]
    tell = make_tell(model, tokenizer, settings[0]["max_prompt"], settings[0]["max_new_tokens"])
    original = load_params(config.before)
    runs = []
    shown = []
    for number, (run, other) in enumerate(zip(config.after, settings, strict=True)):
        told = {"before": tell(original, original, openings, config.seed + number)}
        told["after"] = tell(load_params(run), original, openings, config.seed + number)
        row: dict[str, Any] = {"seed": other["seed"]}
        row["iteration"] = finished_steps((pathlib.Path(run) / "checkpoints").absolute())[0]
        row |= {when: summarise(openings, *stories) for when, stories in told.items()}
        triples = collections.Counter(
            triple for story in told["after"][0] for triple in set(ngrams(story, 3))
        )
        runs.append({**row, "formula": " ".join(triples.most_common(1)[0][0])})
        for i in range(config.shown if number == 0 else 0):
            sample: dict[str, Any] = {"opening": openings[i]}
            for when, (stories, _) in told.items():
                sample |= {
                    when: stories[i],
                    f"{when}_score": happy.parts(openings[i], stories[i])["score"],
                }
            shown.append(sample)
    means = {
        when: {name: interval([run[when][name] for run in runs]) for name in ROWS}
        for when in ("before", "after")
    }
    kept = (
        "steps",
        "batch_size",
        "minibatches",
        "epochs",
        "kl_coef",
        "max_new_tokens",
        "optimizer",
        "value_optimizer",
    )
    results = {
        "command": "python experiments/stories/measure.py "
        + " ".join(["--after", *config.after, f"--n={config.n}"]),
        "n": config.n,
        "settings": {name: settings[0][name] for name in kept},
        **means,
        "runs": runs,
        "samples": shown,
    }
    pathlib.Path(config.out).write_text(json.dumps(results, indent=1) + "\n")
    print(markdown(results), samples(results), sep="\n\n")
    return results


if __name__ == "__main__":
    flags.run(main, Config)
