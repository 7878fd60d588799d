"""Leave out the rows of a file that are duplicates, of low quality, toxic or personal.

    python -m collect.clean --data=pages.jsonl --rules=exact,near,gopher --out=clean.jsonl

Rows are written as they stand, so that every training script reads the file as it did --data.
Beside it, `<out>.dropped.jsonl` names each row that was left out or changed, the rule and the
reason. The rules and their papers: docs/less_data.md.
"""

import runtime.interrupt  # noqa: F401

import collections
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from collect.examples import (
    as_line,
    folded,
    length_within,
    lines_in,
    open_rows,
    rows_as_written,
    schema_of,
)
from collect.scores import perplexities
from data import text_rules
from data.bad_rows import OnBadRow, set_on_bad_row
from data.fields import FieldError
from data.near_duplicates import LEAST_NEAR, NearDuplicates
from data.records import SCHEMAS, Schema
from data.source import Source
from data.sources import is_file
from data.text_classifier import TextClassifier
from data.text_rules import Rule
from data.tokenizer import texts_of
from model_config import stored_model
from responses import in_parts, load_run
from runtime import flags
from runtime.errors import refuse_unread, require
from runtime.run_folder import atomic_text
from sharding import MeshConfig, make_mesh

PART = 1024
"""Texts a call of the classifier."""


@dataclasses.dataclass(frozen=True)
class Config:
    # What is read and written
    data: str = "pages.jsonl"
    """Rows: a file in any layout that training reads."""
    out: str = "runs/clean.jsonl"
    """File to write."""
    rules: str = "exact,near"
    """Rules, in the order in which they are asked, parted by commas (docs/less_data.md)."""
    schema: Schema | None = None
    """How rows are read; None: as comparison, unpaired, steps, chat, text or prompt, the first
    that reads the first row."""
    on_bad_row: OnBadRow = "stop"
    """stop: end at the first bad row of a file; skip: leave bad rows out, with a note."""

    # Rules
    near: float = 0.7
    """Least similarity of near duplicates: what two texts share of their word 3-grams."""
    init: str | None = None
    """Run of the language model whose perplexity is measured (perplexity)."""
    perplexity_share: float = 0.1
    """Share of the rows left out, those of the highest perplexity."""
    length: int | None = None
    """Longest text, in tokens, whose perplexity is measured; None: the model's context."""
    good: str | None = None
    """File of rows as they should be (classifier)."""
    bad: str | None = None
    """File of rows as they should not be (classifier)."""
    least_good: float = 0.5
    """Least chance that a row is a good one (classifier)."""
    lexicon: str | None = None
    """File of unwanted words and phrases, one a line (lexicon)."""
    personal: Literal["replace", "drop"] = "replace"
    """Replace personal data by <email> and the like, or drop the row that has some (personal)."""


class Given(NamedTuple):
    """The settings and the rows that a rule reads."""

    config: Config
    source: Source

    def text(self, row: int) -> str:
        """Return all text of a row, whatever its schema."""
        return "\n".join(texts_of(self.source[row]))


Found = Iterator[tuple[int, str]]
"""Rows that a rule objects to, each with the reason."""
Finder = Callable[[Given, Sequence[int]], Found]
"""find(given, rows): those of the rows to which a rule objects."""


# ---- Rules: of the rows that are left, those that go ----


def exact(given: Given, rows: Sequence[int]) -> Found:
    """Find rows that repeat an earlier one, labels and all, but for case and spaces."""
    first: dict[bytes, int] = {}
    for row in rows:
        record = json.dumps(folded(given.source[row]), sort_keys=True)
        digest = hashlib.sha256(record.encode()).digest()
        earlier = first.setdefault(digest, row)
        if earlier != row:
            yield row, f"as row {earlier + 1}"


def near(given: Given, rows: Sequence[int]) -> Found:
    """Find rows that share most of their word n-grams with an earlier one that is kept."""
    seen = NearDuplicates(given.text, given.config.near)
    for row in rows:
        found = seen.before(row)
        if found is None:
            continue
        earlier, similarity = found
        yield row, f"{similarity:.2f} of row {earlier + 1}"


