"""Choose the rows of a file that are worth training on, by any of fourteen methods.

    python -m collect.select --data=pairs.jsonl --method=density --k=0.1 --init=runs/sft \
        --out=chosen.jsonl

Rows are written as they stand, so that every training script reads the file as it did --data.
Beside it, `<out>.scores.jsonl` tells of every row its score, whether it was chosen and as which.
The methods and their papers: docs/less_data.md.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
import json
import math
from collections.abc import Callable
from types import ModuleType
from typing import Literal, NamedTuple, TextIO

import jax
import numpy as np

from collect import influence, scores
from collect.embeddings import embed
from collect.examples import labels_of, length_within, open_rows, rows_as_written, schema_of
from data import selection
from data.bad_rows import OnBadRow, set_on_bad_row
from data.records import Schema
from data.selection import Select
from data.sources import Source, is_file
from data.tokenizer import Tokenizer
from model_config import stored_model
from responses import LoadedRun, load_run
from runtime import flags
from runtime.data_files import joint_sum
from runtime.errors import UserError, refuse_unread, require
from runtime.run_folder import atomic_text
from sharding import MeshConfig, make_mesh

Method = Literal[
    "random",
    "isa",
    "density",
    "log_det",
    "facility",
    "k_center",
    "ask_llm",
    "perplexity",
    "ifd",
    "length",
    "margin",
    "implicit_margin",
    "less",
    "active",
]
Take = Literal["high", "low", "middle", "first"]
TAKES: dict[Take, Select] = {
    "high": selection.highest,
    "low": selection.lowest,
    "middle": selection.middle,
    "first": selection.first_yes,
}
BY_SCORE: dict[str, Take] = {
    "isa": "high",
    "ask_llm": "first",
    "perplexity": "low",
    "ifd": "high",
    "length": "high",
    "margin": "high",
    "implicit_margin": "high",
    "less": "high",
    "active": "high",
}
"""Methods that take rows by the order of their scores, and which of them."""
BY_EMBEDDINGS = ("isa", "density", "log_det", "facility", "k_center")
OF_PAIRS = ("margin", "implicit_margin", "active")
"""Methods that compare the best response of a comparison with the worst."""
SETS: dict[str, Select] = {
    "random": selection.random_rows,
    "density": selection.inverse_propensity,
    "log_det": selection.log_det,
    "facility": selection.facility_location,
    "k_center": selection.k_center,
}
"""Methods that choose in another way."""


@dataclasses.dataclass(frozen=True)
class Config:
    # What is chosen from what
    data: str = "world"
    """Rows: a .jsonl[.gz] file in any layout that training reads, world, or tfds:<name>."""
    out: str = "runs/chosen.jsonl"
    """File to write."""
    method: Method = "random"
    """How rows are chosen (docs/less_data.md)."""
    k: float = 0.1
    """Rows to choose: a share below 1, or a number."""
    schema: Schema | None = None
    """How rows are read; None: as comparison, unpaired, steps, chat, text or prompt, the first
    that reads the first row."""
    on_bad_row: OnBadRow = "stop"
    """stop: end at the first bad row of a file; skip: leave bad rows out, with a note."""
    rows: int | None = None
    """Rows chosen among, the first ones; None: all of a file."""
    within_labels: bool = False
    """Keep the share of each label (unpaired rows: desirable or not)."""

    # Models
    init: str = "runs/align/sft"
    """Run of the language model that embeds, scores, or is asked."""
    reference: str | None = None
    """Run of DPO's reference (implicit_margin)."""
    reward: str | None = None
    """Runs of reward models, parted by commas (margin: one; active: one or more)."""
    validation: str | None = None
    """File of rows that show what is wanted (less)."""

    # Methods
    take: Take | None = None
    """Which scores: high, low, middle, or first, as they stand, of those above 1/2 (ask_llm).
    None: first for ask_llm, low for perplexity, else high."""
    reading: Literal["A", "B", "C", "D"] = "A"
    """Reading of ISA's printed algorithm: A outliers, B and C the densest, D the average."""
    uncertainty: Literal["entropy", "margin", "disagreement", "bald"] = "entropy"
    """Score by which active chooses comparisons; the last two need several reward models."""
    layer: int | None = None
    """Layers that are run for an embedding; None: all."""
    project: int = 256
    """Numbers of an embedding; wider ones are projected at random, which keeps distances."""
    warmup: int = 32
    """Updates of the adapters before gradients are taken (less)."""
    validation_records: int = 256
    """Rows of --validation that are read, at most."""

    # Run
    length: int | None = None
    """Longest prompt and response together, in tokens; None: the model's context."""
    seed: int = 0
    """Seed of what is drawn, and of the built-in world."""


