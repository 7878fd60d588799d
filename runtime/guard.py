"""Loss spikes: a detector, and the way back to a good checkpoint without the batches at fault.

What PaLM (Chowdhery et al. 2022, section 5.1) and OPT (Zhang et al. 2022, section 2.5) did by hand. The run's
`left_out.json` lists the batches left out, so that the run stays a function of its folder and resumes to the bit.
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
from runtime.run_folder import atomic_bytes, finished_steps, remove_step


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """What counts as a loss spike, and what is then left out."""

    threshold: float = 6.0
    """A spike: loss and gradient norm are both so many robust deviations above their running medians; 0: no guard."""
    window: int = 32
    """Steps before it that median and deviation are of; half of them must be there."""
    skip: int = 8
    """Batches left out: the spike's and those before it, as far as to the checkpoint gone back to."""
    most: int = 10
    """Spikes in a run; one more ends it in an error."""


class Spike(Exception):
    """The loss has spiked at `step`, an attribute."""

    def __init__(self, step: int):
        super().__init__(f"loss spike at step {step}")
        self.step = step


def deviations(history_S2: np.ndarray, values_2: np.ndarray) -> np.ndarray:
    """[2]: how far loss and gradient norm are above their medians over `history_S2`, in robust deviations.

    A deviation is 1.4826 times the median distance from the median, which is the standard deviation of a normal
    distribution (Rousseeuw and Croux 1993), but at least 1 % of the median.
    """
    median_2 = np.median(history_S2, axis=0)
    spread_2 = 1.4826 * np.median(np.abs(history_S2 - median_2), axis=0)
    return (values_2 - median_2) / np.maximum(spread_2, 0.01 * np.abs(median_2) + 1e-12)


def watched(row: dict[str, float | None]) -> list[float] | None:
    """Loss and gradient norm of a row of metrics; None where one is missing or not finite (no update then)."""
    values = [row.get("loss"), row.get("grad_norm")]
    return values if None not in values and np.isfinite(values).all() else None


def is_spike(config: GuardConfig, history: Sequence[list[float]], values: list[float]) -> bool:
    """Whether a step's loss and gradient norm both stand out from `history`.

    The gradient norm alone often does without a fault, and a hard batch raises the loss alone.
    """
    enough = config.threshold > 0 and len(history) >= max(config.window // 2, 2)
    return enough and bool(
        (deviations(np.array(history), np.array(values)) > config.threshold).all()
    )


def left_out(run: str) -> frozenset[int]:
    """The numbers of the batches, from 1 in the order of the data, that the run `run` leaves out."""
    return frozenset(number for spike in _spikes(run) for number in spike["batches"])


def _spikes(run: str) -> list[dict[str, Any]]:
    path = pathlib.Path(run) / "left_out.json"
    try:
        return json.loads(path.read_text()) if path.exists() else []
    except ValueError:
        raise UserError(f"{path}: not JSON; restore it, or start another run") from None


def go_back(config: Any, step: int) -> None:
    """After a spike at `step`: removes checkpoints that hold batches at fault, and adds these to left_out.json."""
    folder, guard, spikes = (
        pathlib.Path(config.run, "checkpoints"),
        config.guard,
        _spikes(config.run),
    )
    if len(spikes) >= guard.most:
        fault = (
            f"the loss has spiked more than --guard.most={guard.most} times, now at step {step}"
        )
        raise UserError(f"{config.run}: {fault}; lower --optimizer.lr in another --run")
    multihost_utils.sync_global_devices("spike")  # all have read left_out.json
    if jax.process_index() == 0:
        finished = finished_steps(folder)
        good = next((s for s in finished if s <= step - guard.skip), min(finished, default=0))
        for later in (s for s in finished if s > good):
            remove_step(folder / str(later))
        before, numbers, number = left_out(config.run), [], 0
        while len(numbers) < step:  # the batch of each step so far
            number += 1
            numbers += [number] if number not in before else []
        batches = numbers[max(good, step - guard.skip) :]
        spikes.append({"step": step, "resumed_after": good, "batches": batches})
        atomic_bytes(
            pathlib.Path(config.run, "left_out.json"), json.dumps(spikes, indent=1).encode()
        )
        which = f"batches {batches[0]} to {batches[-1]} are left out"
        print(f"note: loss spike at step {step}: back to step {good}; {which}", file=sys.stderr)
    multihost_utils.sync_global_devices("gone back")


def guarded(main: Callable[[Any], dict[str, float]]) -> Callable[[Any], dict[str, float]]:
    """A script's `main`, begun anew after each spike: that is the same as resuming it, `go_back` before."""

    @functools.wraps(main)
    def run(config: Any) -> dict[str, float]:
        while True:
            try:
                return main(config)
            except Spike as spike:
                step = spike.step
            gc.collect()  # the arrays of the attempt, which its frames held
            go_back(config, step)

    return run
