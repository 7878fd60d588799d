"""Runs whose updates change nothing: too many faulty ones in a row, or none taken at all.

The step counts its updates (train_step.py), and a row of metrics has the counts so far: `updates`,
`skipped` and `left_out`, or of several models `policy/updates` and so on.
"""

import pathlib

from runtime.errors import UserError
from runtime.run_folder import finished_steps

MOST_FAULTY = 20
"""Faulty updates in a row that end a run."""
REMEDY = "lower the learning rate, or look at the data, the rewards and the coefficients"


class UpdateCheck:
    """Look at each row of a run's metrics; raise UserError where its updates come to nothing."""

    def __init__(self, run: str, start: int, total: int):
        """Begin after step `start` of the `total` steps of `run`, a run's folder."""
        self._run = run
        self._start = start
        self._total = total
        # By a model's prefix: updates taken and skipped by the row before, and those skipped
        # since one was taken.
        self._before: dict[str, tuple[float, float]] = {}
        self._in_a_row: dict[str, float] = {}
        # By the metric's name: the most updates that a row has.
        self._most: dict[str, float] = {}
        self._last_good = start

    def __call__(self, step: int, values: dict[str, float]) -> None:
        """Look at the row of `step`; `values` are its metrics, {name: float}.

        Raises UserError after MOST_FAULTY updates in a row that were skipped, and at the last step
        for a model that has taken none. Rows without counts pass.
        """
        all_taken = True
        for name, value in values.items():
            if name.endswith("updates"):
                self._most[name] = max(value, self._most.get(name, 0.0))
            prefix = name.removesuffix("skipped")
            if prefix != name and f"{prefix}updates" in values:
                all_taken &= self._count(prefix, values[f"{prefix}updates"], value)
        if all_taken:
            self._last_good = step
        self._refuse_faults()
        if step == self._total:
            self._refuse_none(values)

    def _count(self, prefix: str, taken: float, skipped: float) -> bool:
        """Count one model's faulty updates in a row; return True if the row's was taken."""
        # The first row of a resumed run has the counts of all its earlier ones.
        first = (taken, skipped) if self._start else (0.0, 0.0)
        taken_before, skipped_before = self._before.get(prefix, first)
        self._before[prefix] = (taken, skipped)
        if taken > taken_before:
            self._in_a_row[prefix] = 0.0
            return True
        self._in_a_row[prefix] = self._in_a_row.get(prefix, 0.0) + skipped - skipped_before
        return False

    def _refuse_faults(self) -> None:
        worst = max(self._in_a_row.values(), default=0.0)
        if worst < MOST_FAULTY:
            return
        saved = next(iter(finished_steps(pathlib.Path(self._run, "checkpoints"))), "none")
        raise UserError(
            f"{self._run}: {worst:.0f} updates in a row had a loss or gradient that is not "
            f"finite; the last good step is {self._last_good} (saved: {saved}); {REMEDY}"
        )

    def _refuse_none(self, values: dict[str, float]) -> None:
        """Raise UserError, at the last step, for a model that has taken no update."""
        for name, most in self._most.items():
            prefix = name.removesuffix("updates")
            # Counts without `skipped` beside them are of this start alone.
            is_known = f"{prefix}skipped" in values or self._start == 0
            if most == 0 and is_known:
                skipped = values.get(f"{prefix}skipped", 0.0)
                left_out = values.get(f"{prefix}left_out", 0.0)
                raise UserError(
                    f"{self._run}: no update was taken ({name} 0): {skipped:.0f} were not finite, "
                    f"in {left_out:.0f} batches nothing counted; {REMEDY}"
                )