def check(config: Config) -> None:
    """Raise UserError for settings that cannot run together."""
    method = config.method
    require(
        config.k < 1 or config.k == int(config.k),
        f"--k={config.k:g}: must be a whole number of rows, or a share below 1",
    )
    require(
        is_file(config.data) or config.rows is not None,
        f"--data={config.data}: has no end; say how many rows to choose among (--rows)",
    )

    # What a method cannot do without.
    needed = {"implicit_margin": "reference", "margin": "reward", "active": "reward"}
    needed["less"] = "validation"
    name = needed.get(method)
    if name is not None and getattr(config, name) is None:
        raise UserError(f"--method={method}: needs --{name}")
    several = config.uncertainty in ("disagreement", "bald")
    require(
        method != "active" or not several or "," in (config.reward or ""),
        f"--uncertainty={config.uncertainty}: compares reward models; name several in --reward",
    )
    require(
        method != "margin" or "," not in (config.reward or ""),
        f"--reward={config.reward}: --method=margin reads one reward model",
    )

    # A file that may be left out.
    if method == "isa":
        load_isa()

    # What it does not read.
    refuse_unread(
        config,
        {
            "reference": (method == "implicit_margin", "--method=implicit_margin"),
            "reward": (method in ("margin", "active"), "--method=margin or active"),
            "validation": (method == "less", "--method=less"),
            "take": (method in BY_SCORE, "a method that takes rows by their scores"),
            "reading": (method == "isa", "--method=isa"),
            "uncertainty": (method == "active", "--method=active"),
            "layer": (method in BY_EMBEDDINGS, "a method on embeddings"),
            "project": (method in BY_EMBEDDINGS, "a method on embeddings"),
            "length": (method not in ("random", "length"), "a method that runs a model"),
            "warmup": (method == "less", "--method=less"),
            "validation_records": (method == "less", "--method=less"),
        },
    )


def load_isa() -> ModuleType:
    """Import data/selection_isa.py, which may be left out; UserError where it is."""
    try:
        from data import selection_isa
    except ImportError:
        raise UserError(
            "--method=isa: data/selection_isa.py is left out of this copy; use another method"
        ) from None
    return selection_isa


# ---- Embeddings and scores ----


def embeddings_of(config: Config, source: Source, length: int, key: jax.Array) -> np.ndarray:
    """Return the embeddings of the rows, [N, D] float32, D at most --project.

    What is not projected is memory-mapped from where it is kept.
    """
    # By what the rows are, and how many.
    content = joint_sum(config.data) if is_file(config.data) else f"{config.data} {config.seed}"
    which = f"{content} {config.schema} {len(source)}"
    wide = embed(
        config.init, loaded(config.init), source, which, length=length, layer=config.layer
    )
    return selection.projected(wide, config.project, key)


def loaded(run: str, reward: bool = False) -> LoadedRun:
    """Load the run of a language model, or of a reward model, onto the device; as `load_run`."""
    found = load_run(run, reward)
    return found._replace(params=jax.device_put(found.params))


# One function a method: the score of each row, [N].


class Given(NamedTuple):
    """The inputs from which a method computes its scores."""

    config: Config
    source: Source
    embeddings: np.ndarray | None
    """For methods on embeddings, [N, D]."""
    length: int
    """Longest example, in tokens."""
    key: jax.Array


def isa(given: Given) -> np.ndarray:
    module = load_isa()
    log_likelihoods = module.log_likelihoods(given.embeddings, given.key)
    return module.entropy_changes(log_likelihoods, given.config.reading)


def density(given: Given) -> np.ndarray:
    assert given.embeddings is not None
    return selection.kernel_sums(given.embeddings, given.key)


def ask_llm(given: Given) -> np.ndarray:
    return scores.chances_of_yes(loaded(given.config.init), given.source)


def perplexity(given: Given) -> np.ndarray:
    return scores.perplexities(loaded(given.config.init), given.source, given.length)


def ifd(given: Given) -> np.ndarray:
    return scores.instruction_difficulties(loaded(given.config.init), given.source, given.length)


def length(given: Given) -> np.ndarray:
    return scores.lengths(Tokenizer.load(given.config.init), given.source)


def margins(given: Given) -> np.ndarray:
    """Return the margins of each reward model of --reward, [M, N]."""
    names = (given.config.reward or "").split(",")
    models = [loaded(name, reward=True) for name in names]
    return scores.reward_margins(models, given.source, given.length)


def margin(given: Given) -> np.ndarray:
    return margins(given)[0]


def active(given: Given) -> np.ndarray:
    return scores.UNCERTAINTIES[given.config.uncertainty](margins(given))


