"""Weights for a mixture's next stage: more of the sources on which a model still improves.

    python -m collect.reweigh --data='a.jsonl:1 b.jsonl:1' --before=runs/lm --init=runs/sft

Prints how far the held-out loss of each source fell from one run to the other, and a mixture for
--data of the next run, or behind a `->`. Learning progress as the signal: Graves et al. 2017.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np

from collect.examples import length_within, record_example
from collect.scores import make_response_losses
from data.bad_rows import OnBadRow, set_on_bad_row
from data.mixture import Mixture
from data.source import Source
from data.sources import open_source
from data.tokenizer import Tokenizer
from model_config import stored_model
from responses import load_run
from runtime import flags
from runtime.errors import UserError, require
from runtime.mixtures import is_mixture
from sharding import MeshConfig, make_mesh


@dataclasses.dataclass(frozen=True)
class Config:
    data: str = "a.jsonl:1 b.jsonl:1"
    """The mixture."""
    schema: Literal["chat", "text"] = "chat"
    """How its sources are read: conversations, or documents."""
    on_bad_row: OnBadRow = "stop"
    """stop: end at the first bad row of a file; skip: leave bad rows out, with a note."""
    before: str = "runs/align/lm"
    """Run of the language model before it was trained."""
    init: str = "runs/align/sft"
    """Run of the language model after it was trained."""
    floor: float = 0.05
    """Least share of a source, so that what is learnt is kept, and seen to be forgotten."""
    records: int = 256
    """Held-out records of each source, at most."""
    length: int | None = None
    """Longest record, in tokens; None: the shorter context of the two."""
    seed: int = 0
    """Seed of the built-in world."""


def progress_shares(progress_P: Sequence[float], floor: float) -> list[float]:
    """Return a share for each source in proportion to its progress, none below `floor`.

    A source that has got worse counts as one without progress. Where no source has any, all have
    equal shares. Shares add up to 1. Raises ValueError for a floor that so many sources cannot
    have.
    """
    count = len(progress_P)
    if not 0 <= floor * count <= 1:
        raise ValueError(f"{count} shares of at least {floor}")
    gains_P = np.maximum(np.array(progress_P, float), 0)
    if gains_P.sum() == 0:
        gains_P = np.ones(count)

    # Each has the floor; what that leaves is shared out by progress.
    spare = 1 - floor * count
    shares_P = floor + spare * gains_P / gains_P.sum()
    return shares_P.tolist()


def held_out_losses(run: str, parts: Sequence[Source], length: int, most: int) -> list[float]:
    """Return a model's mean loss a token, in nats, on the first `most` records of each part.

    Raises UserError for one that is not finite, naming the run and the part.
    """
    config, tokenizer, params = load_run(run)
    params = jax.device_put(params)
    measure = make_response_losses(config, tokenizer, length)
    means = []
    for part in parts:
        examples = [record_example(record, tokenizer, length) for record in part.first(most)]
        loss_N, tokens_N = measure(params, examples).T
        mean = float(loss_N.sum() / max(tokens_N.sum(), 1))
        # A loss that is not a number would make all shares so.
        require(
            math.isfinite(mean),
            f"{run}: its loss on {part.name} is {mean}; name a run whose training went well",
        )
        means.append(mean)
    return means


def main(config: Config) -> dict[str, float]:
    """Print the losses of each source and the next mixture; return the share of each source."""
    # The mixture's sources; one of conversations may have documents among them.
    set_on_bad_row(config.on_bad_row)
    make_mesh(MeshConfig())
    with_texts = config.schema == "chat"
    source = open_source(
        config.data, config.schema, "heldout", seed=config.seed, with_texts=with_texts
    )
    if not isinstance(source, Mixture):
        raise UserError(f"--data={config.data}: is no mixture; name several sources with weights")
    labels = [part.label for part in source.parts]
    require(
        0 <= config.floor * len(labels) <= 1,
        f"--floor={config.floor:g}: must be at least 0 and at most {1 / len(labels):.3g}, for "
        f"{len(labels)} sources",
    )

    # Held-out losses before and after, a token: the same tokens.
    before, after = (Tokenizer.load(run).sha256 for run in (config.before, config.init))
    require(
        before == after,
        f"--before={config.before}: another tokenizer than --init={config.init}, so that their "
        "losses a token do not compare; name runs of one",
    )
    context = min(stored_model(run).context for run in (config.before, config.init))
    length = length_within(config.length, context, "the models'")
    parts = [part.source for part in source.parts]
    before_P = held_out_losses(config.before, parts, length, config.records)
    after_P = held_out_losses(config.init, parts, length, config.records)

    # What the next stage draws: more of what got better.
    progress_P = [before - after for before, after in zip(before_P, after_P, strict=True)]
    shares_P = progress_shares(progress_P, config.floor)
    rows = zip(labels, before_P, after_P, shares_P, strict=True)
    for label, before, after, share in rows:
        print(f"{label}: held-out loss {before:.3f} -> {after:.3f}; share {share:.4f}")
        if round(share, 4) == 0:
            print(f"{label}: left out, its share is none; --floor keeps it in")
    words = next_words(source, shares_P)
    print(f"--data='{' '.join(words)}'")
    return dict(zip(labels, shares_P, strict=True))


def next_words(source: Mixture, shares_P: Sequence[float]) -> list[str]:
    """Return the words of a mixture with these shares, its sources read as before.

    Sources whose share is none are left out. Where one is left that is read as any file, its name
    is the only word.
    """
    # What each source is called by itself: its label also says how it is read.
    names = {}
    for stage in source.stages:
        for share in stage.shares:
            names[share.label] = share.data

    words = []
    for part, weight in zip(source.parts, shares_P, strict=True):
        name = names[part.label]
        options = part.label.removeprefix(name)
        # To the digits that are written.
        if round(weight, 4) > 0:
            words.append(f"{name}:{weight:.4f}{options}")

    # A single source with a weight would be taken for the name of a file.
    if len(words) == 1 and not is_mixture(words[0]):
        return [words[0].rpartition(":")[0]]
    if any(stage.by_tokens for stage in source.stages):
        words.append("unit=tokens")
    return words


if __name__ == "__main__":
    flags.run(main, Config)