def by_text(rule: Rule) -> Finder:
    """Make a function that finds the rows to whose text a rule objects."""

    def find(given: Given, rows: Sequence[int]) -> Found:
        for row in rows:
            reason = rule(given.text(row))
            if reason is not None:
                yield row, reason

    return find


def lexicon(given: Given, rows: Sequence[int]) -> Found:
    """Find rows with an unwanted word."""
    rule = text_rules.lexicon_rule(lines_in("lexicon", given.config.lexicon or ""))
    yield from by_text(rule)(given, rows)


def perplexity(given: Given, rows: Sequence[int]) -> Found:
    """Find the share of rows of the highest perplexity (Wenzek et al. 2020, section 3.3)."""
    config = given.config
    most = round(config.perplexity_share * len(rows))
    if most == 0:
        return
    run = config.init or ""
    model = load_run(run)
    model = model._replace(params=jax.device_put(model.params))

    # The perplexity of the rows that are left.
    source = given.source
    left = dataclasses.replace(source, rows=[source.rows[row] for row in rows])
    scores_N = perplexities(model, left, longest(run, config.length))

    # The highest, in the order of the file.
    highest = np.argsort(scores_N, kind="stable")[-most:]
    for place in sorted(highest.tolist()):
        yield rows[place], f"{scores_N[place]:.4g}"


def classifier(given: Given, rows: Sequence[int]) -> Found:
    """Find rows that look more like those of --bad than like those of --good."""
    # Trained first, on the rows of the two files.
    config = given.config
    good = texts_in(config.good or "")
    bad = texts_in(config.bad or "")
    model = TextClassifier(good, bad)
    for start in in_parts(len(rows), PART, "classifier", "row"):
        part = rows[start : start + PART]
        chances_N = model.chances([given.text(row) for row in part])
        for row, chance in zip(part, chances_N.tolist(), strict=True):
            if chance < config.least_good:
                yield row, f"{chance:.3f}"


def personal(given: Given, rows: Sequence[int]) -> Found:
    """Find rows with personal data."""
    for row in rows:
        _, kinds = text_rules.without_personal_data(given.text(row))
        if kinds:
            yield row, text_rules.counted(kinds)


RULES: dict[str, Finder] = {
    "exact": exact,
    "near": near,
    "lexicon": lexicon,
    "perplexity": perplexity,
    "classifier": classifier,
    "personal": personal,
}
RULES |= {name: by_text(rule) for name, rule in (text_rules.GOPHER | text_rules.C4).items()}
GROUPS = {"gopher": list(text_rules.GOPHER), "c4": list(text_rules.C4)}
"""Names of several rules."""


# ---- The command ----


def rules_of(config: Config) -> list[str]:
    """Return the rules that --rules names, in their order; UserError for one that is none."""
    names: list[str] = []
    for name in config.rules.split(","):
        names += GROUPS.get(name, [name])
    for name in names:
        known = ", ".join([*GROUPS, *RULES])
        require(
            name in RULES, f"--rules={config.rules}: {name!r} is no rule; give some of {known}"
        )
        require(names.count(name) == 1, f"--rules={config.rules}: {name} stands there twice")
    return names


def check(config: Config) -> None:
    """Raise UserError for settings that cannot run together."""
    names = rules_of(config)
    require(is_file(config.data), f"--data={config.data}: is no file; there is nothing to clean")

    # What a rule needs.
    needs = (
        ("perplexity", "init"),
        ("classifier", "good"),
        ("classifier", "bad"),
        ("lexicon", "lexicon"),
    )
    for name, needed in needs:
        require(
            name not in names or getattr(config, needed) is not None,
            f"--rules={config.rules}: {name} needs --{needed}",
        )
    require(
        LEAST_NEAR <= config.near <= 1,
        f"--near={config.near:g}: must be between {LEAST_NEAR:g} and 1; what is less alike is "
        "not found",
    )
    refuse_unread(
        config,
        {
            "near": ("near" in names, "--rules=near"),
            "init": ("perplexity" in names, "--rules=perplexity"),
            "perplexity_share": ("perplexity" in names, "--rules=perplexity"),
            "length": ("perplexity" in names, "--rules=perplexity"),
            "good": ("classifier" in names, "--rules=classifier"),
            "bad": ("classifier" in names, "--rules=classifier"),
            "least_good": ("classifier" in names, "--rules=classifier"),
            "lexicon": ("lexicon" in names, "--rules=lexicon"),
            "personal": ("personal" in names, "--rules=personal"),
        },
    )
    # What rules read is opened before the first of them runs.
    if config.lexicon is not None:
        lines_in("lexicon", config.lexicon)
    for name, data in (("good", config.good), ("bad", config.bad)):
        require(data is None or is_file(data), f"--{name}={data}: is no file; name one")
        if data is not None:
            open_rows(data, schema_of(data, None), seed=0)
    if config.init is not None:
        longest(config.init, config.length)


