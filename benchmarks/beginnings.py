"""Steps where prompts have several responses: beginnings shared, rows packed, and rows padded.

    python -m benchmarks.beginnings --cores 1

All sides have the same weights and losses. Prints a table and writes
benchmarks/results/beginnings-<platform>.json after every row.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import command
from benchmarks.absent import standing_in
from benchmarks.rows import RESULTS, Built, Row, Side, run_rows, within
from benchmarks.train import same_losses

with standing_in():
    from model import LanguageModel, ScalarModel, init_and_apply
    from model_config import ModelConfig
    from objectives.group import surrogate_objective
    from objectives.reward import ranking_objective
    from objectives.unpadded import Room, model_inputs, rows_needed, with_room
    from train_state import init_state
    from train_step import OptimizerConfig, make_optimizer, make_train_step

STEPS = 2
"""First steps whose losses are compared."""


@dataclasses.dataclass(frozen=True)
class Config:
    preset: str = "world"
    """Name of a preset of model_config.PRESETS."""
    rows: tuple[str, ...] = ("reward model", "grpo")
    """Objectives to time."""
    prompts: tuple[int, ...] = (32, 8)
    """Prompts of each row's batch."""
    responses: tuple[int, ...] = (4, 8)
    """Responses to each prompt."""
    prompt: tuple[int, ...] = (16, 128)
    """Longest prompt, in tokens; the shortest has half."""
    response: tuple[int, ...] = (16, 32)
    """Longest response; the shortest has half."""
    rounds: int = 5
    """Timings of each side; medians are reported."""
    seconds: float = 1.0
    """Least duration of a timing, in seconds."""
    cores: int = 0
    """Cores that each side is held to, whose own seconds are then counted; 0: all, and the seconds
    that pass. On a shared CPU take 1."""
    row_limits: tuple[float, ...] = (300.0,)
    """Most seconds of each row, start and compilation included; the last is for the rest too."""
    out: str = RESULTS
    """Folder of the results."""


def responses_to(
    vocab: int, prompts: int, n: int, longest_prompt: int, longest: int
) -> dict[str, np.ndarray]:
    """Return rows [B, P + R] of random tokens, `n` neighbours to a prompt, as a Rollout has them.

    B is `prompts` times `n`. Lengths differ, from half of the longest on.
    """
    rng = np.random.default_rng(0)
    prompt_B1 = rng.integers(longest_prompt // 2, longest_prompt + 1, (prompts, 1)).repeat(n, 0)
    response_B1 = rng.integers(longest // 2, longest + 1, (prompts * n, 1))
    place_T = np.arange(longest_prompt + longest)
    is_late_BT = place_T >= longest_prompt - prompt_B1
    real_BT = is_late_BT & (place_T < longest_prompt + response_B1)
    tokens_BT = rng.integers(1, vocab, real_BT.shape)
    tokens_BT[:, :longest_prompt] = tokens_BT[::n, :longest_prompt].repeat(n, 0)
    return {
        "tokens_BT": (tokens_BT * real_BT).astype(np.int32),
        "segment_ids_BT": real_BT.astype(np.int32),
        "positions_BT": np.maximum(real_BT.cumsum(1) - 1, 0).astype(np.int32),
    }


def grpo_batch(rows: dict[str, np.ndarray], longest: int) -> dict[str, Any]:
    """Return `rows` as Experience of train_grpo, with random log-probabilities and advantages."""
    rng = np.random.default_rng(1)
    mask_BR = rows["segment_ids_BT"][:, -longest:].astype(np.float32)

    def normal(mean: float) -> np.ndarray:
        return rng.normal(mean, 0.1, mask_BR.shape).astype(np.float32)

    return {
        **rows,
        "response_BR": rows["tokens_BT"][:, -longest:],
        "mask_BR": mask_BR,
        "old_logp_BR": normal(-7.0),
        "reference_BR": normal(-7.0),
        "advantages_BR": normal(0.0),
    }


def comparison_batch(rows: dict[str, np.ndarray], n: int) -> dict[str, Any]:
    """Return `rows` as comparisons of `n` candidates, the first of them the best."""
    prompts = len(rows["tokens_BT"]) // n
    return {
        "tokens_BCT": rows["tokens_BT"].reshape(prompts, n, -1),
        "segment_ids_BCT": rows["segment_ids_BT"].reshape(prompts, n, -1),
        "positions_BCT": rows["positions_BT"].reshape(prompts, n, -1),
        "ranks_BC": np.tile(np.arange(1, n + 1, dtype=np.int32), (prompts, 1)),
        "margin_B": np.zeros(prompts, np.float32),
    }


def laid_out(batch: dict[str, Any], layout: str) -> dict[str, Any]:
    """Return `batch` with the least room of a `layout`: shared, packed or padded (none)."""
    if layout == "padded":
        return batch
    arrays = tuple(model_inputs(batch).values())
    *shape, _ = arrays[0].shape
    packed, distinct = rows_needed(arrays, 1).tolist()
    is_shared = layout == "shared"
    needed = distinct if is_shared else packed
    return with_room(batch, Room(needed / np.prod(shape), is_shared))


def step_of(config: Config, number: int, layout: str) -> Built:
    """Return a side whose call is a training step of row `number`, and its first losses."""
    what = config.rows[number]
    n, longest = config.responses[number], config.response[number]
    model = ModelConfig.from_preset(config.preset)
    longest_prompt = config.prompt[number]
    rows = responses_to(model.vocab, config.prompts[number], n, longest_prompt, longest)
    if what == "grpo":
        init, apply = init_and_apply(LanguageModel(model))
        batch = grpo_batch(rows, longest)
        objective = partial(
            surrogate_objective,
            apply,
            clip=0.2,
            clip_high=0.2,
            kl_coef=0.04,
            kl_estimator="k3",
            temperature=1.0,
            ratio="token",
            average="sequence",
        )
    else:
        init, apply = init_and_apply(ScalarModel(model))
        batch = comparison_batch(rows, n)
        objective = partial(ranking_objective, apply)

    # One step on the same batch, over and over.
    optimizer = make_optimizer(OptimizerConfig(lr=1e-3, schedule="constant", warmup=0), 1000)
    step = make_train_step(objective, optimizer)
    state = init_state(init(jax.random.key(0)), optimizer)
    batch = laid_out(jax.tree.map(jnp.asarray, batch), layout)
    losses = []

    def call() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))

    for _ in range(STEPS):
        call()
    room = batch.get("room", Room(1.0))
    facts = {"rows": room.rows(len(rows["tokens_BT"]))}
    return Built({what: call}, "jax", ("flax", "optax"), (list(losses), 2e-3), facts=facts)


def rows_of(config: Config) -> list[Row]:
    """Return a row for each objective."""
    found = []
    for number, what in enumerate(config.rows):
        count = config.prompts[number] * config.responses[number]
        length = config.prompt[number] + config.response[number]
        layouts = ("shared", "packed", "padded")
        found.append(
            Row(
                what=f"{what} {count}x{length}, {config.responses[number]} a prompt",
                sides={layout: Side(step_of, (config, number, layout)) for layout in layouts},
                tokens={what: count * length},
                agree=same_losses,
            )
        )
    return within(found, config.row_limits)


def main(config: Config) -> dict[str, Any]:
    """Time the steps, print the table, write the JSON; return what is written."""
    return run_rows("beginnings", config, rows_of(config))


if __name__ == "__main__":
    command.run(main, Config)
