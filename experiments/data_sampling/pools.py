"""Pools of judged responses, clean and damaged, and the rows that each sampler chooses of them.

A pool is PAIRS prompts, each with a response of the SFT model that passes the gold program and one
that does not. DPO's rows are the pairs; KTO's are their responses one by one.
"""

import hashlib
import json
import pathlib
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from collect import select
from collect.embeddings import embed
from data.batches import Batch, collate, encode_comparison, pad_comparisons
from data.preferences import with_mismatched
from data.records import Record, comparison_record, unpaired_record
from data.selection import generator
from data.sources import Source
from model import LanguageModel, Params, init_and_apply
from objectives import direct
from responses import LoadedRun, has_ended, make_sampler
from runtime.writes import atomic_text
from sampling import SamplingConfig
from sharding import to_host
from tasks import world

Aligner = Literal["dpo", "kto"]
Pair = dict[str, str]
"""A row {"prompt", "chosen", "rejected"}."""
PAIRS = 2000
"""Prompts of a pool, each with two responses."""
LENGTH = 32
"""Tokens of a prompt and a response together; pairs with a longer one are passed over."""
NEW_TOKENS = 20
"""Longest response, in tokens."""
TRIES = 4
"""Responses sampled to a prompt, among which one must pass and one must fail."""
PROMPTS = 512
"""Prompts sampled at a time."""
REFERENCE_ROWS = 500
"""Rows whose log-probabilities under the reference are computed at a time."""

# ---- Clean ----


def make_pairs(model: LoadedRun, count: int, seed: int) -> list[Pair]:
    """Sample responses of `model` to the world's prompts of `seed` until `count` pairs are had.

    A pair is the first response to a prompt that passes all criteria, and the first that fails
    one. Responses without an end, and empty ones, are in none.
    """
    tokenizer = model.tokenizer
    sampling = SamplingConfig(1.0, max_new_tokens=NEW_TOKENS)
    respond = make_sampler(model.config, sampling, tokenizer, n=TRIES)
    pairs: list[Pair] = []
    start = 0
    while len(pairs) < count:
        # Responses to the next prompts.
        prompts = [world.prompt(start + i, seed=seed).text for i in range(PROMPTS)]
        tokens = [tokenizer.prompt(text) for text in prompts]
        key = jax.random.fold_in(jax.random.key(seed), start)
        responses = respond(model.params, tokens, key, rows=PROMPTS)
        ended = has_ended(responses, tokenizer.ends)
        start += PROMPTS

        # Of each prompt the first that passes and the first that fails.
        for i, prompt in enumerate(prompts):
            found: dict[bool, str] = {}
            room = LENGTH - len(tokens[i])
            for j in range(i * TRIES, (i + 1) * TRIES):
                text = tokenizer.decode(responses[j])
                if ended[j] and text.strip() and len(responses[j]) <= room:
                    found.setdefault(world.gold(prompt, text).all, text)
            if len(found) == 2:
                pair = {"prompt": prompt, "chosen": found[True], "rejected": found[False]}
                pairs.append(pair)
    return pairs[:count]


def weights_sum(params: Params) -> str:
    """Return the beginning of the hash of a model's weights, wherever its run lies."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:12]


def kept_pairs(folder: str, model: LoadedRun, count: int, seed: int) -> list[Pair]:
    """Return `make_pairs` of `model`; kept in `folder`, made once."""
    weights = weights_sum(model.params)
    path = pathlib.Path(folder) / f"pairs-{weights}-{count}-{seed}.jsonl"
    if not path.exists():
        pairs = make_pairs(model, count, seed)
        with atomic_text(str(path)) as file:
            file.writelines(json.dumps(pair) + "\n" for pair in pairs)
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- Damaged ----

DUPLICATES = 0.8
"""Share of the pairs that are near-duplicates."""
ORIGINALS = 0.01
"""Pairs that they are near-duplicates of, as a share of the pool."""
NOISE = 0.05
"""Share of the pairs whose responses are noise."""
FLIPPED = 0.2
"""Share of the pairs whose labels are flipped."""


def some_rows(count: int, share: float, rng: random.Random) -> list[int]:
    """Draw a share of `count` rows, to the nearest whole number."""
    return rng.sample(range(count), round(share * count))


def with_duplicates(pairs: Sequence[Pair], rng: random.Random) -> list[Pair]:
    """Replace DUPLICATES of the pairs by others of the pool, their prompts typed anew.

    They are of ORIGINALS of the pool, each as often as any other: capitals and marks differ.
    """
    damaged = list(pairs)
    replaced = some_rows(len(pairs), DUPLICATES, rng)
    rest = sorted(set(range(len(pairs))) - set(replaced))
    originals = rng.sample(rest, max(1, round(ORIGINALS * len(pairs))))
    for number, row in enumerate(replaced):
        original = pairs[originals[number % len(originals)]]
        damaged[row] = {**original, "prompt": world.typed(original["prompt"], rng)}
    return damaged


def with_noise(pairs: Sequence[Pair], rng: random.Random) -> list[Pair]:
    """Replace both responses of NOISE of the pairs by those of another pair, their words shuffled.

    They are as long as responses are, and neither answers nor says anything.
    """
    damaged = list(pairs)
    for row in some_rows(len(pairs), NOISE, rng):
        other = rng.choice([*pairs[:row], *pairs[row + 1 :]])
        noise = {}
        for side in ("chosen", "rejected"):
            words = other[side].split()
            noise[side] = " ".join(rng.sample(words, len(words)))
        damaged[row] = {**pairs[row], **noise}
    return damaged


def with_flips(pairs: Sequence[Pair], rng: random.Random) -> list[Pair]:
    """Swap the two responses of FLIPPED of the pairs, and so flip both labels."""
    damaged = list(pairs)
    for row in some_rows(len(pairs), FLIPPED, rng):
        pair = pairs[row]
        damaged[row] = {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]}
    return damaged


def undamaged(pairs: Sequence[Pair], rng: random.Random) -> list[Pair]:
    """Return the pairs as they are."""
    return list(pairs)


POOLS: dict[str, Callable[[Sequence[Pair], random.Random], list[Pair]]] = {
    "clean": undamaged,
    "duplicates": with_duplicates,
    "noise": with_noise,
    "flipped": with_flips,
}
"""What is done to the clean pairs, by the pool's name."""

