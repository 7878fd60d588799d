"""Metrics of a run while it trains: a progress bar, metrics.jsonl, TensorBoard, samples.md."""

import collections
import contextlib
import math
import pathlib
import resource
import sys
import textwrap
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from runtime.errors import UserError
from runtime.guard import GuardConfig, Spike, is_spike, watched
from runtime.hosts import all_gather_json, finished_step
from runtime.report import run_report
from runtime.rows import Rows, Seal, read_rows
from runtime.samples import append_samples, cut_samples
from runtime.terminal import printable
from runtime.updates import UpdateCheck

SHOWN = ("loss", "score", "kl", "accuracy")
"""Metrics on the progress bar, where a script has them."""
TRAIN_STEP = "plumb_train_step"
"""The name of make_train_step's jitted function, by which its compilations are counted."""
MOST_COMPILATIONS = 32
"""Most compilations of a run's steps; with a large model each takes minutes.

Scripts have one or two steps, and batches up to four shapes.
"""


class Recorder:
    """Record a training loop one step late: step n is fetched when step n + 1 is recorded.

        with Recorder(config.run, config.steps, start) as record:
            for step in record.steps():                        # start + 1 .. total
                state, metrics = train_step(state, batch)
                record(step, metrics, tokens=batch["tokens_BT"].size)

    Rows after step `start` that an interrupted run left are removed. Only process 0 writes and
    shows. Compilations of the step are counted in the row of the step that brought one, as
    `compilations`, and capped: one more raises UserError. With a `guard`, a loss spike raises
    guard.Spike. On exit the last row is written, and report.html.

    Training needs metrics.jsonl: what goes wrong with it is raised. It can do without TensorBoard,
    samples.md and report.html: what goes wrong with them is told once.
    """

    def __init__(
        self,
        run: str,
        total_steps: int,
        start: int = 0,
        *,
        unit: str = "step",
        guard: GuardConfig | None = None,
        seal: Seal | None = None,
        learning_rates: np.ndarray | None = None,
    ):
        """Keep the settings; nothing is written before entry.

        `run`: its folder. `start`: steps finished. `unit`: the word for a step on the terminal.
        `seal`: what `seal` returned at step `start`, if that is known. `learning_rates`: of each
        update, [U], for a script with one update a step; each row then has its own.
        """
        self.run = pathlib.Path(run)
        self.total = total_steps
        self.start = start
        self.unit = unit
        self.last: dict[str, float] = {}
        """The values of the newest row."""
        # Only process 0 writes and shows.
        self._shows = jax.process_index() == 0
        self._seal = seal
        self._learning_rates = learning_rates
        # Files that training goes on without.
        self._lost: set[str] = set()
        # The last row that was recorded, whose values may not be computed yet.
        self._pending: tuple[int, dict[str, Any], int] | None = None
        # (time, tokens) of the last rows, for the throughput.
        self._recent: collections.deque = collections.deque(maxlen=20)
        # Tokens trained on, those of earlier starts too.
        self._tokens_seen: float = 0
        # Loss and gradient norm of the last rows, and which loss, for the guard.
        self._guard = guard
        self._history: collections.deque = collections.deque(maxlen=guard and guard.history)
        # Updates that come to nothing end the run.
        self._check_updates = UpdateCheck(run, start, total_steps)
        # Compilations of the step, and how many of them a row has told of.
        self._compiled = 0
        self._told_compiled = 0

    def __enter__(self) -> "Recorder":
        self._began = self._told = time.monotonic()
        # This start's first step, which is compiled, and when it was done.
        self._first: tuple[int, float] | None = None
        if self._shows:
            self._open_files()
        if self._guard is not None:
            rows = read_rows(str(self.run), quiet=True) if self._shows else []
            seen = [watched(row) for row in rows]
            history = [values for values in seen if values]
            # Process 0 read them: all get the same.
            of_all = all_gather_json(history[-self._guard.history :])
            self._history.extend(of_all[0])
        jax.monitoring.register_event_duration_secs_listener(self._on_event)
        return self

    def _open_files(self) -> None:
        # TensorBoard's messages take a while to import, and other processes do without.
        from runtime.board import Board

        self.run.mkdir(parents=True, exist_ok=True)
        self._rows = Rows(self.run / "metrics.jsonl", self.start, self._seal)
        self._tokens_seen = self._rows.tokens_seen
        self._board: Board | None = None
        with self._if_possible("tensorboard"):
            self._board = Board(self.run / "tensorboard", self.start)
        with self._if_possible("samples.md"):
            cut_samples(self.run / "samples.md", self.start)
        self._bar = tqdm(
            total=self.total,
            initial=self.start,
            unit=self.unit,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def __exit__(self, kind: Any, fault: Any, trace: Any) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_event)
        # The last row, which may be a spike or fail on the device: files are closed in any case.
        try:
            self.flush()
        finally:
            if self._shows:
                self._rows.close()
                self._close_board()
                self._bar.close()
        if self._shows and fault is None:
            with self._if_possible("report.html", Exception):
                print(f"report: {run_report(str(self.run))}", file=sys.stderr)

    @contextlib.contextmanager
    def _if_possible(self, name: str, faults: type[Exception] = OSError) -> Iterator[None]:
        """Tell a fault in writing `name` once; training goes on without it."""
        try:
            yield
        except faults as fault:
            if name not in self._lost:
                line = f"warning: {self.run / name}: not written: {fault}"
                tqdm.write(f"{line}; the run goes on without it", file=sys.stderr)
            self._lost.add(name)

    def _close_board(self) -> None:
        if self._board is not None:
            with self._if_possible("tensorboard"):
                self._board.close()
            self._board = None

    def seal(self) -> Seal | None:
        """Put all rows so far on the disk; return their sum, or None but on process 0."""
        return self._rows.seal() if self._shows else None

    def steps(self) -> Iterator[int]:
        """Yield the steps still to do: `start` + 1 up to and including `total_steps`."""
        yield from range(self.start + 1, self.total + 1)

    # --- one step late

    def __call__(self, step: int, metrics: dict[str, Any], tokens: int = 0) -> None:
        """Keep the metrics of `step` and write those of the step before; never wait.

        Values: scalars of a device or of Python, or pairs (sum, weight). Further calls for the
        same step (an evaluation) join its row. `tokens`: how many the step trained on, for the
        throughput. Raises UserError after too many compilations, and what `flush` raises.
        """
        # The row of the step that brought a compilation tells of it.
        if self._compiled > MOST_COMPILATIONS:
            raise UserError(
                f"{self.run}: the step was compiled {self._compiled} times by step {step}, for "
                "batches of as many shapes; pad them to few (data.batches.bucket)"
            )
        if self._compiled > self._told_compiled:
            metrics = {**metrics, "compilations": self._compiled}
            self._told_compiled = self._compiled

        # The copies to the host start now and are waited for one step later.
        for value in jax.tree.leaves(metrics):
            if hasattr(value, "copy_to_host_async"):
                value.copy_to_host_async()
        if self._pending is not None and self._pending[0] == step:
            _, before, before_tokens = self._pending
            metrics = {**before, **metrics}
            tokens = before_tokens + tokens
        else:
            self.flush()
        self._pending = (step, metrics, tokens)

    def flush(self) -> None:
        """Write the pending row now, waiting for its values: call it before a checkpoint.

        Without one nothing is done. Raises guard.Spike if its values are a loss spike, and
        UserError where the run's updates come to nothing (runtime/updates.py).
        """
        if self._pending is None:
            return
        step, metrics, tokens = self._pending
        self._pending = None
        # This waits for the device.
        values = {name: _number(value) for name, value in metrics.items()}
        finished_step()

        # So far: tokens trained on, and memory.
        if tokens:
            self._tokens_seen += tokens
            values["tokens_seen"] = self._tokens_seen
        values["peak_memory"] = peak_memory()

        # Throughput over the last rows, the first of which began the time.
        now = time.monotonic()
        self._recent.append((now, tokens))
        span = now - self._recent[0][0]
        if tokens and span > 0:
            counts = [count for _, count in self._recent]
            values["tokens_per_second"] = sum(counts[1:]) / span
        if self._learning_rates is not None:
            # An update that was left out has not moved the schedule.
            done = self.last.get("updates", values.get("updates", step) - 1)
            values["learning_rate"] = float(self._learning_rates[max(0, int(done))])

        self.last = {**values, "step": step}
        if self._shows:
            self._write(step, values, now)
        # After the row is written, so that faults and a spike can be seen in metrics.jsonl.
        self._check_updates(step, values)
        seen = watched(values)
        if self._guard is not None and seen:
            name, latest = seen
            history = [earlier for of, earlier in self._history if of == name]
            if is_spike(self._guard, history, latest):
                raise Spike(step)
            self._history.append(seen)

    def _on_event(self, event: str, seconds: float, **named: Any) -> None:
        """Count the compilations that JAX tells of, those of make_train_step's step alone."""
        if event.endswith("backend_compile_duration"):
            self._compiled += TRAIN_STEP in str(named.get("fun_name"))

    # --- what is written and shown

    def _write(self, step: int, values: dict[str, float], now: float) -> None:
        """Write a row to metrics.jsonl and TensorBoard, and move the bar."""
        seconds = self._rows.seconds + now - self._began
        row = {"step": step, "seconds": round(seconds, 3), **values}
        # JSON has no NaN.
        self._rows.write(
            {name: value if math.isfinite(value) else None for name, value in row.items()}
        )
        with self._if_possible("tensorboard"):
            if self._board is not None:
                self._board.write(step, values)
        if "tensorboard" in self._lost:
            # Half an event hides those after it.
            self._close_board()
        if self._first is None:
            # The bar's time begins after the first step, which is compiled.
            self._first = step, now
            self._bar.initial = self._bar.n = self._bar.last_print_n = step
            self._bar.unpause()
        # The terminal: a bar, and lines that stay.
        self._bar.set_postfix_str("  ".join(_summary(values)), refresh=False)
        self._bar.update(step - self._bar.n)

        is_evaluation = any(name.startswith("eval/") for name in values)
        is_due = step == self.total or now - self._told > 10
        if is_evaluation or (is_due and not sys.stderr.isatty()):
            self._tell(step, values, now)

    def _tell(self, step: int, values: dict[str, float], now: float) -> None:
        """Print a line of at most 80 columns.

        Without a terminal there is one every ten seconds, else one at each evaluation.
        """
        assert self._first is not None
        self._told = now
        first, then = self._first
        parts = _summary(values)
        if step > first:
            seconds = (self.total - step) / (step - first) * (now - then)
            parts.append(f"{tqdm.format_interval(seconds)} left")
        # Parts are left out where they do not fit.
        line = f"{self.unit} {step}/{self.total}"
        for part in parts:
            if len(line) + len(part) <= 78:
                line += f"  {part}"
        tqdm.write(line, file=sys.stderr)

    def samples(self, step: int, rows: list[dict[str, Any]], shown: int = 2) -> None:
        """Append `rows`, of `step`, to samples.md, and show the first `shown` on the terminal.

        A row: {"prompt": text, "response": text} and anything more, as text. Only process 0 does
        so.
        """
        if not self._shows:
            return
        with self._if_possible("samples.md"):
            append_samples(self.run / "samples.md", step, rows)
        # On the terminal the first rows alone, wrapped.
        lines = [f"samples at {self.unit} {step}:"]
        for row in rows[:shown]:
            for name, value in row.items():
                text = printable(f"{name}: {value}")
                lines += textwrap.wrap(text, 78, initial_indent="  ", subsequent_indent="    ")
            lines.append("")
        tqdm.write("\n".join(lines), file=sys.stderr)


def peak_memory() -> float:
    """Return the most memory so far in GiB: of the fullest local device that tells, else the host.

    The host's is that of this process alone.
    """
    peaks = []
    for device in jax.local_devices():
        told = device.memory_stats() or {}
        peaks.append(told.get("peak_bytes_in_use", 0))
    if any(peaks):
        return max(peaks) / 2**30
    # Linux tells KiB, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _number(value: Any) -> float:
    """Return a scalar, or the mean of a pair (sum, weight), as a float; waits for the device."""
    if isinstance(value, tuple):
        total, weight = (float(np.asarray(part)) for part in value)
        return total / weight if weight else math.nan
    return float(np.asarray(value))


def _summary(values: dict[str, float]) -> list[str]:
    """Return what the terminal shows of a row, a piece of text each."""
    parts = []
    for name in SHOWN:
        if name not in values:
            continue
        part = f"{name} {values[name]:.3f}"
        if f"eval/{name}" in values:
            part += f" (held out {values[f'eval/{name}']:.3f})"
        parts.append(part)
    if "tokens_per_second" in values:
        parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    return parts
