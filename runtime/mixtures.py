"""The words of a mixture: which sources a name of data stands for, and in what proportions.

    a.jsonl:2 b.parquet:1 world:0.5              two, one and half a part of the examples
    a.jsonl:2 b.parquet:1 unit=tokens            of the tokens
    a.jsonl:1@rows b.jsonl:2@cap=5000            parts times rows; times rows, at most 5,000
    a.jsonl:1@rows b.jsonl:1@rows temperature=2  each share to the power 1/2
    world:1 tokens=204800 -> a.jsonl:9 world:1   stages, one after the other

docs/data.md says what each word does. Knows nothing of what the sources hold.
"""

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from runtime.errors import UserError, require

ARROW = "->"
"""Stands between two stages."""
SHARE = re.compile(r"(?P<data>.+):(?P<weight>(?:\d+\.?\d*|\.\d+)(?:e-?\d+)?)(?P<options>(?:@.*)?)")
"""A source, its weight and its options, as in `a.jsonl:2@cap=5000`."""
OPTION = re.compile(r"rows|text|in_order|cap=[1-9]\d{0,17}")
SETTINGS = ("unit", "temperature", "tokens", "steps")
SETTING = re.compile(rf"({'|'.join(SETTINGS)})=(.*)")
LIKE_A_SETTING = re.compile(r"[a-z_]+=(?:\w*|[\d.e+-]+)")
"""A word and a word or number; names of files have a dot in them."""
MOST_WEIGHT = 1e15
"""Weights are below it: products with numbers of rows stay finite."""


class Share(NamedTuple):
    """A source in a stage, and how much of the stage it is."""

    data: str
    """As --data names a source by itself."""
    weight: float
    """Parts of the stage; times the rows where they count."""
    by_rows: bool = False
    """The weight is times the number of rows."""
    cap: int | None = None
    """The most rows that count; None: all."""
    as_text: bool = False
    """Documents, whatever the schema of the others."""
    in_order: bool = False
    """Rows are drawn in the order of the file."""

    @property
    def label(self) -> str:
        """The source, and how it is read, for metrics and messages."""
        return self.data + "@text" * self.as_text + "@in_order" * self.in_order


class Stage(NamedTuple):
    """Sources that are drawn from together."""

    shares: tuple[Share, ...]
    by_tokens: bool
    """Shares are of the tokens; else of the examples."""
    temperature: float
    """Each share is raised to the power 1 / temperature."""
    tokens: int | None
    """Tokens of this stage; None where `steps` says it, or the stage goes on to the end."""
    steps: int | None
    """Batches of this stage; None where `tokens` says it, or the stage goes on to the end."""


def is_mixture(data: str) -> bool:
    """Return whether a name of data is a mixture, by its words.

    It has several words, of which one ends in a weight or is the arrow; or one word with an
    option, as in `a.jsonl:1@in_order`. The path of a file or folder that exists is that path.
    """
    if os.path.exists(data):
        return False
    words = data.split()
    # A single word with a weight may as well be the name of a file: only an option tells.
    if len(words) == 1:
        share = SHARE.fullmatch(data)
        options = share["options"].split("@")[1:] if share else []
        return bool(options) and all(OPTION.fullmatch(option) for option in options)
    return any(word == ARROW or SHARE.fullmatch(word) for word in words)


def names_in(data: str) -> list[str]:
    """Return the sources that a mixture names, each once and in their order; [] for other names.

    Reads any text: mistakes in it are told by `read_mixture`.
    """
    if not is_mixture(data):
        return []
    found = []
    for word in data.split():
        if word == ARROW or _setting(word) is not None:
            continue
        share = SHARE.fullmatch(word)
        name = share["data"] if share else word
        if name not in found:
            found.append(name)
    return found


def read_mixture(data: str) -> tuple[Stage, ...]:
    """Read the stages of a mixture; one without an arrow has one.

    Raises UserError for a word that is none, naming it.
    """
    # The words of each stage.
    stages: list[list[str]] = [[]]
    for word in data.split():
        if word == ARROW:
            stages.append([])
        else:
            stages[-1].append(word)
    read = tuple(_stage(words) for words in stages)

    # Every stage but the last one has an end.
    for number, stage in enumerate(read, 1):
        is_last = number == len(read)
        has_end = stage.tokens is not None or stage.steps is not None
        if has_end and is_last:
            raise UserError(
                "mixture: the last stage goes on to the end of the run, which --steps sets; leave "
                "tokens= and steps= out of it"
            )
        require(
            has_end or is_last,
            f"mixture: stage {number} has no end; add tokens=N or steps=N before its {ARROW}",
        )
    return read


