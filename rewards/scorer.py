"""Scores of sampled responses: reward models of train_rm.py, Python functions that check an answer, and servers."""

import http.client
import importlib
import json
import math
import os
import pathlib
import sys
import time
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from data.batches import pad_examples
from data.tokenizer import Tokenizer
from model import Params, ScalarModel, init_and_apply
from model_config import ModelConfig, stored_model
from objectives.likelihood import inputs
from objectives.policy import response_states
from objectives.reward import combined, last_token, running_score, step_ends
from runtime.errors import UserError, require
from runtime.run_folder import load_config
from sharding import BATCH, abstract, to_mesh
from train_state import load_params

SCORES = ("product", "minimum", "last")
"""How the probabilities of a response's steps make its score (objectives/reward.py)."""
Batch = dict[str, jax.Array]
Check = Callable[[str, dict[str, Any]], float]
SENT = ("tokens_BT", "segment_ids_BT", "positions_BT", "response_BR", "mask_BR")
"""What a server is sent of a batch."""
WAIT = 300.0
"""Seconds for which a server may be away or busy."""


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
    model = stored_model(run)
    shapes = jax.eval_shape(init_and_apply(ScalarModel(model))[0], jax.random.key(0))
    return load_params(run, shapes=abstract(shapes, mesh)), model


def is_function(reward: str) -> bool:
    """Whether a reward is a module:function or a server rather than a run's folder."""
    return ":" in reward and not pathlib.Path(reward).is_dir()


def check_rewards(c: Any) -> None:
    """Raises UserError for rewards, of a script's Config, that cannot be combined."""
    require(0 < len(c.reward) == len(set(c.reward)), "--reward: name at least one, and none twice")
    require(
        len(c.weights) == (len(c.reward) if c.combine == "weighted" else 0),
        f"--weights: {len(c.weights)} for {len(c.reward)} rewards; give one each with --combine=weighted, else none",
    )
    require(
        c.combine != "gated" or len(c.reward) > 1,
        "--combine=gated: name the reward that counts, then those that gate",
    )


def pooled(c: Any, scores: Batch) -> jax.Array:
    """[B]: one score a response from `scores`, {reward: [B]}, as a script's --combine says."""
    in_order = [scores[reward] for reward in c.reward]  # jit sorts a dict
    return combined(in_order, c.combine, weights=c.weights, gate=c.gate, floor=c.floor)


def load_function(reward: str) -> Check:
    """function(response, record) -> float, named `module:function`; modules beside the scripts or in this folder."""
    module, _, name = reward.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as fault:
        raise UserError(
            f"--reward={reward}: {fault}; give module:function, or the folder of a train_rm run"
        ) from None
    if not callable(function):
        raise UserError(
            f"--reward={reward}: not a function; write one that takes (response, record)"
        )
    return function


def ask(reward: str, question: dict[str, Any]) -> list[float]:
    """Scores by the server at the address `reward` (rewards/serve.py), waited for up to WAIT seconds where it is away.

    A question is complete in itself, so a server that was killed answers it after its restart as it would have
    before. Raises UserError where it stays away, or refuses.
    """
    try:
        address = urllib.parse.urlsplit(reward)
        connection = http.client.HTTPConnection(
            address.hostname or "", address.port or 80, timeout=WAIT
        )
    except ValueError as fault:
        raise UserError(f"--reward={reward}: {fault}; give http://127.0.0.1:<port>") from None
    start, away, body = time.monotonic(), False, json.dumps(question)
    while True:
        try:
            connection.request(
                "POST", address.path or "/", body, {"Content-Type": "application/json"}
            )
            reply = connection.getresponse()
            text = reply.read().decode(errors="replace")
            break
        except (OSError, http.client.HTTPException) as fault:
            connection.close()
            fix = "start rewards/serve.py there, then give the same command again"
            if time.monotonic() - start > WAIT:
                raise UserError(
                    f"--reward={reward}: no answer for {WAIT:.0f} s ({fault}); {fix}"
                ) from None
            if not away:
                print(
                    f"note: --reward={reward}: no answer ({fault}); waiting up to {WAIT:.0f} s",
                    file=sys.stderr,
                )
            away = True
            time.sleep(0.5)
    connection.close()
    if reply.status != 200:
        raise UserError(f"--reward={reward}: {' '.join(text.split())[:300] or reply.reason}")
    if away:
        print(
            f"note: --reward={reward}: answers again after {time.monotonic() - start:.0f} s",
            file=sys.stderr,
        )
    try:
        return list(json.loads(text)["scores"])
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f'--reward={reward}: answered {text[:80]!r}; it must answer {{"scores": [...]}}'
        ) from None


