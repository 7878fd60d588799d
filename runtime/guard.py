"""Loss spikes: a detector, and the way back to a good checkpoint without the batches at fault.

PaLM (Chowdhery et al. 2022, section 5.1) and OPT (Zhang et al. 2022, section 2.5) did so by hand.
The run's `left_out.json` lists the batches left out, so that the run stays a function of its
folder and resumes to the bit. A run that learns from its own samples leaves out none: it draws
others.
"""

import dataclasses
import functools
import gc
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from runtime.errors import UserError
from runtime.ranges import AT_LEAST_0, AT_LEAST_1, Range, check_ranges
from runtime.run_folder import finished_steps, load_config, remove_step
from runtime.writes import atomic_bytes

RECENT = 1000
"""Steps over which spikes are counted against GuardConfig.most, and a run's own noise is known."""
TIMES_OWN_NOISE = 2.0
"""A spike is so many times as far out as the farthest step among those."""
WATCHED = (
    ("loss", "grad_norm"),
    ("own/loss", "own/grad_norm"),
    ("policy/approx_kl", "policy/grad_norm"),
    ("policy/loss", "policy/grad_norm"),
)
"""What is watched of a row of metrics, the first that it has. A policy-gradient loss says nothing
of its step, and may be below 0; how far the step has moved the policy does, and is not."""
MOST_STEPS = 10_000_000
"""More than any run has."""
LEFT_OUT = "batches {first} to {last} are left out"
"""What is done otherwise after a spike, unless a script says something else."""

Main = Callable[[Any], dict[str, float]]
"""A script's main: main(config) -> its last metrics."""


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Rules for loss spikes: what counts as one, and what is then left out."""

    threshold: float = 6.0
    """Robust deviations above their medians that make loss and gradient norm a spike, where the
    run's own noise asks for no more; 0: off."""
    window: int = 32
    """Steps before it whose medians are taken; at least half must be there."""
    skip: int = 8
    """Batches left out: the spike's and those before it, back to the checkpoint at most."""
    most: int = 10
    """Spikes within 1,000 steps; one more ends the run in an error."""

    def __post_init__(self):
        ranges = {"threshold": AT_LEAST_0, "window": Range(low=2), "skip": AT_LEAST_1}
        check_ranges(self, ranges, "guard.")

    @property
    def history(self) -> int:
        """Steps whose losses and gradient norms `is_spike` looks at."""
        return RECENT + 2 * self.window


class Spike(Exception):
    """The loss has spiked at `step`, an attribute."""

    def __init__(self, step: int):
        super().__init__(f"loss spike at step {step}")
        self.step = step


# --- the detector


def deviations(history_S2: np.ndarray, values_2: np.ndarray) -> np.ndarray:
    """Return [2]: robust deviations by which `values_2` are above their medians over `history_S2`.

    The two: loss and gradient norm, in logarithms. Both are skewed to the right, the more so the
    smaller the batch: a healthy run's are far out often as they are, and not in logarithms. A
    deviation is 1.4826 times the median distance from the median, which is the standard deviation
    of a normal distribution (Rousseeuw and Croux 1993), but at least 0.01: one percent of the
    median. Both arguments may have the same axes in front, [..., S, 2] and [..., 2].
    """
    log_S2 = np.log(np.maximum(history_S2, 1e-12))
    log_2 = np.log(np.maximum(values_2, 1e-12))
    # Medians, since a mean would move with the spike before this one.
    median_2 = np.median(log_S2, axis=-2)
    spread_2 = 1.4826 * np.median(np.abs(log_S2 - median_2[..., None, :]), axis=-2)
    return (log_2 - median_2) / np.maximum(spread_2, 0.01)


def own_noise(history_S2: np.ndarray, window: int) -> float:
    """Return how far out the farthest step of `history_S2` was, in the deviations of is_spike.

    The last `window` steps are left out, in which what may be a divergence has begun; 0 where the
    history is too short to say.
    """
    earlier_S2 = history_S2[:-window]
    if len(earlier_S2) <= window:
        return 0.0
    # Each step beside the window before it.
    before_N2W = np.lib.stride_tricks.sliding_window_view(earlier_S2[:-1], window, axis=0)
    above_N2 = deviations(before_N2W.swapaxes(1, 2), earlier_S2[window:])
    return float(above_N2.min(axis=1).max())


def watched(row: dict[str, float | None]) -> tuple[str, list[float]] | None:
    """Return (name of the loss, [loss, gradient norm]) of a row of metrics, as WATCHED has them.

    `row`: {name: value}. None where one is missing or not finite: the step then changed no
    parameters.
    """
    for names in WATCHED:
        if row.keys() >= set(names):
            values = [row[name] for name in names]
            is_finite = None not in values and np.isfinite(values).all()
            return (names[0], values) if is_finite else None
    return None