def implicit_margin(given: Given) -> np.ndarray:
    policy = loaded(given.config.init)
    reference = loaded(given.config.reference or "")
    return scores.implicit_margins(policy, reference, given.source, given.length)


def less(given: Given) -> np.ndarray:
    config = given.config
    wanted = config.validation or ""
    validation = open_rows(wanted, schema_of(wanted, None), config.seed)
    return influence.influences(
        loaded(config.init),
        given.source,
        validation,
        length=given.length,
        warmup=config.warmup,
        most=config.validation_records,
        key=given.key,
    )


SCORES: dict[str, Callable[[Given], np.ndarray]] = {
    "isa": isa,
    "density": density,
    "ask_llm": ask_llm,
    "perplexity": perplexity,
    "ifd": ifd,
    "length": length,
    "margin": margin,
    "active": active,
    "implicit_margin": implicit_margin,
    "less": less,
}
"""The score of each row, [N], by method; the others give none."""


# ---- The command ----


def selection_of(config: Config) -> Select:
    """Return the selection that --method makes of embeddings and scores."""
    select = SETS.get(config.method)
    if select is None:
        select = TAKES[config.take or BY_SCORE[config.method]]
    return selection.within_labels(select) if config.within_labels else select


def longest(config: Config) -> int:
    """Return the most tokens of an example; UserError where the model's context is shorter."""
    if config.method in ("random", "length"):
        return 0
    # Of reward models the shortest context.
    runs = [config.init]
    if config.method in ("margin", "active"):
        runs = (config.reward or "").split(",")
    context = min(stored_model(run).context for run in runs)
    return length_within(config.length, context)


def rows_to_choose(k: float, count: int) -> int:
    """Return the number of rows that --k means of `count`: at least 1; UserError for too many."""
    number = int(k) if k >= 1 else max(1, round(k * count))
    require(number <= count, f"--k={k:g}: there are {count} rows; choose at most as many")
    return number


def write_scores(file: TextIO, scores_N: np.ndarray, chosen: np.ndarray) -> None:
    """Write a line for each row: its number from 1, its score, whether it is chosen, as which."""
    order_N = np.zeros(len(scores_N), int)
    order_N[chosen] = np.arange(1, len(chosen) + 1)
    for i, (score, order) in enumerate(zip(scores_N.tolist(), order_N.tolist(), strict=True)):
        line = {
            "row": i + 1,
            "score": score if math.isfinite(score) else None,
            "chosen": order > 0,
            "order": order or None,
        }
        file.write(json.dumps(line) + "\n")


def main(config: Config) -> dict[str, int]:
    """Write the chosen rows, whole or not at all; return the counts of `rows` and `chosen`."""
    check(config)
    set_on_bad_row(config.on_bad_row)
    make_mesh(MeshConfig())

    # The rows, and how many of them are wanted.
    schema = schema_of(config.data, config.schema)
    require(
        schema == "comparison" or config.method not in OF_PAIRS,
        f"--method={config.method}: compares two responses, and {config.data} is read as {schema}",
    )
    config = dataclasses.replace(config, schema=schema)
    source = open_rows(config.data, schema, config.seed)
    source = dataclasses.replace(source, rows=source.rows[: config.rows])
    count = len(source)
    k = rows_to_choose(config.k, count)

    # The files are opened at once: a place that cannot be written shows before models run.
    key = jax.random.key(config.seed)
    scores_path = f"{config.out}.scores.jsonl"
    with atomic_text(config.out, anew=True) as file, atomic_text(scores_path, anew=True) as beside:
        # What the method chooses by.
        embeddings = None
        room = longest(config)
        if config.method in BY_EMBEDDINGS:
            embeddings = embeddings_of(config, source, room, key)
        given = Given(config, source, embeddings, room, key)
        scores_N = np.full(count, np.nan)
        if config.method in SCORES:
            scores_N = SCORES[config.method](given)

        # The choice.
        labels = labels_of(source, schema) if config.within_labels else None
        chosen = selection_of(config)(embeddings, scores_N, labels, k, key)

        # The rows as they stand, in their order.
        is_chosen_N = np.zeros(count, bool)
        is_chosen_N[chosen] = True
        lines = rows_as_written(config.data, schema, source)
        file.writelines(f"{line}\n" for line, kept in zip(lines, is_chosen_N, strict=True) if kept)
        write_scores(beside, scores_N, chosen)
    print(f"{config.out}: {k} of {count} rows by {config.method}; {scores_path} tells of all")
    return {"rows": count, "chosen": k}


if __name__ == "__main__":
    flags.run(main, Config)
