"""The frame of a training script: restore, describe, record, save on time, stop on a signal.

    with Run(config, tokenizer) as run:
        state, base = run.start_or_resume(init, optimizer, mesh, batches)
        run.describe("fine-tuning on world", state.params, state.opt_state, length=config.length)
        for step in run.steps():
            state, metrics = train_step(state, to_mesh(next(batches), mesh), base)
            run.record(step, metrics, tokens=config.batch_size * config.length)
            if run.due(step, config.eval_every):
                run.record(step, evaluate(state.params, eval_batches))
            run.save_when_due(step, as_items(state), batches)
    return run.last_metrics

What a step does stays in the script; what every script does around its steps is here.
"""

import contextlib
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data.bad_rows import are_bad_rows_skipped, bad_rows, refused_records
from data.batches import Batches, is_refused
from data.records import Message
from data.tokenizer import Tokenizer
from model import Params
from model_config import ModelConfig
from planning.dry_run import Data, candidates_of, describe, lengths_of
from planning.world_defaults import world_defaults_note
from responses import make_sampler
from runtime.checkpoint import Checkpoints
from runtime.guard import GuardConfig, spike_count
from runtime.hosts import all_gather_json
from runtime.metrics import Recorder
from runtime.rows import Seal
from runtime.run_folder import atomic_text, path_from_root
from runtime.samples import SampleRow
from sampling import SamplingConfig
from train_state import Init, start_or_resume
from train_step import TrainState, make_schedule


def script_name(config: Any) -> str:
    """Name the script that defines the class of `config`, by its path from the root without `.py`.

    `config`: an instance of a script's Config. A fork's name has its folder:
    `experiments/alibi/train_sft`; that of a script outside the repository is its whole path,
    without `.py` too.
    """
    # The module of a script that is started is `__main__`, which knows its file too.
    module = sys.modules[type(config).__module__]
    assert module.__file__ is not None, "a Config is defined in a script's file"
    return path_from_root(pathlib.Path(module.__file__).with_suffix(""))


