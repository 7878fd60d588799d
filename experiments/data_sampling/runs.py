"""Run the study: about 2,700 small alignments, several side by side, a line each in results.jsonl.

    sh experiments/data_sampling/run.sh                            # the SFT model first, then this
    python -m experiments.data_sampling.runs --missing             # what is left, and for how long
    python -m experiments.data_sampling.runs --minutes=60          # the next hour's worth
    taskset -c 0 python -m experiments.data_sampling.runs --of=2 --part=0 &    # one process a core
    taskset -c 1 python -m experiments.data_sampling.runs --of=2 --part=1

What results.jsonl has is not run again: stop and start it at will. The headline comes first.
"""

import runtime.interrupt  # noqa: F401

import collections
import contextlib
import dataclasses
import fcntl
import functools
import itertools
import json
import pathlib
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

import train_dpo
from collect.select import load_isa
from experiments.data_sampling import pools
from experiments.data_sampling.court import Judge, make_court
from experiments.data_sampling.pools import Aligner, Pool, Seen
from experiments.data_sampling.side_by_side import order_of, train
from model import Params
from model_config import ModelConfig
from planning.programs import forward_flops
from responses import LoadedRun, filled, load_run
from runtime import flags
from runtime.errors import require
from sharding import MeshConfig, make_mesh
from train_step import OptimizerConfig

HERE = pathlib.Path(__file__).parent
Schedule = Literal["own", "equal_steps"]
BUDGETS = (1, 2, 3.5, 5, 10, 25, 50, 75, 100)
"""Percent of the pool."""
LITTLE = 5
"""The largest budget below 10 %: what "less than 10 %" is judged by."""
TWO_BUDGETS = (3.5, 10)
"""Those of most samplers in damaged pools."""
SEEDS = 5
HEADLINE_SEEDS = 10
BATCH: dict[Aligner, int] = {"dpo": 10, "kto": 20}
"""Rows of a step, pairs or single responses: 20 responses, which divide every budget."""
LEARNING_RATE: dict[Aligner, float] = {"dpo": 1e-4, "kto": 1e-4}
"""Of pilot.jsonl the one with the highest gold with all data."""
WARMUP = 10
"""A run warms up for the first of so many parts of its steps."""
UNTRAINED = 0
"""Budget of the lines that have the SFT model itself."""


@dataclasses.dataclass(frozen=True)
class Config:
    init: str = "runs/data_sampling/sft"
    """Run of the SFT model: start, reference, and what embeds and scores rows."""
    work: str = "runs/data_sampling"
    """Folder in which pools are kept."""
    out: str = str(HERE / "results.jsonl")
    """File with a line a run; those it has are not run again."""
    members: int = 5
    """Runs trained side by side."""
    prompts: int = 512
    """Held-out prompts of a run's seed that it is judged by."""
    pairs: int = pools.PAIRS
    """Pairs of a pool: it has twice as many responses."""
    missing: bool = False
    """Print what is left and the time it takes, and run nothing."""
    minutes: float | None = None
    """Start no more runs after so many minutes; None: run all that is left."""
    of: int = 1
    """Processes that share the runs and the file."""
    part: int = 0
    """Which of them this one is, from 0."""


class Run(NamedTuple):
    """One alignment, and what it is told apart by in results.jsonl."""

    pool: str
    aligner: Aligner
    sampler: str
    """Of pools.SAMPLERS; `all` at 100 %, `none` for the SFT model."""
    budget: float
    """Percent of the pool."""
    schedule: Schedule
    """own: one epoch, annealed to its end; equal_steps: as many steps as all data take."""
    seed: int


# ---- What is to be run, in its order ----


def plan() -> list[Run]:
    """List all runs of the study, the most telling ones first."""
    runs = []
    for seed in range(HEADLINE_SEEDS):
        runs.append(Run("clean", "dpo", "none", UNTRAINED, "own", seed))

    # The headline: ISA as printed against random rows and all rows, ten seeds.
    first, rest = range(SEEDS), range(SEEDS, HEADLINE_SEEDS)
    for seeds in (first, rest):
        runs += block(("clean",), ("random", "isa_A"), "own", seeds)

    # Fewer rows or fewer updates? The same rows with the updates of all data.
    runs += block(("clean",), ("random", "isa_A"), "equal_steps", first, (LITTLE,))

    # What it rests on: the null control, every damage, then the other samplers.
    damaged = ("duplicates", "noise", "flipped")
    shuffled = "isa_A" + pools.SHUFFLED
    others = [name for name in pools.SAMPLERS if name not in ("random", "isa_A", shuffled)]
    runs += block(("clean",), (shuffled,), "own", first)
    runs += block(damaged, ("random", "isa_A"), "own", first)
    runs += block(("clean",), others, "own", first)
    runs += block(damaged, [*others, shuffled], "own", first, TWO_BUDGETS)
    runs += block(damaged, ("log_det",), "own", first)

    # The other schedule, at all budgets.
    runs += block(("clean",), ("random", "isa_A"), "equal_steps", first)
    return list(dict.fromkeys(runs))


