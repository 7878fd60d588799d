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
        rows = join_responses(prompts, samples)
        reference_BR = response_logprobs(apply, reference, rows, 1.0)

        # Sums over each story's own tokens.
        mask_BR = samples.mask_BR
        terms = {
            "length": mask_BR,
            "ended": (samples.response_BR == tokenizer.bos) * mask_BR,
            "kl": (samples.logp_BR - reference_BR) * mask_BR,
            "nll": -reference_BR * mask_BR,
        }
        sums = {name: x_BR.sum(1) for name, x_BR in terms.items()}
        return samples.response_BR, sums

    def tell(policy: Params, reference: Params, openings: Sequence[str], seed: int):
        stories = []
        counts = collections.defaultdict(list)
        for start in range(0, len(openings), rows):
            # Every batch has as many rows: one program.
            part = openings[start : start + rows]
            encoded = [tokenizer.encode(text) for text in part]
            padded = [{"tokens": [tokenizer.bos, *tokens]} for tokens in encoded]
            padded += padded[:1] * (rows - len(part))
            batch = pad_prompts(padded, max_prompt, tokenizer.pad, fixed=True)
            key = jax.random.fold_in(jax.random.key(seed), start)
            response_BR, sums = jax.device_get(sample(policy, reference, batch, key))

            # A story goes on in its opening's last word, so both are decoded together.
            responses = response_BR.tolist()
            for text, tokens, response in zip(part, encoded, responses, strict=False):
                whole = tokenizer.decode([*tokens, *response])
                stories.append(whole[len(text) :])
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
    out: dict[str, Any] = {}

    # The reward and its parts.
    parts = [happy.parts(o, s) for o, s in zip(openings, stories, strict=True)]
    for name in ("score", "happy", "sad"):
        out[name] = np.mean([part[name] for part in parts])

    # Words that say the same and that the reward does not list, per 100 words.
    words = []
    for story in stories:
        words += happy.words(story)
    for name, text in (("also_happy", happy.ALSO_HAPPY), ("also_sad", happy.ALSO_SAD)):
        listed = set(text.split())
        out[name] = 100 * sum(word in listed for word in words) / len(words)

    # What the models say of the tokens.
    for name in ("kl", "length", "ended"):
        out[name] = counts[name].mean()
    out["perplexity"] = math.exp(counts["nll"].sum() / counts["length"].sum())

    # Sentences: how long they are, and how many stories begin with one of their own.
    lengths = []
    firsts = set()
    for story in stories:
        sentences, _ = happy.sentences(story)
        lengths += [len(happy.words(sentence)) for sentence in sentences]
        firsts.add(sentences[0] if sentences else "")
    out["sentence"] = np.mean(lengths)
    out["first"] = len(firsts) / len(stories)

    # Repetition: within a story, and over all stories.
    pairs = []
    count = 0
    repeated = 0
    for story in stories:
        pairs += ngrams(story, 2)
        triples = ngrams(story, 3)
        count += len(triples)
        repeated += len(triples) - len(set(triples))
    _, commonest = commonest_triple(stories)
    out["repeated"] = repeated / max(count, 1)
    out["distinct"] = len(set(pairs)) / len(pairs)
    out["formula"] = commonest / len(stories)
    return {name: round(float(out[name]), 6) for name in ROWS}


def commonest_triple(stories: Sequence[str]) -> tuple[str, int]:
    """Return the three words in a row that the most stories have, and how many have them."""
    triples = collections.Counter[tuple[str, ...]]()
    for story in stories:
        triples.update(set(ngrams(story, 3)))
    triple, count = triples.most_common(1)[0]
    return " ".join(triple), count


def interval(values: Sequence[float]) -> dict[str, float]:
    """Return the mean over seeds, with its 95 % interval by Student's t; one seed has none."""
    mean = float(np.mean(values))
    width = half(values)
    if math.isnan(width):
        return {"mean": mean}
    return {"mean": mean, "low": mean - width, "high": mean + width}


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


MAY_DIFFER = {"run", "seed", "mesh", "versions", "keep_checkpoints", "eval_every", "save_every"}
"""Settings in which runs that are measured together may differ."""
KEPT = (
    "steps",
    "batch_size",
    "minibatches",
    "epochs",
    "kl_coef",
    "max_new_tokens",
    "optimizer",
    "value_optimizer",
)
"""Settings of the runs that results.json has."""
Told = dict[str, tuple[list[str], dict[str, np.ndarray]]]
"""{before, after: what `tell` returns}."""


def check_alike(config: Config, settings: Sequence[dict[str, Any]]) -> None:
    """Raise UserError unless all runs are of train_ppo.py here and differ in MAY_DIFFER alone."""
    for run, other in zip(config.after, settings, strict=True):
        if other["script"] not in SCRIPTS:
            raise UserError(
                f"--after: {run} is a run of {other['script']}; "
                "name runs of experiments/stories/train_ppo.py"
            )
        for name in other.keys() - MAY_DIFFER:
            if other[name] != settings[0][name]:
                raise UserError(
                    f"--after: {run} has another {name} than {config.after[0]}; measure them apart"
                )


def samples_of(openings: Sequence[str], told: Told) -> list[dict[str, Any]]:
    """Return each opening with its stories before and after, and their rewards."""
    found = []
    for i, opening in enumerate(openings):
        sample: dict[str, Any] = {"opening": opening}
        for when, (stories, _) in told.items():
            sample[when] = stories[i]
            sample[f"{when}_score"] = happy.parts(opening, stories[i])["score"]
        found.append(sample)
    return found


def main(config: Config) -> dict[str, Any]:
    """Sample and measure all runs, write results.json, print the tables; return the results."""
    settings = [load_config(run) for run in config.after]
    check_alike(config, settings)

    # The split's openings, again and again, until there are n.
    openings = happy.openings(config.split)
    rounds = -(-config.n // len(openings))
    openings = (openings * rounds)[: config.n]

    # Stories of the original and of each run, under the same keys.
    model = stored_model(config.before)
    tokenizer = Tokenizer.load(config.before)
    tell = make_tell(model, tokenizer, settings[0]["max_prompt"], settings[0]["max_new_tokens"])
    original = load_params(config.before)
    runs = []
    shown = []
    for number, (run, other) in enumerate(zip(config.after, settings, strict=True)):
        seed = config.seed + number
        told: Told = {
            "before": tell(original, original, openings, seed),
            "after": tell(load_params(run), original, openings, seed),
        }
        row: dict[str, Any] = {"seed": other["seed"]}
        row["iteration"] = finished_steps((pathlib.Path(run) / "checkpoints").absolute())[0]
        for when, (stories, counts) in told.items():
            row[when] = summarise(openings, stories, counts)
        after, _ = told["after"]
        row["formula"], _ = commonest_triple(after)
        runs.append(row)
        if number == 0:
            shown = samples_of(openings[: config.shown], told)

    # Means over the seeds, beside what was measured of each.
    means: dict[str, Any] = {}
    for when in ("before", "after"):
        means[when] = {name: interval([run[when][name] for run in runs]) for name in ROWS}
    words = ["--after", *config.after, f"--n={config.n}"]
    results = {
        "command": "python experiments/stories/measure.py " + " ".join(words),
        "n": config.n,
        "settings": {name: settings[0][name] for name in KEPT},
        **means,
        "runs": runs,
        "samples": shown,
    }
    pathlib.Path(config.out).write_text(json.dumps(results, indent=1) + "\n")
    print(markdown(results), samples(results), sep="\n\n")
    return results


if __name__ == "__main__":
    flags.run(main, Config)
