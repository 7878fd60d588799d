"""Synthesise rows for training: tasks from seeds, harder ones, and instructions to answers.

    python -m collect.synthesise --method=self_instruct --rows=200 --out=runs/made.jsonl
    python -m collect.synthesise --method=evol_instruct --data=chats.jsonl --init=runs/llama \
        --out=runs/evolved.jsonl

Written by the language model of any run (--init), or in the built-in worlds by a simulated writer
of set reliability. The rows are for `train_sft.py --data`. Beside them, `<out>.made.jsonl` tells
of each row by what it was made and from what, and of each that was dropped by which rule. A
command that is killed goes on where it was. The methods and their papers: docs/synthesis.md.
"""

import runtime.interrupt  # noqa: F401

import collections
import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from collect.back_translate import back_translate
from collect.by_template import describe, invert
from collect.evol_instruct import evol_instruct
from collect.examples import as_line, lines_in, open_rows, schema_of, texts_to_judge
from collect.instructions import (
    Made,
    Object,
    Rounds,
    Task,
    no_objections,
    principled,
    read_seeds,
    task_of,
    until_idle,
)
from collect.rewrite import rewrite
from collect.self_instruct import self_instruct
from collect.topics import refusals, topics
from collect.writers import (
    SIMULATED,
    Ask,
    Question,
    Reply,
    judged_by,
    kept_replies,
    run_writer,
    simulated_writer,
)
from data.bad_rows import OnBadRow, set_on_bad_row
from data.sources import is_file
from rewards.judges import read_principles
from runtime import flags
from runtime.errors import refuse_unread, require
from runtime.inputs import BUILT_IN, contents_of
from runtime.run_folder import atomic_text
from sharding import MeshConfig, make_mesh
from tasks import arithmetic_writer, world_writer

Method = Literal[
    "self_instruct",
    "evol_instruct",
    "back_translate",
    "rewrite",
    "topics",
    "refusals",
    "invert",
    "describe",
]
OF_A_WORLD: dict[str, tuple[Method, ...]] = {
    "world": ("self_instruct", "back_translate", "rewrite", "topics", "refusals"),
    "arithmetic": ("evol_instruct",),
}
"""Methods whose questions the simulated writer of each built-in world can answer."""
JUDGED_BY = {"world": world_writer.PRINCIPLES, "arithmetic": arithmetic_writer.PRINCIPLES}
"""Names of the principles that each simulated writer knows."""


@dataclasses.dataclass(frozen=True)
class Config:
    # What is made
    method: Method = "self_instruct"
    """self_instruct: tasks from seeds. evol_instruct: harder and rarer instructions.
    back_translate: instructions to answers. rewrite: better instructions or answers. topics:
    instructions on given topics. refusals: risky requests declined, harmless ones answered.
    invert: answers ask for their prompts. describe: a task's description above each input
    (docs/synthesis.md)."""
    out: str = "runs/made.jsonl"
    """File to write."""
    rows: int = 1000
    """Rows to write, at most."""
    seed: int = 0
    """Seed of the built-in data, of what the writer is shown and of what it writes."""

    # From what
    seed_tasks: str = "world"
    """Seed tasks of self_instruct: world, or a file in the layout of its seed_tasks.jsonl."""
    data: str = "world"
    """Rows for the other methods: world, arithmetic, or files. back_translate reads answers, or
    texts; the others read prompts with their answers."""
    on_bad_row: OnBadRow = "stop"
    """stop: end at the first bad row of a file; skip: leave bad rows out, with a note."""
    most: int = 1000
    """Rows of --data that are read, at most."""
    topics: str | None = None
    """File with a topic a line (topics)."""
    harms: str | None = None
    """File with a harm a line (refusals)."""
    descriptions: str | None = None
    """File with a description of the task of --data a line, each in other words (describe)."""

    # Who writes
    init: str | None = None
    """Run of the language model that writes and judges; None: the world's simulated one."""
    judge: str | None = None
    """Run of the language model that judges what --init writes; None: --init itself."""
    reliability: float = 0.9
    """The chance that each thing is right that the simulated writer writes or judges."""
    temperature: float = 0.7
    """Sampling temperature of what is written; scores and instances have 0."""
    max_new_tokens: int = 256
    """Longest reply, in tokens; of one that comes to no end at most whole items of a list stay."""

    # What goes
    principles: str | None = None
    """File of principles, one a line: rows that break one, as the writer finds, are dropped."""
    least_score: int = 5
    """Least score, of 5, of pairs that stay (back_translate)."""
    part: Literal["instruction", "output"] = "instruction"
    """The part of a row that is rewritten (rewrite)."""