def block(
    names: Iterable[str],
    samplers: Iterable[str],
    schedule: Schedule,
    seeds: Iterable[int],
    budgets: Iterable[float] = BUDGETS,
) -> Iterator[Run]:
    """Yield the runs of some pools with some samplers at some budgets, by both aligners.

    All rows are the same whichever the sampler, and so are both schedules: one run.
    """
    cells = itertools.product(names, budgets, BATCH, samplers, seeds)
    for name, budget, aligner, sampler, seed in cells:
        if budget == 100:
            yield Run(name, aligner, "all", budget, "own", seed)
        else:
            yield Run(name, aligner, sampler, budget, schedule, seed)


def part_of(runs: Iterable[Run], part: int, of: int) -> list[Run]:
    """Return the runs of process `part`, from 0, of `of` processes.

    All runs of a pool by one aligner are of one part, so its rows are made and embedded once. The
    costlier aligner is each part's in turn: of two parts, the first has it in every second pool.
    """
    names, aligners = list(pools.POOLS), list(BATCH)
    own = []
    for run in runs:
        number = names.index(run.pool) + aligners.index(run.aligner)
        if number % of == part:
            own.append(run)
    return own


def groups_of(runs: Sequence[Run], members: int) -> list[list[Run]]:
    """Cut runs into groups that train side by side: of one aligner, budget and schedule.

    A group stands where its first run does.
    """
    # Runs that one program trains.
    alike: dict[tuple[Any, ...], list[Run]] = collections.defaultdict(list)
    for run in runs:
        alike[run.aligner, run.budget, run.schedule].append(run)

    # Cut, and put back in the order of the plan.
    groups = []
    for same in alike.values():
        for start in range(0, len(same), members):
            groups.append(same[start : start + members])
    places = {run: number for number, run in enumerate(runs)}
    return sorted(groups, key=lambda group: places[group[0]])


def read_results(path: str) -> dict[Run, dict[str, Any]]:
    """Read results.jsonl: {run: its line}; {} without the file. Lines cut short are left out."""
    results: dict[Run, dict[str, Any]] = {}
    for row in whole_lines(path):
        run = Run(*(row[name] for name in Run._fields))
        results[run] = row
    return results