class Run:
    """A script's run folder while it trains: checkpoints, metrics and samples.

    `config` is the script's dataclass, stored whole in config.json. Read here are `run`, `steps`,
    `save_every`, `keep_checkpoints`, `batch_size` and `microbatches`, with the unit `step` also
    `optimizer`, and by start_or_resume `model`, `init`, `seed` and `lora`. On entry the folder is
    created or found to be the same run, else UserError and nothing is touched. On exit the last
    row of metrics and the last save are on the disk, and report.html is written. With several
    processes all must make the same calls.
    """

    def __init__(
        self,
        config: Any,
        tokenizer: Tokenizer,
        *,
        unit: str = "step",
        guard: GuardConfig | None = None,
    ):
        """Describe the run; nothing is written before entry.

        `tokenizer`: stored beside the checkpoints, for whoever reads the run. `unit`: the word for
        a step on the terminal; `step` also says that each step is one update, whose learning rate
        is recorded. `guard`: what counts as a loss spike, which then raises runtime.guard.Spike
        for `guarded` around the script's main; None: nothing does.
        """
        self.config = config
        self.start = 0
        """Steps that an earlier start of this run has finished."""
        # For the recorder, which `steps` makes once it is known where the run starts.
        self._unit = unit
        self._guard = guard
        # Read when the run has gone back already, if it does.
        self._spikes = 0
        # The data that is read, and the sum of the rows of metrics that are there already.
        self._data: dict[str, Batches] = {}
        self._seal: Seal | None = None
        # What `__exit__` closes: the recorder, which `steps` opens, then the checkpoints.
        self._open = contextlib.ExitStack()
        # A run is known by its script too: another one of the same settings is another run.
        self._checkpoints = Checkpoints(
            config.run,
            config,
            script=script_name(config),
            tokenizer=tokenizer.model,
            keep=config.keep_checkpoints,
        )

    def __enter__(self) -> "Run":
        # The folder, which must be new or this run's.
        self._open.enter_context(self._checkpoints)
        self._spikes = spike_count(self.config.run)
        # A loss spike takes the run back to its newest checkpoint: there should be some.
        is_guarded = self._guard is not None and self._guard.threshold > 0
        if is_guarded and self.config.save_every == 0 and jax.process_index() == 0:
            print(
                f"note: {self.config.run}: with --save_every=0 a loss spike takes it back to step "
                "0; save now and then, or turn the guard off by --guard.threshold=0",
                file=sys.stderr,
            )
        return self

    def __exit__(self, kind: Any, fault: Any, trace: Any) -> None:
        self._open.__exit__(kind, fault, trace)

    # --- before the first step

    def restore(self, shapes: dict[str, Any], data: Data) -> dict[str, Any] | None:
        """Load the newest good checkpoint and set `data` to where it was; None for a new run.

        For a script with more than one state; others call `start_or_resume`. `shapes`: the tree
        that `save_when_due` is given, as ShapeDtypeStructs with shardings (sharding.abstract).
        Returns that tree of arrays, laid so. Sets `start` to the checkpoint's step, in a new run
        to 0, where `data` stays as it is. Damaged checkpoints are passed over with a warning.
        Raises UserError for other names, shapes or dtypes, or where all are damaged.
        """
        # Damaged checkpoints are passed over, with a warning.
        found = self._checkpoints.restore(shapes)
        step, items, extra = found or (0, None, None)
        self._go_on(step, extra, data)
        return items

    def start_or_resume(
        self,
        init: Init,
        optimizer: optax.GradientTransformation,
        mesh: jax.sharding.Mesh,
        data: Data,
    ) -> tuple[TrainState, Params | None]:
        """Return the state of the newest checkpoint, or a fresh one, and the base of its adapters.

        `init`, `optimizer`: of the script's Update. A fresh state has random parameters of `init`,
        those of --init, or adapters on them. `data` is set to where the checkpoint left it, and
        `start` to its step; in a new run it stays as it is, and `start` is 0. The base: the
        parameters under the adapters, read from --init in a resumed run too; None without LoRA.
        Arrays lie on `mesh` as sharding.py says. Raises UserError as `restore` and
        train_state.starting_params do.
        """
        step, state, extra, base = start_or_resume(
            self._checkpoints, self.config, init, optimizer, mesh
        )
        self._go_on(step, extra, data)
        return state, base

    def _go_on(self, step: int, extra: Any, data: Data) -> None:
        """Go on after `step`: `extra` is what its checkpoint holds beside the state, or None.

        Rows of the data that were skipped are listed in skipped.txt, now and at each save.
        """
        self.start = step
        # One stream is kept as several are, with an empty name.
        self._data = data if isinstance(data, dict) else {"": data}
        # Older checkpoints hold the data's position alone.
        if isinstance(extra, dict) and extra.keys() == {"position", "rows"}:
            self._seal = extra["rows"]
            extra = extra["position"]
        _set_position(data, extra)
        self._list_skipped()

    def _list_skipped(self) -> None:
        """Write skipped.txt, what is wrong with each row of the data that was left out, if any."""
        if not are_bad_rows_skipped():
            return
        path = pathlib.Path(self.config.run) / "skipped.txt"
        # Of a resumed run those that it met before come first.
        lines: list[str] = []
        if self.start and path.exists():
            lines += path.read_text(encoding="utf-8").splitlines()
        # Rows of all files; then records, of which each host meets its own part.
        lines += bad_rows()
        for of_a_host in all_gather_json(refused_records()):
            lines += of_a_host
        # Each once.
        lines = list(dict.fromkeys(lines))
        if lines and jax.process_index() == 0:
            with atomic_text(str(path)) as file:
                file.writelines(f"{line}\n" for line in lines)

    def describe(
        self,
        what: str,
        params: Any,
        rest: Any,
        *,
        length: int,
        batches_a_step: Mapping[str, float] | None = None,
    ) -> None:
        """Print the arithmetic of the run: sizes, mesh, memory, steps; and what is read and cut.

        `what`: the title, printed behind the run's folder. `params`: the tree of what is trained.
        `rest`: a tree of all else that lies on the devices, such as the optimiser's state and
        other models; both of arrays, or of ShapeDtypeStructs with shardings. `length`: tokens a
        row. `batches_a_step`: {name of a stream: batches that a step reads of it}, where that is
        not one. Call it after start_or_resume or restore, whose `data` is what is read. It shows
        on the first process alone.
        """
        # A row of the batch may hold several candidates, each of `length` tokens.
        candidates = max([candidates_of(data.peek()) for data in self._data.values()], default=1)
        # Printed by process 0 alone: the others have no stdout (runtime/hosts.py).
        text = describe(
            f"{self.config.run}: {what}",
            params,
            rest,
            batch_size=self.config.batch_size,
            candidates=candidates,
            length=length,
            steps=self.config.steps,
            start=self.start,
            microbatches=self.config.microbatches,
            data=lengths_of(self._data, self.config.steps, batches_a_step),
            note=world_defaults_note(self.config),
        )
        print(text)

    # --- around each step

    def key(self, step: int) -> jax.Array:
        """Return the key of what a step draws: of --seed, and of the spikes gone back from."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), step)
        return jax.random.fold_in(key, self._spikes) if self._spikes else key

    def steps(self) -> Iterator[int]:
        """Yield the steps still to do, `start` + 1 to `config.steps`; stop after a signal's save.

        Call it once, after the state is restored: rows of metrics and samples after `start` are
        removed. Call `save_when_due` in each step: it makes that save; no signal stops a run that
        does not. Leaving the Run then raises KeyboardInterrupt after Ctrl-C, and after SIGTERM or
        SIGHUP, where steps are left, SystemExit(128 + the signal's number).
        """
        # The terminal, metrics.jsonl, TensorBoard and samples.md.
        recorder = Recorder(
            self.config.run,
            self.config.steps,
            self.start,
            unit=self._unit,
            guard=self._guard,
            seal=self._seal,
            learning_rates=self._learning_rates(),
        )
        self._recorder = self._open.enter_context(recorder)
        for step in self._recorder.steps():
            yield step
            # Set by `save_when_due`, which has saved by then.
            if self._checkpoints.stopping:
                return

    def _learning_rates(self) -> np.ndarray | None:
        """Return the learning rate of each update, [steps]; None where a step has many updates."""
        if self._unit != "step":
            return None
        # All at once, now: asked one by one they would wait for the device.
        schedule = make_schedule(self.config.optimizer, self.config.steps)
        counts = jnp.arange(self.config.steps)
        return np.broadcast_to(np.asarray(schedule(counts)), counts.shape)

    def record(self, step: int, metrics: dict[str, Any], tokens: int = 0) -> None:
        """Keep the metrics of `step`; write those of the step before, and wait for these alone.

        `metrics`: by name, scalars of the device or of Python, or pairs (sum, weight), written as
        their quotient; null where that is not finite. `tokens`: how many the step trained on, over
        all hosts, for the throughput; 0: none is written. Further calls for a step join its row:
        `tokens` add up, a name that is there is replaced. Added are the learning rate, in a script
        with one update a step, and of the data, on this host, how many records were cut or dropped
        so far, of files the epochs, and of mixtures the shares of their sources. Raises UserError
        where the step was compiled more than 32 times; for the row that it writes UserError after
        20 updates in a row that were not finite, or at the last step where none was taken, and
        guard.Spike, which is none, where the Run's `guard` finds one.
        """
        self._recorder(step, {**metrics, **self._data_metrics()}, tokens=tokens)

    def _data_metrics(self) -> dict[str, float]:
        """Return the records so far that were cut or dropped, the shares read, and the epochs."""
        # Counts are of all streams, and stay 0 where nothing is cut.
        streams = self._data.values()
        if not streams:
            return {}
        metrics: dict[str, float] = {
            "data/truncated": sum(data.truncated for data in streams),
            "data/dropped": sum(data.dropped for data in streams),
        }
        if are_bad_rows_skipped():
            metrics["data/refused"] = sum(data.refused for data in streams)
        # Of mixtures, what each of their sources has given.
        for name, data in self._data.items():
            for label, (of_examples, of_tokens) in data.shares.items():
                source = f"{name}/{label}" if len(streams) > 1 else label
                metrics[f"data/share/{source}"] = of_examples
                metrics[f"data/token_share/{source}"] = of_tokens
        # Of several streams the one that is seen most often.
        epochs = [data.epoch for data in streams if not data.is_endless]
        if epochs:
            metrics["data/epoch"] = max(epochs)
        return metrics

    def samples(self, step: int, rows: list[SampleRow]) -> None:
        """Append `rows` to samples.md under `step`, and show the first two on the terminal.

        Call it within `steps`. A row: {"prompt": text, "response": text}; further keys are written
        as text too. Only the first process writes.
        """
        self._recorder.samples(step, rows)

    def due(self, step: int, every: int) -> bool:
        """Return True if `every` divides `step`, or at the last step; False where `every` is 0."""
        return every > 0 and (step % every == 0 or step == self.config.steps)

    def save_when_due(self, step: int, items: dict[str, Any], data: Data) -> None:
        """Save every `save_every` steps (0: never), at the last one and after a signal.

        Call it at every step, on every process: here they agree to stop, and then `steps` ends.
        `step`: steps done, from 1. `items`: what `restore` gives, or `as_items(state)`; they may
        be donated after the call. `data`: what is read, whose position is saved with them. A save
        waits for the device, and until the save before it is on the disk. Raises, when it saves,
        UserError for `items["params"]` that are not finite, where the last save failed and where
        the folder is gone, and what `record` raises.
        """
        if self._checkpoints.due(step, self.config.save_every, self.config.steps):
            # The metrics first: a resumed run cuts rows after its checkpoint and repeats none.
            self._recorder.flush()
            extra = {"position": _position(data), "rows": self._recorder.seal()}
            self._checkpoints.save(step, items, extra)
            self._list_skipped()

    @property
    def last_metrics(self) -> dict[str, float]:
        """Return the newest row of metrics that is written, {name: float}; a property.

        {} before the first row of this start of the run. To be read once `steps` has begun, on any
        process. Rows, which have `step` too, are written a step late, the last on exit.
        """
        return self._recorder.last


# --- rows of samples.md


def sample_pairs(
    prompts: Sequence[str], responses: Sequence[Sequence[int]], tokenizer: Tokenizer
) -> list[SampleRow]:
    """Return {"prompt": text, "response": text} for each prompt, as `Run.samples` takes them.

    `prompts`: texts. `responses`: lists of token ids, one a prompt and in the same order
    (ValueError otherwise), such as `make_sampler`'s respond returns with n = 1; control tokens are
    left out of the text.
    """
    return [
        {"prompt": prompt, "response": tokenizer.decode(response)}
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def make_greedy_samples(
    model_config: ModelConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[list[Message]],
    *,
    max_prompt: int,
    max_new_tokens: int,
) -> Callable[[Params, jax.Array], list[SampleRow]]:
    """Make sample(params, key) -> rows for `Run.samples`, a greedy response to each prompt.

    `prompts`: one or more lists of messages, the user's last; only the last `max_prompt` tokens of
    each are seen, and only the last message is shown, as "prompt". Responses have at most
    `max_new_tokens` tokens; with `max_prompt` they must fit the model's context (not checked, but
    UserError where `max_new_tokens` alone is not below it). `params`: whole parameters of a
    language model of shape `model_config`. `key` changes nothing. sample waits for the device, and
    every process must call it. Prompts that the model's chat template refuses are left out, or
    end the command, as data.bad_rows says; without any left there are no samples.
    """
    # Greedy: the samples of two steps then differ by their parameters alone.
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=max_new_tokens)
    respond = make_sampler(model_config, sampling, tokenizer)
    prompts = [prompt for prompt in prompts if not is_refused(prompt, tokenizer, "samples")]
    prompt_tokens = [tokenizer.prompt(prompt)[-max_prompt:] for prompt in prompts]
    # What samples.md shows of each prompt.
    questions = [prompt[-1]["content"] for prompt in prompts]

    def sample(params: Params, key: jax.Array) -> list[SampleRow]:
        """Respond to all prompts with a language model's `params`; `key` is not used greedily."""
        if not prompts:
            return []
        return sample_pairs(questions, respond(params, prompt_tokens, key), tokenizer)

    return sample


# --- the position in the data, which a checkpoint holds


def _position(data: Data) -> Any:
    # Several streams keep their positions by name.
    if isinstance(data, dict):
        return {name: batches.state for name, batches in data.items()}
    return data.state


def _set_position(data: Data, position: Any) -> None:
    # A new run starts at the beginning.
    if not position:
        return
    # Several streams, by the names under which `_position` keeps them.
    if isinstance(data, dict):
        for name, state in position.items():
            data[name].restore(state)
    else:
        data.restore(position)