# ---- What is read ----


def read_seed_tasks(config: Config) -> list[Task]:
    """Return the tasks of --seed_tasks."""
    if config.seed_tasks == "world":
        rows = world_writer.seed_tasks(config.seed)
        return [task_of(row, row["id"]) for row in rows]
    return read_seeds(config.seed_tasks)


def pairs_of(config: Config) -> list[tuple[str, str, str]]:
    """Return (id, prompt, response) of the rows of --data that have one turn each.

    A text, and what has no prompt, has the prompt "". What is judged undesirable is left out.
    """
    schema = schema_of(config.data, None if is_file(config.data) else "chat")
    require(
        schema != "prompt",
        f"--data={config.data}: has prompts alone; name rows with answers, or texts",
    )
    require(
        schema != "steps",
        f"--data={config.data}: has steps with judgements; name rows with answers, or texts",
    )
    source = open_rows(config.data, schema, config.seed)
    pairs = []
    undesirable = 0
    count = min(config.most, len(source))
    for i in range(count):
        if not source[i].get("desirable", True):
            undesirable += 1
            continue
        prompt, response = texts_to_judge(source[i])
        # A conversation of the world begins with a request by itself.
        if config.data in BUILT_IN and not isinstance(prompt, str):
            response = source[i]["messages"][1]["content"]
            prompt = prompt[:1]
        if isinstance(prompt, str):
            pairs.append((f"row {i + 1}", prompt, response))
        elif [message["role"] for message in prompt] == ["user"]:
            pairs.append((f"row {i + 1}", prompt[0]["content"], response))
    longer = count - undesirable - len(pairs)
    if undesirable:
        print(f"{config.data}: {undesirable:,} of {count:,} rows are undesirable: left out")
    if longer:
        print(
            f"{config.data}: {longer:,} of {count:,} rows have a system message or several turns: "
            "left out"
        )
    return pairs


def answered_pairs(config: Config) -> list[tuple[str, str, str]]:
    """Return the pairs of --data that have a prompt; UserError where there is none."""
    pairs = [pair for pair in pairs_of(config) if pair[1]]
    require(
        bool(pairs),
        f"--data={config.data}: has no row of one prompt and its answer; "
        f"--method={config.method} reads no texts and no longer conversations",
    )
    return pairs


# ---- What is made ----


def by_self_instruct(config: Config, ask: Ask, object_to: Object) -> Rounds:
    """Grow a pool of tasks from seeds."""
    return until_idle(self_instruct(read_seed_tasks(config), ask, object_to, config.seed))


def by_evol_instruct(config: Config, ask: Ask, object_to: Object) -> Rounds:
    """Take instructions on, some rounds long."""
    seeds = [(name, prompt) for name, prompt, _ in answered_pairs(config)]
    return evol_instruct(seeds, ask, object_to, config.seed)


def by_back_translate(config: Config, ask: Ask, object_to: Object) -> Rounds:
    """Write instructions to answers."""
    answers = [(name, response) for name, _, response in pairs_of(config)]
    return back_translate(answers, ask, object_to, config.least_score)


def by_rewrite(config: Config, ask: Ask, object_to: Object) -> Rounds:
    """Rewrite instructions or answers."""
    return rewrite(answered_pairs(config), ask, object_to, config.part)


def by_topics(config: Config, ask: Ask, object_to: Object) -> Rounds:
    """Write instructions on each topic."""
    return until_idle(topics(lines_in("topics", config.topics or ""), ask, object_to))