def make_model_scorer(model: ModelConfig):
    """score(params, batch) -> (scores [B], scalars [B, R + 1]) by a reward model of that shape."""
    apply = init_and_apply(ScalarModel(model))[1]

    @jax.jit
    def score(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        scalars_BT = apply(params, *inputs(batch)).scalars_BT
        score_B = last_token(scalars_BT, batch["segment_ids_BT"])
        return score_B, response_states(batch, scalars_BT)

    return score


def make_scorer(
    rewards: Sequence[str], tokenizer: Tokenizer, mesh: jax.sharding.Mesh, script: str = "train_rm"
):
    """(models, score): {reward: parameters} of those that are runs of `script`, and what scores responses.

    score(models, batch, records) -> ({reward: scores [B]}, {reward: scalars [B, R + 1]}), the latter of reward models:
    for the state before each token of the response, and for that after the last. `batch` as of a rollout, `records`
    those of this host's prompts. Raises UserError for a reward that cannot be loaded or returns no number.
    """
    loaded = {
        reward: load_reward_model(reward, tokenizer, mesh, script)
        for reward in rewards
        if not is_function(reward)
    }
    servers = {reward for reward in rewards if reward.startswith("http://")}
    functions = {
        reward: load_function(reward)
        for reward in rewards
        if is_function(reward) and reward not in servers
    }
    for reward in servers:
        ask(
            reward, {"tokenizer": tokenizer.sha256, "texts": [], "records": [], "batch": {}}
        )  # mistakes show at once
    by_model = {reward: make_model_scorer(model) for reward, (_, model) in loaded.items()}

    def on_host(reward: str, batch: Batch, records: Sequence[dict[str, Any]]) -> jax.Array:
        names = SENT if reward in servers else SENT[-2:]
        parts = [batch[name] for name in names]
        local = multihost_utils.global_array_to_host_local_array(parts, mesh, [BATCH] * len(parts))
        rows = dict(zip(names, map(np.asarray, local), strict=True))
        lengths = rows["mask_BR"].sum(1).astype(np.int32)
        texts = [
            tokenizer.decode(row[:n].tolist())
            for row, n in zip(rows["response_BR"], lengths, strict=True)
        ]
        asked = [records[b // (len(texts) // len(records))] for b in range(len(texts))]
        if reward in servers:
            question = {"tokenizer": tokenizer.sha256, "texts": texts, "records": asked}
            scores = ask(
                reward, question | {"batch": {name: x.tolist() for name, x in rows.items()}}
            )
        else:
            scores = [
                functions[reward](text, record) for text, record in zip(texts, asked, strict=True)
            ]
        for score in scores:
            if not isinstance(score, int | float | np.number | np.bool_) or not math.isfinite(
                score
            ):
                raise UserError(
                    f"--reward={reward}: returned {score!r}; it must return a finite number"
                )
        if len(scores) != len(texts):
            raise UserError(
                f"--reward={reward}: returned {len(scores)} scores for {len(texts)} responses"
            )
        return to_mesh({"score_B": np.array(scores, np.float32)}, mesh)["score_B"]

    def score(
        models: dict[str, Params], batch: Batch, records: Sequence[dict[str, Any]]
    ) -> tuple[Batch, Batch]:
        scores, scalars = {}, {}
        for reward in rewards:
            if reward in models:
                scores[reward], scalars[reward] = by_model[reward](models[reward], batch)
            else:
                scores[reward] = on_host(reward, batch, records)
        return scores, scalars

    return {reward: params for reward, (params, _) in loaded.items()}, score


def make_step_scorer(run: str, tokenizer: Tokenizer, mesh: jax.sharding.Mesh, length: int):
    """score(prompts, responses) -> {how: log scores [N]}, of token lists that fit `length` together; by train_prm.py.

    What has been written of a response is scored too: its last token ends a step.
    """
    params, model = load_reward_model(run, tokenizer, mesh, "train_prm")
    apply, newlines, rows = init_and_apply(ScalarModel(model))[1], tokenizer.newlines(), 512

    @jax.jit
    def scores(params: Params, batch: Batch) -> Batch:
        ends_BT = step_ends(batch["tokens_BT"], batch["loss_mask_BT"], newlines)
        logits_BT = apply(params, *inputs(batch)).scalars_BT
        return {how: running_score(logits_BT, ends_BT, how)[:, -1] for how in SCORES}

    def score(
        prompts: Sequence[list[int]], responses: Sequence[list[int]]
    ) -> dict[str, np.ndarray]:
        pairs = zip(prompts, responses, strict=True)
        examples = [{"tokens": [*p, *r], "mask": [0] * len(p) + [1] * len(r)} for p, r in pairs]
        filled = examples + examples[:1] * (-len(examples) % rows)
        batches = (
            pad_examples(filled[i : i + rows], length, tokenizer.pad, True)
            for i in range(0, len(filled), rows)
        )
        parts = [jax.device_get(scores(params, to_mesh(batch, mesh))) for batch in batches]
        return {
            how: np.concatenate([part[how] for part in parts])[: len(examples)] for how in SCORES
        }

    return score