def whole_lines(path: str) -> list[dict[str, Any]]:
    """Read the lines that `append` wrote; [] without the file. Lines cut short are left out."""
    if not pathlib.Path(path).exists():
        return []
    rows = []
    for line in pathlib.Path(path).read_text().splitlines():
        # A process that was killed as it wrote leaves half a line.
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def append(path: str, lines: Sequence[dict[str, Any]]) -> None:
    """Write lines behind those of results.jsonl, apart from one that was cut short."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    with open(path, "a+b") as file:
        # One process at a time; the lock ends as the file is closed.
        fcntl.flock(file, fcntl.LOCK_EX)
        # The last line of a file may have no end.
        if file.tell():
            file.seek(-1, 2)
            is_whole = file.read() == b"\n"
            text = text if is_whole else "\n" + text
        file.write(text.encode())


# ---- One run's numbers ----


def rows_of(run: Run, pairs: int) -> int:
    """Return how many rows, pairs or responses, a run trains on."""
    rows = pairs if run.aligner == "dpo" else 2 * pairs
    return max(1, round(rows * run.budget / 100))


def steps_of(run: Run, pairs: int) -> int:
    """Return a run's updates: one epoch, or those of one epoch of all rows."""
    whole = run._replace(budget=100)
    rows = rows_of(whole if run.schedule == "equal_steps" else run, pairs)
    return max(1, rows // BATCH[run.aligner])


def settings(run: Run, model: ModelConfig, pairs: int) -> train_dpo.Config:
    """Return the settings of train_dpo.py that a run trains with."""
    steps = steps_of(run, pairs)
    optimizer = OptimizerConfig(
        lr=LEARNING_RATE[run.aligner], beta2=0.999, weight_decay=0.0, warmup=steps // WARMUP
    )
    return train_dpo.Config(
        loss=run.aligner,
        unpaired=run.aligner == "kto",
        beta=0.1,
        steps=steps,
        batch_size=min(BATCH[run.aligner], rows_of(run, pairs)),
        length=pools.LENGTH,
        model=model,
        optimizer=optimizer,
    )


def flops_of(run: Run, model: ModelConfig, pairs: int) -> dict[str, float]:
    """Count the FLOPs of matmuls that a run takes: of `training`, and of choosing its `selection`.

    Rows count with all their LENGTH tokens. An update takes three forward passes, the reference
    one a row, kto's estimate of the KL one of the policy's. Fitting ISA's mixture is counted with
    all its ROUNDS, of which it may need fewer.
    """
    if run.sampler == "none":
        return {"training": 0.0, "selection": 0.0}

    # A forward pass of one response, the rows trained on, and those with repetitions.
    one = forward_flops(model, 1, pools.LENGTH, pools.LENGTH)
    rows = rows_of(run, pairs)
    trained = steps_of(run, pairs) * BATCH[run.aligner]
    if run.aligner == "dpo":
        training = 2 * one * (3 * trained + rows)
    else:
        # The row itself, and one of another prompt, from which nothing is learned.
        own = one * (3 * trained + rows)
        unrelated = one * (trained + rows)
        training = own + unrelated

    # One pass over all rows for what is chosen by embeddings or by a score, two for ifd.
    method = pools.SAMPLERS.get(run.sampler, {}).get("method", "random")
    whole = rows_of(run._replace(budget=100), pairs)
    passes = {"random": 0, "length": 0, "ifd": 2}.get(method, 1)
    selection = passes * whole * one
    if method == "isa":
        # Two Gaussians: a covariance and a triangular solve each round.
        selection += load_isa().ROUNDS * 2 * 3 * whole * model.width**2
    return {"training": training, "selection": selection}


# ---- Groups of runs ----


@functools.cache
def init_sum(init: str) -> str:
    """Return what the SFT model's weights are told by."""
    return pools.weights_sum(loaded(init).params)


def refuse_other_start(config: Config, results: dict[Run, dict[str, Any]]) -> None:
    """Raise UserError where results.jsonl has runs of another SFT model."""
    now = init_sum(config.init)
    others = {row["init"] for row in results.values()} - {now}
    require(
        not others,
        f"--out={config.out}: has runs that start from another model than --init={config.init}; "
        "name another file, or that model",
    )


@functools.lru_cache(maxsize=4 * HEADLINE_SEEDS)
def pool_of(config: Config, name: str, aligner: Aligner, seed: int) -> Pool:
    """Return a seed's pool, clean or damaged, as `aligner` reads it."""
    model = loaded(config.init)
    pairs = pools.kept_pairs(config.work, model, config.pairs, seed)
    damaged = pools.POOLS[name](pairs, random.Random(f"{name}/{seed}"))
    return pools.make_pool(damaged, aligner, model, f"{name} pool {seed}")


@functools.lru_cache(maxsize=128)
def seen_of(config: Config, name: str, aligner: Aligner, sampler: str, seed: int) -> Seen:
    """Return what a sampler chooses by in a seed's pool."""
    pool = pool_of(config, name, aligner, seed)
    return pools.look(sampler, pool, config.init, loaded(config.init), seed)


@functools.cache
def loaded(init: str) -> LoadedRun:
    """Load the SFT model onto the device, once."""
    found = load_run(init)
    return found._replace(params=jax.device_put(found.params))


def order_of_run(config: Config, run: Run) -> np.ndarray:
    """Return the rows of each of a run's steps, [S, B]."""
    k = rows_of(run, config.pairs)
    if run.sampler == "all":
        chosen = np.arange(k)
    else:
        seen = seen_of(config, run.pool, run.aligner, run.sampler, run.seed)
        chosen = pools.choose(seen, k)
    model = loaded(config.init).config
    own = settings(run, model, config.pairs)
    return order_of(chosen, own.batch_size, own.steps, run.seed)


def run_group(config: Config, judge: Judge, group: Sequence[Run]) -> list[dict[str, Any]]:
    """Train and judge a group of runs side by side; return a line for each."""
    # Filled up to the usual number, so that one program serves all groups.
    members = filled(group, config.members)
    model = loaded(config.init)
    params: Params

    # The SFT model as it is, once for each member, or trained.
    if group[0].sampler == "none":
        began = time.perf_counter()
        params = jax.tree.map(lambda x: np.stack([np.asarray(x)] * len(members)), model.params)
    else:
        # Pools and what is chosen of them are not counted: other runs share them.
        own_pools = [pool_of(config, run.pool, run.aligner, run.seed).rows for run in members]
        orders = [order_of_run(config, run) for run in members]
        began = time.perf_counter()
        own = settings(group[0], model.config, config.pairs)
        longest = steps_of(group[0]._replace(budget=100), config.pairs)
        params = train(own, model.params, own_pools, orders, longest)
    jax.block_until_ready(params)
    trained = time.perf_counter()
    verdicts = judge(params, [run.seed for run in members])
    judged = time.perf_counter()

    # Seconds of a run: its share of the group's.
    lines = []
    for run, verdict in zip(group, verdicts, strict=False):
        line = {
            **run._asdict(),
            "init": init_sum(config.init),
            **verdict._asdict(),
            "steps": 0 if run.sampler == "none" else steps_of(run, config.pairs),
            "flops": flops_of(run, model.config, config.pairs),
            "train_seconds": round((trained - began) / len(group), 2),
            "judge_seconds": round((judged - trained) / len(group), 2),
        }
        lines.append(line)
    return lines


# ---- The command ----


def forecast(left: Sequence[Run], results: dict[Run, dict[str, Any]], pairs: int) -> float:
    """Return the seconds that the runs left take, by those that are done; nan without any.

    Training goes by the steps, judging is the same for all. Medians: the first runs compile.
    """
    # The SFT model's own lines have no steps.
    done = [row for row in results.values() if row["steps"]]
    if not done:
        return float("nan")
    judging = float(np.median([row["judge_seconds"] for row in done]))
    seconds = 0.0
    for aligner in BATCH:
        own = [row for row in done if row["aligner"] == aligner]
        if not own:
            return float("nan")
        a_step = float(np.median([row["train_seconds"] / row["steps"] for row in own]))
        theirs = [run for run in left if run.aligner == aligner]
        seconds += sum(steps_of(run, pairs) * a_step + judging for run in theirs)
    return seconds


def tell_missing(left: Sequence[Run], results: dict[Run, dict[str, Any]], pairs: int) -> None:
    """Print how many runs are left of each pool and sampler, and how long they take."""
    counts = collections.Counter((run.schedule, run.pool, run.sampler) for run in left)
    for (schedule, pool, sampler), count in counts.items():
        print(f"{schedule:12}{pool:12}{sampler:16}{count:6}")
    hours = forecast(left, results, pairs) / 3600
    print(f"{len(left)} of {len(plan())} runs are left: {hours:.1f} hours at the speed so far")


def main(config: Config) -> dict[str, int]:
    """Run what this part lacks; return the counts of all runs `done` and of its own `left`."""
    began = time.monotonic()
    require(
        0 <= config.part < config.of,
        f"--part={config.part}: must be 0 or more, and below --of={config.of}",
    )
    results = read_results(config.out)
    own = part_of(plan(), config.part, config.of)
    left = [run for run in own if run not in results]
    if config.missing:
        tell_missing(left, results, config.pairs)
        return {"done": len(results), "left": len(left)}

    # One device: members are side by side on it, not over several.
    make_mesh(MeshConfig(), jax.devices()[:1])
    refuse_other_start(config, results)
    model = loaded(config.init)
    judge = make_court(model.config, model.tokenizer, config.prompts, pools.NEW_TOKENS)

    # Group by group; each is written at once, so that a stop loses no more than one.
    done = 0
    for group in groups_of(left, config.members):
        if config.minutes is not None and time.monotonic() - began > 60 * config.minutes:
            break
        lines = run_group(config, judge, group)
        append(config.out, lines)
        done += len(lines)
        first = lines[0]
        gold = np.mean([line["gold"] for line in lines])
        print(
            f"{first['pool']} {first['aligner']} {first['sampler']} {first['budget']:g} % "
            f"{first['schedule']}, {len(lines)} runs: gold {gold:.3f}; a run took "
            f"{first['train_seconds']:.1f} s to train, {first['judge_seconds']:.1f} s to judge",
            flush=True,
        )
    return {"done": len(results) + done, "left": len(left) - done}


if __name__ == "__main__":
    flags.run(main, Config)