def is_spike(config: GuardConfig, history: Sequence[list[float]], values: list[float]) -> bool:
    """True if a step's loss and gradient norm both stand out from `history`, the steps before.

    `values` and each of `history`: [loss, gradient norm], from `watched`. False where the
    guard is off or `history` has less than half of its window. The gradient norm alone often
    stands out without a fault, and a hard batch raises the loss alone.
    """
    # Too short a history has no median worth the name.
    if config.threshold <= 0 or len(history) < max(config.window // 2, 2):
        return False
    recent_S2 = np.array(list(history)[-config.window :])
    above = deviations(recent_S2, np.array(values)).min()
    if above <= config.threshold:
        return False
    # A run of heavy tails has such steps and goes on well: they say what is usual in it.
    return bool(above > TIMES_OWN_NOISE * own_noise(np.array(history), config.window))


# --- the way back


def left_out(run: str) -> frozenset[int]:
    """Return the numbers of the batches that `run` leaves out, from 1, in the data's order.

    `run`: its folder. Empty without left_out.json; UserError where that is damaged.
    """
    return _numbers(_spikes(run))


def spike_count(run: str) -> int:
    """Return how many spikes `run`, its folder, has gone back from.

    Raises UserError where its left_out.json is damaged.
    """
    return len(_spikes(run))


def _numbers(spikes: Sequence[dict[str, Any]]) -> frozenset[int]:
    # Of all spikes so far: a batch stays left out.
    numbers: set[int] = set()
    for spike in spikes:
        numbers.update(spike["batches"])
    return frozenset(numbers)


def _spikes(run: str) -> list[dict[str, Any]]:
    """Read left_out.json: {"step", "resumed_after", "batches"} of each spike, [] without it.

    Which batches these are follows from the rest: raises UserError where it says otherwise.
    """
    path = pathlib.Path(run) / "left_out.json"
    if not path.exists():
        return []
    try:
        spikes = json.loads(path.read_bytes())
        skip = load_config(run)["guard"]["skip"]
        for number, spike in enumerate(spikes):
            fields = int(spike["step"]), int(spike["resumed_after"])
            if spike != _spike(*fields, skip, spikes[:number]):
                raise ValueError(f"spike {number + 1}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as fault:
        raise UserError(f"{path}: damaged ({fault}); restore it, or start another run") from None
    return spikes


def _spike(
    step: int, resumed_after: int, skip: int, before: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return the entry of left_out.json for a spike at `step`, after those `before`."""
    if not 0 <= resumed_after <= step < MOST_STEPS:
        raise ValueError(f"step {step}")
    # The batches of the steps after the checkpoint, those left out before not counted.
    numbers = batches_of_steps(step, _numbers(before))
    batches = numbers[max(resumed_after, step - skip) :]
    return {"step": step, "resumed_after": resumed_after, "batches": batches}


def go_back(config: Any, step: int, instead: str = LEFT_OUT) -> None:
    """Undo a spike at `step`: remove checkpoints that hold batches at fault, and list the batches.

    `config`: the script's, of which `run` and `guard` are read. The list is the run's
    left_out.json. `instead`: what is then done otherwise, for the note on stderr; it may name
    {first} and {last}, the batches. All processes must call it. Raises UserError after too many
    spikes in RECENT steps.
    """
    # A run that spikes again and again has another fault than its batches; a long one meets a
    # hard batch now and then.
    guard = config.guard
    spikes = _spikes(config.run)
    recent = [spike for spike in spikes if spike["step"] > step - RECENT]
    if len(recent) >= guard.most:
        fault = (
            f"the loss has spiked more than --guard.most={guard.most} times, now at step {step}"
        )
        raise UserError(
            f"{config.run}: {fault}; lower --optimizer.lr in another --run, or raise --guard.most "
            f"(of {RECENT:,} steps) and resume"
        )
    # All have read left_out.json.
    multihost_utils.sync_global_devices("spike")
    if jax.process_index() == 0:
        # The newest checkpoint before the batches at fault; else the oldest there is.
        folder = pathlib.Path(config.run, "checkpoints")
        finished = finished_steps(folder)
        earlier = [number for number in finished if number <= step - guard.skip]
        good = earlier[0] if earlier else min(finished, default=0)
        for later in finished:
            if later > good:
                remove_step(folder / str(later))

        # The batches of the steps after it are at fault.
        spike = _spike(step, good, guard.skip, spikes)
        batches = spike["batches"]
        spikes.append(spike)
        path = pathlib.Path(config.run, "left_out.json")
        atomic_bytes(path, json.dumps(spikes, indent=1).encode())
        told = instead.format(first=batches[0], last=batches[-1])
        print(f"note: loss spike at step {step}: back to step {good}; {told}", file=sys.stderr)
    multihost_utils.sync_global_devices("gone back")


def batches_of_steps(steps: int, without: frozenset[int]) -> list[int]:
    """Return the batch number of each of the first `steps`, where those of `without` are skipped.

    Batches are numbered from 1, in the order of the data.
    """
    numbers: list[int] = []
    number = 0
    # Those left out have numbers too.
    while len(numbers) < steps:
        number += 1
        if number not in without:
            numbers.append(number)
    return numbers


def guarded(main: Main, instead: str = LEFT_OUT) -> Main:
    """Wrap a script's `main(config)`, which returns metrics: after a spike go back, begin anew.

    To begin anew is to resume the run from the checkpoint that `go_back` leaves, without the
    batches that `left_out` names; `instead`: see `go_back`. Returns a function that is called as
    `main` is and returns what its last attempt does.
    """

    @functools.wraps(main)
    def run(config: Any) -> dict[str, float]:
        """Run `main` until it ends without a spike; return what it returns."""
        while True:
            try:
                return main(config)
            except Spike as spike:
                step = spike.step
            # The attempt's arrays were held by its frames: free them before the next.
            gc.collect()
            go_back(config, step, instead)

    return run


def guarded_by_samples(main: Main) -> Main:
    """Wrap the `main` of a script that learns from its own samples, as `guarded` does.

    What it takes from the checkpoint on are other samples: the keys of training_run.Run.key.
    """
    return guarded(main, "from there on other responses are drawn")