def by_refusals(config: Config, ask: Ask, object_to: Object) -> Rounds:
    """Write risky requests and harmless ones that look like them."""
    return refusals(lines_in("harms", config.harms or ""), ask, object_to)


def by_invert(config: Config, ask: Ask, object_to: Object) -> Rounds:
    """Turn pairs round; nothing is written or judged."""
    return iter([invert(answered_pairs(config))])


def by_describe(config: Config, ask: Ask, object_to: Object) -> Rounds:
    """Put descriptions of the task above inputs; nothing is written or judged."""
    descriptions = lines_in("descriptions", config.descriptions or "")
    return iter([describe(answered_pairs(config), descriptions, config.seed)])


class Way(NamedTuple):
    """How a method makes rows."""

    rounds: Callable[[Config, Ask, Object], Rounds]
    reads_rows: bool
    """It reads --data."""
    is_written: bool
    """A writer is asked; else rows come by a template alone."""


METHODS: dict[Method, Way] = {
    "self_instruct": Way(by_self_instruct, reads_rows=False, is_written=True),
    "evol_instruct": Way(by_evol_instruct, reads_rows=True, is_written=True),
    "back_translate": Way(by_back_translate, reads_rows=True, is_written=True),
    "rewrite": Way(by_rewrite, reads_rows=True, is_written=True),
    "topics": Way(by_topics, reads_rows=False, is_written=True),
    "refusals": Way(by_refusals, reads_rows=False, is_written=True),
    "invert": Way(by_invert, reads_rows=True, is_written=False),
    "describe": Way(by_describe, reads_rows=True, is_written=False),
}


# ---- The command ----


def source_of(config: Config) -> str:
    """Return what the simulated writer must know: --seed_tasks, or --data, or the world."""
    if config.method == "self_instruct":
        return config.seed_tasks
    return config.data if METHODS[config.method].reads_rows else "world"


def check(config: Config) -> None:
    """Raise UserError for settings that cannot run together."""
    needs = {"topics": "topics", "refusals": "harms", "describe": "descriptions"}
    needed = needs.get(config.method)
    require(
        needed is None or getattr(config, needed) is not None,
        f"--method={config.method}: needs --{needed}",
    )
    require(
        config.method != "refusals" or config.rows % 2 == 0,
        f"--rows={config.rows}: must be even with --method=refusals, which makes pairs",
    )

    _, reads_rows, is_written = METHODS[config.method]
    is_simulated = is_written and config.init is None
    if is_simulated:
        check_simulated_writer(config)
    readers = {
        "seed_tasks": (config.method == "self_instruct", "--method=self_instruct"),
        "data": (reads_rows, "a --method that reads rows"),
        "most": (reads_rows, "a --method that reads rows"),
        "topics": (config.method == "topics", "--method=topics"),
        "harms": (config.method == "refusals", "--method=refusals"),
        "descriptions": (config.method == "describe", "--method=describe"),
        "init": (is_written, "a --method that writes"),
        "judge": (is_written and not is_simulated, "--init"),
        "reliability": (is_simulated, "the simulated writer"),
        "temperature": (is_written and not is_simulated, "--init"),
        "max_new_tokens": (is_written and not is_simulated, "--init"),
        "principles": (is_written, "a --method that writes"),
        "least_score": (config.method == "back_translate", "--method=back_translate"),
        "part": (config.method == "rewrite", "--method=rewrite"),
    }
    refuse_unread(config, readers)


def check_simulated_writer(config: Config) -> None:
    """Raise UserError where the simulated writer does not know what it is to write."""
    source = source_of(config)
    flag = "seed_tasks" if config.method == "self_instruct" else "data"
    require(
        source in SIMULATED,
        f"--{flag}={source}: name a run that writes (--init); the simulated writer knows "
        f"{' and '.join(SIMULATED)} only",
    )
    require(
        config.method in OF_A_WORLD[source],
        f"--method={config.method}: the simulated writer of {source} does not know it; give "
        f"--init, or one of {', '.join(OF_A_WORLD[source])}",
    )


