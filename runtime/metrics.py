"""What a person sees of a run: its arithmetic, a progress bar, metrics.jsonl, TensorBoard, samples."""

import collections
import json
import math
import pathlib
import re
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
from runtime.run_folder import atomic_bytes, read_rows

SHOWN = ("loss", "score", "kl", "accuracy")
"""Metrics on the progress bar, where a script has them."""
STEP_NAMES = ("jit(step)", "jit_step", "step")
"""What JAX calls make_train_step's `step` when it tells of compilations, in one version or another."""
MOST_COMPILATIONS = 32
"""Of a run's steps; with a large model each takes minutes. Scripts have one or two, and batches up to four shapes."""


class Recorder:
    """Records a training loop one step late: values of step n are fetched when step n + 1 is recorded.

        with Recorder(config.run, config.steps, start) as record:
            for step in record.steps():                        # start + 1 .. total
                state, metrics = train_step(state, batch)
                record(step, metrics, tokens=batch["tokens_BT"].size)

    Rows after step `start` that an interrupted run left are removed. Only process 0 writes and shows. Compilations of
    the step are counted in the row of the step that brought one, and capped; `guard` raises guard.Spike.
    """

    def __init__(
        self,
        run: str,
        total_steps: int,
        start: int = 0,
        *,
        unit: str = "step",
        guard: GuardConfig | None = None,
    ):
        self.run, self.total, self.start, self.unit = pathlib.Path(run), total_steps, start, unit
        self.last: dict[str, float] = {}
        """The values of the newest row."""
        self._shows = jax.process_index() == 0
        self._pending: tuple[int, dict[str, Any], int] | None = None
        self._recent: collections.deque = collections.deque(
            maxlen=20
        )  # (time, tokens) of the last rows
        self._guard, self._history = guard, collections.deque(maxlen=guard and guard.window)
        self._compiled = self._told_compiled = 0

    def __enter__(self) -> "Recorder":
        jax.monitoring.register_event_duration_secs_listener(self._on_event)
        self._began = self._told = time.monotonic()
        self._first: tuple[int, float] | None = (
            None  # this start's first step, which is compiled, and when it was done
        )
        if self._shows:
            from tensorboardX import SummaryWriter

            self.run.mkdir(parents=True, exist_ok=True)
            self._earlier = _cut_rows(self.run / "metrics.jsonl", self.start)
            _cut_samples(self.run / "samples.md", self.start)
            self._rows = (self.run / "metrics.jsonl").open("a", buffering=1)
            self._board = SummaryWriter(str(self.run / "tensorboard"), purge_step=self.start + 1)
            counts = {"total": self.total, "initial": self.start, "unit": self.unit}
            self._bar = tqdm(**counts, dynamic_ncols=True, disable=not sys.stderr.isatty())
        if self._guard is not None:
            rows = read_rows(str(self.run)) if self._shows else []
            self._history.extend(
                all_gather_json(
                    [seen for row in rows if (seen := watched(row))][-self._guard.window :]
                )[0]
            )
        return self

    def __exit__(self, kind: Any, fault: Any, trace: Any) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_event)
        try:
            self.flush()
        finally:
            if self._shows:
                self._rows.close()
                self._board.close()
                self._bar.close()
        if self._shows and fault is None:
            from runtime.report import run_report

            print(f"report: {run_report(str(self.run))}", file=sys.stderr)

    def steps(self) -> Iterator[int]:
        """The numbers of the steps still to do: `start` + 1 up to and including `total_steps`."""
        yield from range(self.start + 1, self.total + 1)

    def __call__(self, step: int, metrics: dict[str, Any], tokens: int = 0) -> None:
        """Keeps the metrics of `step` and writes those of the step before; never waits for the device.

        Values: scalars of a device or of Python, or pairs (sum, weight). Further calls for the same step (an
        evaluation) join its row. `tokens`: how many the step trained on, for the throughput.
        """
        if self._compiled > MOST_COMPILATIONS:
            fault = f"the step was compiled {self._compiled} times by step {step}, for batches of as many shapes"
            raise UserError(f"{self.run}: {fault}; pad them to few (data.batches.bucket)")
        if self._compiled > self._told_compiled:
            metrics = {**metrics, "compilations": self._compiled}
            self._told_compiled = self._compiled
        for value in jax.tree.leaves(metrics):
            if hasattr(value, "copy_to_host_async"):
                value.copy_to_host_async()
        if self._pending is not None and self._pending[0] == step:
            _, before, before_tokens = self._pending
            metrics, tokens = {**before, **metrics}, before_tokens + tokens
        else:
            self.flush()
        self._pending = (step, metrics, tokens)

    def flush(self) -> None:
        """Writes the pending row now, waiting for its values: call it before a checkpoint."""
        if self._pending is None:
            return
        (step, metrics, tokens), self._pending = self._pending, None
        values = {name: _number(value) for name, value in metrics.items()}
        finished_step()
        now = time.monotonic()
        self._recent.append((now, tokens))
        span = now - self._recent[0][0]
        if tokens and span > 0:
            values["tokens_per_second"] = sum(count for _, count in list(self._recent)[1:]) / span
        self.last = {**values, "step": step}
        if self._shows:
            self._write(step, values, now)
        if self._guard is not None and (seen := watched(values)):
            if is_spike(self._guard, self._history, seen):
                raise Spike(step)
            self._history.append(seen)

    def _on_event(self, event: str, seconds: float, **named: Any) -> None:
        """Counts what JAX tells of compilations: those of make_train_step's `step`."""
        self._compiled += (
            event.endswith("backend_compile_duration") and named.get("fun_name") in STEP_NAMES
        )

    def _write(self, step: int, values: dict[str, float], now: float) -> None:
        row = {"step": step, "seconds": round(self._earlier + now - self._began, 3), **values}
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self._rows.write(json.dumps(finite) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._first is None:
            self._first = step, now
            self._bar.initial = self._bar.n = self._bar.last_print_n = step
            self._bar.unpause()
        self._bar.set_postfix_str("  ".join(_summary(values)), refresh=False)
        self._bar.update(step - self._bar.n)
        held_out = any(name.startswith("eval/") for name in values)
        if held_out or (not sys.stderr.isatty() and (step == self.total or now - self._told > 10)):
            self._tell(step, values, now)

    def _tell(self, step: int, values: dict[str, float], now: float) -> None:
        """A line of at most 80 columns; without a terminal one every ten seconds, else where something is held out."""
        self._told, (first, then) = now, self._first
        line = f"{self.unit} {step}/{self.total}"
        seconds = (self.total - step) / (step - first) * (now - then) if step > first else None
        left = [] if seconds is None else [f"{tqdm.format_interval(seconds)} left"]
        for part in [*_summary(values), *left]:
            line += f"  {part}" if len(line) + len(part) <= 78 else ""
        tqdm.write(line, file=sys.stderr)

    def samples(self, step: int, rows: list[dict[str, Any]], shown: int = 2) -> None:
        """Appends `rows` (prompt, response, anything more) to samples.md and shows the first `shown`."""
        if not self._shows:
            return
        with (self.run / "samples.md").open("a") as file:
            file.write(f"## Step {step}\n\n")
            for row in rows:
                file.writelines(
                    f"**{name}**\n\n{_fenced(str(value))}\n\n" for name, value in row.items()
                )
                file.write("---\n\n")
        lines = [f"samples at {self.unit} {step}:"]
        for row in rows[:shown]:
            for name, value in row.items():
                lines += textwrap.wrap(
                    f"{name}: {value}", 78, initial_indent="  ", subsequent_indent="    "
                )
            lines.append("")
        tqdm.write("\n".join(lines), file=sys.stderr)


def _number(value: Any) -> float:
    """A float of a scalar, or of a pair (sum, weight); waits for the device."""
    if isinstance(value, tuple):
        total, weight = (float(np.asarray(part)) for part in value)
        return total / weight if weight else math.nan
    return float(np.asarray(value))


def _summary(values: dict[str, float]) -> list[str]:
    parts = []
    for name in (name for name in SHOWN if name in values):
        held_out = f" (held out {values[f'eval/{name}']:.3f})" if f"eval/{name}" in values else ""
        parts.append(f"{name} {values[name]:.3f}{held_out}")
    speed = (
        [f"{values['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in values else []
    )
    return parts + speed


def _fenced(text: str) -> str:
    """`text` in a Markdown block that nothing in it can close."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}text\n{text}\n{fence}"


def _cut_rows(path: pathlib.Path, last: int) -> float:
    """Removes rows after step `last`, and a half-written one; returns the seconds of the last row kept."""
    if not path.exists():
        return 0.0
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["step"] <= last:
            kept.append(line)
    atomic_bytes(path, "".join(line + "\n" for line in kept).encode())
    return json.loads(kept[-1])["seconds"] if kept else 0.0


def _cut_samples(path: pathlib.Path, last: int) -> None:
    if path.exists():
        text = path.read_text()
        later = (
            m.start()
            for m in re.finditer(r"^## Step (\d+)\n", text, re.MULTILINE)
            if int(m[1]) > last
        )
        atomic_bytes(path, text[: next(later, len(text))].encode())