# ---- As an aligner reads them ----


class Pool(NamedTuple):
    """The rows of a pool for one aligner."""

    source: Source
    """Comparisons (dpo) or judged responses (kto)."""
    rows: Batch
    """All rows as one batch [N, 2, T] of train_dpo.py, with `reference_BC`, the log-probabilities
    under the SFT model in nats. kto's second candidate answers another prompt."""
    name: str
    """Hash of what the rows say."""


def make_pool(
    pairs: Sequence[Pair], aligner: Aligner, model: LoadedRun, name: str = "pool"
) -> Pool:
    """Make the rows that `aligner` trains on; `model` is the reference."""
    # A pair is one row of dpo, and two of kto, whose estimate of the KL needs a third response.
    if aligner == "dpo":
        source = source_of([comparison_record(pair) for pair in pairs], name)
        compared = source
    else:
        source = source_of([row for pair in pairs for row in judged(pair)], name)
        compared = with_mismatched(source)

    # One array of all rows, each as wide as any other.
    records = [compared[i] for i in range(len(compared))]
    pad = partial(pad_comparisons, fixed=True)
    rows = collate(encode_comparison, pad, records, model.tokenizer, LENGTH)
    assert len(rows["margin_B"]) == len(source), "a row does not fit"
    _, apply = init_and_apply(LanguageModel(model.config))
    rows["reference_BC"] = reference_logprobs(apply, model.params, rows)
    digest = hashlib.sha256(json.dumps([aligner, *pairs]).encode()).hexdigest()
    return Pool(source, rows, digest)


def judged(pair: Pair) -> list[Record]:
    """Return the two responses of a pair as judged ones, the desirable first."""
    records = []
    for side in ("chosen", "rejected"):
        row = {"prompt": pair["prompt"], "response": pair[side], "desirable": side == "chosen"}
        records.append(unpaired_record(row))
    return records


def source_of(records: Sequence[Record], name: str) -> Source:
    """Make a source of records in memory."""
    return Source(name, rows=range(len(records)), read=records.__getitem__)


def reference_logprobs(apply: Callable[..., Any], params: Params, rows: Batch) -> np.ndarray:
    """Return log p(response | prompt) of each candidate, [N, C] nats."""
    logprobs = jax.jit(partial(direct.candidate_logprobs, apply))
    count = len(rows["margin_B"])
    found = []
    for start in range(0, count, REFERENCE_ROWS):
        part = {name: x[start : start + REFERENCE_ROWS] for name, x in rows.items()}
        found.append(to_host(logprobs(params, part)))
    return np.concatenate(found)


# ---- Samplers ----

SHUFFLED = "_shuffled"
"""Ending of a null control: each row has the embedding of another."""
SAMPLERS: dict[str, dict[str, Any]] = {
    "random": {"method": "random"},
    "isa_A": {"method": "isa", "reading": "A"},
    "isa_A" + SHUFFLED: {"method": "isa", "reading": "A"},
    "isa_B": {"method": "isa", "reading": "B"},
    "isa_C": {"method": "isa", "reading": "C"},
    "isa_D": {"method": "isa", "reading": "D"},
    "density": {"method": "density"},
    "log_det": {"method": "log_det"},
    "facility": {"method": "facility"},
    "k_center": {"method": "k_center"},
    "perplexity": {"method": "perplexity"},
    "ifd": {"method": "ifd"},
    "length": {"method": "length"},
}
"""Settings of collect.select by the sampler's name: those that need the SFT model alone."""


class Seen(NamedTuple):
    """What a sampler chooses by: the same at every budget."""

    given: select.Given
    scores_N: np.ndarray
    """The score of each row; nan for a sampler without scores."""


def look(sampler: str, pool: Pool, run: str, model: LoadedRun, seed: int) -> Seen:
    """Embed and score the pool's rows as `sampler` needs it.

    `run`: the SFT model's, which is `model`: it embeds and scores. `seed`: of what is drawn.
    """
    config = select.Config(init=run, seed=seed, **SAMPLERS[sampler])
    key = jax.random.key(seed)
    embeddings = None
    if config.method in select.BY_EMBEDDINGS:
        how = {"length": LENGTH, "layer": None}
        embeddings = np.asarray(embed(run, model, pool.source, pool.name, **how))
        if sampler.endswith(SHUFFLED):
            embeddings = generator(key).permutation(embeddings)
    given = select.Given(config, pool.source, embeddings, LENGTH, key)
    scores_N = np.full(len(pool.source), np.nan)
    if config.method in select.SCORES:
        scores_N = select.SCORES[config.method](given)
    return Seen(given, scores_N)


def choose(seen: Seen, k: int) -> np.ndarray:
    """Return the k rows that the sampler chooses, [k] indices."""
    given = seen.given
    select_rows = select.selection_of(given.config)
    return select_rows(given.embeddings, seen.scores_N, None, k, given.key)