def make_reply(config: Config) -> Reply:
    """Make the writer: the model of --init, else the simulated one."""
    if config.init is not None:
        settings = (config.temperature, config.max_new_tokens, config.seed)
        write = run_writer(config.init, *settings)
        if config.judge is None:
            return write
        return judged_by(write, run_writer(config.judge, *settings, flag="--judge"))
    if not METHODS[config.method].is_written:
        return no_writer
    return simulated_writer(source_of(config), config.reliability, config.seed)


def no_writer(questions: Sequence[Question], number: int) -> list[str]:
    """Reply to nothing, for methods by a template; a Reply."""
    raise AssertionError("a template asks nothing")


def make_objections(config: Config, ask: Ask) -> Object:
    """Make what judges rows by --principles; nothing is objected to without them."""
    if config.principles is None:
        return no_objections
    principles = read_principles(config.principles)
    if config.init is None:
        known = JUDGED_BY[source_of(config)]
        unknown = sorted(set(principles) - set(known))
        require(
            not unknown,
            f"--principles: the simulated writer knows {', '.join(known)} and no "
            f"{', '.join(unknown)}; give --init",
        )
    return principled(ask, principles)


FREE = ("out", "rows", "on_bad_row")
"""Fields on which no reply depends."""


def settings_of(config: Config) -> dict[str, Any]:
    """Return what the replies depend on: flags, and the content of what they name."""
    fields = dataclasses.asdict(config)
    # More rows take more replies, and the first ones are the same.
    settings = {f"--{name}": value for name, value in fields.items() if name not in FREE}
    for name, content in contents_of(config).items():
        if name not in FREE:
            settings[f"content of --{name}"] = content
    return settings


def sidecar_line(made: Made, row: int | None) -> str:
    """Return what is told of one row; `row`: its number in the file, from 1, where it stays."""
    told: dict[str, Any] = {"row": row, "id": made.id, "by": made.by, "of": made.of}
    if made.rule:
        told |= {"rule": made.rule, "reason": made.reason, **made.row}
    return as_line(told)


def main(config: Config) -> dict[str, int]:
    """Write the rows that stay, whole or not at all; return the counts of what each rule dropped.

    Also of the `rows` that stay, and of all that were `made`.
    """
    check(config)
    set_on_bad_row(config.on_bad_row)
    make_mesh(MeshConfig())
    beside = f"{config.out}.made.jsonl"
    replies = f"{config.out}.replies.jsonl"
    counts = collections.Counter[str]()
    with atomic_text(config.out, anew=True) as out:
        with (
            atomic_text(beside) as told,
            kept_replies(replies, settings_of(config), make_reply(config)) as ask,
            tqdm(total=config.rows, desc=config.method, unit="row", mininterval=2) as bar,
        ):
            object_to = make_objections(config, ask)
            rounds = METHODS[config.method].rounds(config, ask, object_to)
            for made in itertools.chain.from_iterable(rounds):
                counts["made"] += 1
                if made.rule:
                    counts[made.rule] += 1
                    told.write(sidecar_line(made, None) + "\n")
                    continue
                counts["rows"] += 1
                out.write(as_line(made.row) + "\n")
                told.write(sidecar_line(made, counts["rows"]) + "\n")
                bar.update()
                if counts["rows"] == config.rows:
                    break
        # Where no row is left the file beside it tells why.
        require(
            counts["rows"] > 0,
            f"{config.out}: no row is left; {told_counts(counts)} ({beside}); remove {replies} "
            "and give other settings",
        )
    # Until here a command that is killed needs them.
    pathlib.Path(replies).unlink(missing_ok=True)
    print(f"{config.out}: {counts['rows']:,} of {counts['made']:,} rows; {told_counts(counts)}")
    print(f"{beside} tells by what and from what each was made, and why each that is gone went")
    return dict(counts)


def told_counts(counts: collections.Counter[str]) -> str:
    """Say how many rows each rule dropped."""
    rules = [f"{name} {n:,}" for name, n in counts.items() if name not in ("rows", "made")]
    return "dropped by " + ", ".join(rules) if rules else "none was dropped"


if __name__ == "__main__":
    flags.run(main, Config)