def longest(run: str, length: int | None) -> int:
    """Return the most tokens of a text; UserError where the model's context is shorter."""
    return length_within(length, stored_model(run).context)


def texts_in(data: str) -> list[str]:
    """Return the text of each row of a file."""
    source = open_rows(data, schema_of(data, None), seed=0)
    return ["\n".join(texts_of(source[i])) for i in range(len(source))]


def replaced(value: Any) -> Any:
    """Return a row, or what it holds, without personal data in its texts."""
    if isinstance(value, str):
        return text_rules.without_personal_data(value)[0]
    if isinstance(value, dict):
        return {key: replaced(item) for key, item in value.items()}
    if isinstance(value, list):
        return [replaced(item) for item in value]
    return value


def without_personal_data(line: str, schema: Schema) -> str | None:
    """Return a row, as JSON, without personal data in its texts; None where some is left.

    Some is left where it is outside texts: in a number, or in messages written as JSON text.
    """
    row = replaced(json.loads(line))
    # Looked for once more in what a script would read of the row.
    try:
        texts = texts_of(SCHEMAS[schema](row))
        _, kinds = text_rules.without_personal_data("\n".join(texts))
    except FieldError:
        return None
    return None if kinds else as_line(row)


def main(config: Config) -> dict[str, int]:
    """Write the rows that stay, whole or not at all; return how many rows each rule found.

    Also the number of all `rows`, and of those `kept`.
    """
    check(config)
    set_on_bad_row(config.on_bad_row)
    make_mesh(MeshConfig())
    schema = schema_of(config.data, config.schema)
    given = Given(config, open_rows(config.data, schema, seed=0))
    rows = list(range(len(given.source)))

    # The files are opened at once: a place that cannot be written shows before models run.
    beside = f"{config.out}.dropped.jsonl"
    counts = collections.Counter[str]()
    with atomic_text(config.out, anew=True) as out, atomic_text(beside, anew=True) as dropped:
        # Rules one after the other, each over what is left.
        left = rows
        found: dict[int, tuple[str, str]] = {}
        changed: dict[int, str] = {}
        for name in rules_of(config):
            objections = dict(RULES[name](given, left))
            counts[name] = len(objections)
            if name == "personal" and config.personal == "replace":
                changed = objections
                continue
            found |= {row: (name, reason) for row, reason in objections.items()}
            left = [row for row in left if row not in objections]
        require(bool(left), f"{config.data}: no row is left; leave out some of {config.rules}")

        # The rows as they stand, in their order.
        lines = rows_as_written(config.data, schema, given.source)
        for row, line in enumerate(lines):
            written: str | None = line
            if row in changed and row not in found:
                written = without_personal_data(line, schema)
                if written is None:
                    found[row] = ("personal", f"{changed[row]}, not in a text that can be changed")
            if row not in found:
                out.write(f"{written}\n")
        require(len(found) < len(rows), f"{config.data}: no row is left of those to be changed")

        # What went, or was changed, and why.
        for row in rows:
            if row not in found and row not in changed:
                continue
            name, reason = found.get(row) or ("personal", changed[row])
            told = {"row": row + 1, "rule": name, "reason": reason, "kept": row not in found}
            dropped.write(json.dumps(told) + "\n")
    told_counts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    kept = len(rows) - len(found)
    print(f"{config.out}: {kept:,} of {len(rows):,} rows; found by {told_counts}")
    print(f"{beside} tells of each row that was left out or changed")
    return {"rows": len(rows), "kept": kept, **counts}


if __name__ == "__main__":
    flags.run(main, Config)