def _stage(words: Sequence[str]) -> Stage:
    """Read the words of a stage."""
    # A word is a setting or a source.
    named = []
    settings: dict[str, str] = {}
    for word in words:
        setting = _setting(word)
        if setting is None:
            require(
                not LIKE_A_SETTING.fullmatch(word),
                f"mixture: {word}: neither a setting, which are {'=, '.join(SETTINGS)}=, nor a "
                "source with a weight, such as a.jsonl:1",
            )
            named.append(word)
            continue
        require(setting[1] not in settings, f"mixture: {setting[1]}= stands twice in a stage")
        settings[setting[1]] = setting[2]

    # Sources: each once, and all weighed alike.
    is_alone = len(named) == 1
    shares = [_share(word, is_alone) for word in named]
    require(bool(shares), f"mixture: a stage names no source; write one on each side of {ARROW}")
    labels = [share.label for share in shares]
    for label in labels:
        require(labels.count(label) == 1, f"mixture: {label} stands twice in a stage; add it up")
    for share in shares:
        require(
            share.by_rows == shares[0].by_rows,
            f"mixture: {share.data}: of a stage's weights all count rows or none does; add @rows "
            "or @cap=N to the others, or leave it out",
        )

    # Settings.
    unit = settings.get("unit", "examples")
    require(
        unit in ("examples", "tokens"),
        f"mixture: unit={unit}: must be unit=examples or unit=tokens",
    )
    require(
        "tokens" not in settings or "steps" not in settings,
        "mixture: a stage ends by tokens= or by steps=, not by both",
    )
    return Stage(
        shares=tuple(shares),
        by_tokens=unit == "tokens",
        temperature=_number(settings, "temperature") or 1.0,
        tokens=_whole(settings, "tokens"),
        steps=_whole(settings, "steps"),
    )


def _setting(word: str) -> re.Match[str] | None:
    """Return a word as the name and the value of a setting; None for a source."""
    return None if SHARE.fullmatch(word) else SETTING.fullmatch(word)


def _share(word: str, is_alone: bool) -> Share:
    """Read a source and its weight; a stage's only source needs none."""
    found = SHARE.fullmatch(word)
    if found is None:
        require(
            is_alone,
            f"mixture: {word}: has no weight, which is a number above 0, such as a.jsonl:1; names "
            "hold no spaces",
        )
        return Share(word, 1.0)
    weight = float(found["weight"])
    require(
        0 < weight < MOST_WEIGHT,
        f"mixture: {word}: a weight must be above 0 and below {MOST_WEIGHT:g}; for none leave the "
        "source out",
    )

    # Options: each of a kind once.
    options = found["options"].split("@")[1:]
    cap = None
    kinds = [option.partition("=")[0] for option in options]
    for kind, option in zip(kinds, options, strict=True):
        require(kinds.count(kind) == 1, f"mixture: {word}: @{kind} stands there twice")
        require(
            OPTION.fullmatch(option) is not None,
            f"mixture: {word}: @{option} is no option; give @rows, @cap=ROWS, @text or @in_order",
        )
        if option.startswith("cap="):
            cap = int(option.removeprefix("cap="))
    return Share(
        data=found["data"],
        weight=weight,
        # A bound on the rows that count says that they do.
        by_rows="rows" in options or cap is not None,
        cap=cap,
        as_text="text" in options,
        in_order="in_order" in options,
    )


def _number(settings: dict[str, str], name: str) -> float | None:
    """Return a setting above 0; None where it is not there."""
    if name not in settings:
        return None
    told = f"mixture: {name}={settings[name]}: must be a number above 0"
    try:
        value = float(settings[name])
    except ValueError:
        raise UserError(told) from None
    # Not a number either: an infinite temperature is written as a large one.
    require(0 < value < float("inf"), told)
    return value


def _whole(settings: dict[str, str], name: str) -> int | None:
    """Return a setting that is a whole number above 0; None where it is not there."""
    value = _number(settings, name)
    require(
        value is None or value == int(value),
        f"mixture: {name}={settings.get(name)}: must be a whole number above 0",
    )
    return None if value is None else int(value)
