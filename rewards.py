"""Scores of sampled responses: reward models of train_rm.py, and Python functions that check an answer."""

import importlib
import math
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from checkpoint import load_params
from config import UserError, load_config
from data.batches import pad_examples
from data.tokenizer import Tokenizer
from model import ModelConfig, Params, ScalarModel, pure
from objectives.likelihood import inputs
from objectives.reward import last_token, running_score, step_ends
from sharding import BATCH, abstract, to_mesh

SCORES = ("product", "minimum", "last")
"""How the probabilities of a response's steps make its score (objectives/reward.py)."""
Batch = dict[str, jax.Array]
Check = Callable[[str, dict[str, Any]], float]


def load_reward_model(
    run: str, tokenizer: Tokenizer, mesh: jax.sharding.Mesh, script: str = "train_rm"
) -> tuple[Params, ModelConfig]:
    """A run of `script` on the mesh; raises UserError, also where it has another tokenizer."""
    config = load_config(run)
    if config["script"] != script:
        raise UserError(f"{run}: a run of {config['script']}; name one of {script}")
    if (theirs := Tokenizer.load(run).sha256) != tokenizer.sha256:
        ours = tokenizer.sha256
        raise UserError(
            f"{run}: its tokenizer is {theirs[:12]}, that of the policy is {ours[:12]}; use one trained from it"
        )
    model = ModelConfig(**config["model"])
    shapes = jax.eval_shape(pure(ScalarModel(model))[0], jax.random.key(0))
    return load_params(run, shapes=abstract(shapes, mesh)), model


def is_function(reward: str) -> bool:
    """Whether a reward is named as module:function rather than by a run's folder."""
    return ":" in reward and not pathlib.Path(reward).is_dir()


def load_function(reward: str) -> Check:
    """function(response, record) -> float, named `module:function`; modules beside the scripts or in this folder."""
    module, _, name = reward.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as fault:
        raise UserError(f"--reward={reward}: {fault}; give module:function, or the folder of a train_rm run") from None
    if not callable(function):
        raise UserError(f"--reward={reward}: not a function; write one that takes (response, record)")
    return function


def make_scorer(rewards: Sequence[str], tokenizer: Tokenizer, mesh: jax.sharding.Mesh):
    """score(batch, records) -> ({reward: scores [B]}, {reward: potentials [B, R]}), the latter of reward models.

    `batch` as of a rollout, `records` those of this host's prompts. A potential is the model's scalar for the state
    in which a token was emitted. Raises UserError for a reward that cannot be loaded or returns no number.
    """
    models = {reward: load_reward_model(reward, tokenizer, mesh) for reward in rewards if not is_function(reward)}
    functions = {reward: load_function(reward) for reward in rewards if is_function(reward)}
    applies = {reward: pure(ScalarModel(model))[1] for reward, (_, model) in models.items()}

    @partial(jax.jit, static_argnames="reward")
    def by_model(reward: str, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        scalars_BT = applies[reward](params, *inputs(batch))
        new = batch["mask_BR"].shape[1]
        return last_token(scalars_BT, batch["segment_ids_BT"]), scalars_BT[:, -new - 1 : -1]

    def by_function(reward: str, batch: Batch, records: Sequence[dict[str, Any]]) -> jax.Array:
        parts = (batch["response_BR"], batch["mask_BR"].sum(1).astype(np.int32))
        local = multihost_utils.global_array_to_host_local_array(parts, mesh, (BATCH, BATCH))
        rows, lengths = map(np.asarray, local)
        n = len(rows) // len(records)
        scores = np.zeros(len(rows), np.float32)
        for b, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            score = functions[reward](tokenizer.decode(row[:length].tolist()), records[b // n])
            if not isinstance(score, int | float | np.number | np.bool_) or not math.isfinite(score):
                raise UserError(f"--reward={reward}: returned {score!r}; it must return a finite number")
            scores[b] = score
        return to_mesh({"score_B": scores}, mesh)["score_B"]

    def score(batch: Batch, records: Sequence[dict[str, Any]]) -> tuple[Batch, Batch]:
        scores, potentials = {}, {}
        for reward in rewards:
            if reward in models:
                scores[reward], potentials[reward] = by_model(reward, models[reward][0], batch)
            else:
                scores[reward] = by_function(reward, batch, records)
        return scores, potentials

    return score


def make_step_scorer(run: str, tokenizer: Tokenizer, mesh: jax.sharding.Mesh, length: int):
    """score(prompts, responses) -> {how: log scores [N]}, of token lists that fit `length` together; by train_prm.py.

    What has been written of a response is scored too: its last token ends a step.
    """
    params, model = load_reward_model(run, tokenizer, mesh, "train_prm")
    apply, newline, rows = pure(ScalarModel(model))[1], tokenizer.encode("\n")[-1], 512

    @jax.jit
    def scores(params: Params, batch: Batch) -> Batch:
        ends_BT = step_ends(batch["tokens_BT"], batch["loss_mask_BT"], newline)
        logits_BT = apply(params, *inputs(batch))
        return {how: running_score(logits_BT, ends_BT, how)[:, -1] for how in SCORES}

    def score(prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> dict[str, np.ndarray]:
        pairs = zip(prompts, responses, strict=True)
        examples = [{"tokens": [*p, *r], "mask": [0] * len(p) + [1] * len(r)} for p, r in pairs]
        filled = examples + examples[:1] * (-len(examples) % rows)
        batches = (pad_examples(filled[i : i + rows], length, tokenizer.pad, True) for i in range(0, len(filled), rows))
        parts = [jax.device_get(scores(params, to_mesh(batch, mesh))) for batch in batches]
        return {how: np.concatenate([part[how] for part in parts])[: len(examples)] for how in SCORES}

    return score
