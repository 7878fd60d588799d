"""Rewards by name: what --reward may say, and the scores of a rollout by several of them.

A reward is the run of a reward model, a function `module:function` that is called with (response,
record), or the address of a server (rewards/serve.py).
"""

import importlib
import inspect
import os
import reprlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from data.records import Record
from data.tokenizer import Tokenizer
from model import Params
from model_config import ModelConfig
from objectives.policy import Combine, MissingEos, combined, last_token, response_states
from rewards.client import SENT, Question, ask
from rewards.models import Batch, load_reward_model, make_scalars
from runtime.errors import UserError, refuse_unread, require
from runtime.inputs import FUNCTION, search_current_folder
from sharding import BATCH, to_mesh

Check = Callable[[str, Record], float]
"""(response's text, record of its prompt) -> reward."""
Arrays = dict[str, jax.Array]
Score = Callable[[dict[str, Params], Batch, Sequence[Record]], tuple[Arrays, Arrays]]
"""score(models, batch, records) -> (scores, scalars), by reward; see `make_reward_scorer`."""
LARGEST = float(np.finfo(np.float32).max)
"""Size of the largest reward."""
# What a function's reward depends on of a batch.
SEEN = ("response_BR", "mask_BR")


class Rewards(Protocol):
    """The fields of a script's Config that say how several rewards make one score."""

    @property
    def reward(self) -> tuple[str, ...]:
        """Names of the rewards, one or more."""

    @property
    def combine(self) -> Combine:
        """How their scores are combined (objectives.policy.combined)."""

    @property
    def weights(self) -> tuple[float, ...]:
        """A weight each for `weighted`, else none."""

    @property
    def gate(self) -> float:
        """Score that all rewards but the first must reach, for `gated`."""

    @property
    def floor(self) -> float | None:
        """Score of a response that does not, for `gated`; None: below all others."""

    @property
    def missing_eos(self) -> MissingEos:
        """Rule for a response without an end (objectives.policy.missing_eos)."""


# ---- Names of rewards ----


def is_server(reward: str) -> bool:
    """True for the address of a server, http://host:port; nothing is asked of it."""
    return reward.startswith("http://")


def is_function(reward: str) -> bool:
    """True for `module:function` or a server's address, False for a run's folder."""
    return ":" in reward and not os.path.isdir(reward)


def load_function(reward: str, flag: str = "--reward") -> Check:
    """Import the function named `module:function`: function(response's text, record) -> float.

    The module is one of the root's, or lies in the current folder. Raises UserError, which names
    `flag`, for a module or name that is not there, or no function.
    """
    or_a_run = ", or the folder of a train_rm run" if flag == "--reward" else ""
    # As it is pinned by (runtime/inputs.py); no relative name, which Python would refuse.
    if not FUNCTION.fullmatch(reward):
        raise UserError(f"{flag}={reward}: names no function; give module:function{or_a_run}")
    module, _, name = reward.partition(":")
    search_current_folder()
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as fault:
        raise UserError(f"{flag}={reward}: {fault}; give module:function{or_a_run}") from None
    if not callable(function) or not _takes_two(function):
        raise UserError(
            f"{flag}={reward}: not a function; write one that takes (response, record)"
        )
    return function


def _takes_two(function: Callable) -> bool:
    """Tell if a function can be called with a response and a record, as far as Python knows."""
    try:
        inspect.signature(function).bind("", {})
    except TypeError:
        return False
    except ValueError:
        # One of another language does not say.
        return True
    return True


def load_check(check: str) -> Check:
    """Import `module:function` as check(response's text, record) -> float in [0, 1], 1 for right.

    `check`: what --check says. Raises UserError as `load_function` does; the function that is
    returned raises it for a value that is no number in [0, 1].
    """
    function = load_function(check, "--check")

    def checked(response: str, record: Record) -> float:
        verdict = function(response, record)
        is_number = isinstance(verdict, int | float | np.number | np.bool_)
        if not is_number or not 0 <= verdict <= 1:
            raise UserError(f"--check={check}: returned {verdict!r}; it must be in 0..1")
        return float(verdict)

    return checked


# ---- Several rewards as one score ----


def check_rewards(config: Rewards) -> None:
    """Raise UserError for rewards that cannot be combined as `config` says; load none."""
    count = len(config.reward)
    distinct = len(set(config.reward))
    require(0 < count == distinct, "--reward: name at least one, and none twice")

    wanted = count if config.combine == "weighted" else 0
    require(
        len(config.weights) == wanted,
        f"--weights: {len(config.weights)} for {count} rewards; "
        "give one each with --combine=weighted, else none",
    )
    require(
        config.combine != "gated" or count > 1,
        "--combine=gated: name the reward that counts, then those that gate",
    )
    gated = (config.combine == "gated", "--combine=gated")
    refuse_unread(config, {"gate": gated, "floor": gated})
    check_missing_eos(config)


def check_missing_eos(config: Any) -> None:
    """Raise UserError for a --missing_eos_score that the rule --missing_eos does not read.

    `config`: a script's, with `missing_eos` and `missing_eos_score`.
    """
    has_score = config.missing_eos in ("replace", "penalty")
    rule = "--missing_eos=replace or penalty"
    refuse_unread(config, {"missing_eos_score": (has_score, rule)})


def pooled(config: Rewards, scores: Arrays) -> jax.Array:
    """Combine `scores`, {reward: [B]}, into one score a response, [B], as --combine says."""
    # In the order of --reward, which `gated` and the weights go by: jit sorts a dict.
    in_order = [scores[reward] for reward in config.reward]
    return combined(
        in_order, config.combine, weights=config.weights, gate=config.gate, floor=config.floor
    )


# ---- Scores of a rollout ----


def make_reward_scorer(
    rewards: Sequence[str],
    tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh,
    of_steps: bool = False,
) -> tuple[dict[str, Params], Score]:
    """Load `rewards` and make what scores a rollout by each of them.

    Returns (models, score). models: {reward: parameters on the mesh} of those that are runs; they
    are given to score, which holds none, so that they can lie in the host's memory meanwhile.

    score(models, batch, records) -> ({reward: scores [B]}, {reward: scalars [B, R + 1]}). `batch`:
    a rollout's, on the mesh (rollout.py). `records`: those of this host's prompts, in the batch's
    order, each with equally many responses next to one another. The scalars are of reward models
    alone: at the last token of the prompt and at each of the response. All processes must call
    score; for functions and servers it waits for the device.

    Raises UserError for a reward that cannot be loaded or reached, and, unless `of_steps`, for a
    model of steps; score raises it where a function or a server returns no finite number.
    """
    # Reward models, with a jitted scorer each.
    models: dict[str, Params] = {}
    model_scorers: dict[str, Callable] = {}
    for reward in rewards:
        if not is_function(reward):
            config, models[reward] = load_reward_model(reward, tokenizer, mesh, of_steps)
            model_scorers[reward] = make_model_scorer(config)

    # Functions and servers, which score texts on each host.
    host_scorers: dict[str, Callable] = {}
    for reward in rewards:
        if is_server(reward):
            host_scorers[reward] = make_server_scorer(reward, tokenizer)
        elif is_function(reward):
            host_scorers[reward] = make_function_scorer(load_function(reward))

    def on_host(reward: str, batch: Batch, records: Sequence[Record]) -> jax.Array:
        """Score this host's responses by a function or a server; [B] on the mesh."""
        # The responses of this host, with the record of each one's prompt.
        rows = local_rows(batch, SENT if is_server(reward) else SEEN, mesh)
        texts = decode_responses(rows, tokenizer)
        each = len(texts) // len(records)
        asked = [records[b // each] for b in range(len(texts))]

        # One number for each, back on the mesh.
        scores = host_scorers[reward](texts, asked, rows)
        check_scores(reward, scores, len(texts))
        return to_mesh({"score_B": np.array(scores, np.float32)}, mesh)["score_B"]

    def score(
        models: dict[str, Params], batch: Batch, records: Sequence[Record]
    ) -> tuple[Arrays, Arrays]:
        scores: Arrays = {}
        scalars: Arrays = {}
        for reward in rewards:
            if reward in models:
                result = model_scorers[reward](models[reward], batch)
                scores[reward], scalars[reward] = result
            else:
                scores[reward] = on_host(reward, batch, records)
        return scores, scalars

    return models, score


def make_model_scorer(
    config: ModelConfig,
) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array]]:
    """Make the jitted scorer of a rollout's responses by a reward model of shape `config`.

    Returns score(params, batch) -> (scores [B], scalars [B, R + 1]). A score is the scalar at the
    response's last token, its end token included. The scalars are those at the last token of the
    prompt and at the response's R tokens. `batch`: a rollout's (rollout.py), with `mask_BR`.
    """
    scalars = make_scalars(config)

    @jax.jit
    def score(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        scalars_BT = scalars(params, batch)
        score_B = last_token(scalars_BT, batch["segment_ids_BT"])
        return score_B, response_states(batch, scalars_BT)

    return score


def make_function_scorer(function: Check) -> Callable[..., list[float]]:
    """Make score(texts [B], records [B], rows) -> B scores by `function`; `rows` is not read.

    `function(text, record)` is called once a response, and what it returns is not checked.
    """

    def score(
        texts: list[str], records: Sequence[Record], rows: dict[str, np.ndarray]
    ) -> list[float]:
        return [function(*pair) for pair in zip(texts, records, strict=True)]

    return score


def make_server_scorer(reward: str, tokenizer: Tokenizer) -> Callable[..., list[float]]:
    """Make score(texts [B], records [B], rows) -> B scores by the server at `reward`.

    `rows`: this host's arrays SENT, by name. All are sent as one question. An empty question is
    asked at once, so that another tokenizer or a wrong address shows before anything is sampled:
    UserError.
    """

    def score(
        texts: list[str], records: Sequence[Record], rows: dict[str, np.ndarray]
    ) -> list[float]:
        question: Question = {
            "tokenizer": tokenizer.sha256,
            "texts": texts,
            "records": list(records),
            "batch": {name: x.tolist() for name, x in rows.items()},
        }
        return ask(reward, question)

    score([], [], {})
    return score


def local_rows(
    batch: Batch, names: Sequence[str], mesh: jax.sharding.Mesh
) -> dict[str, np.ndarray]:
    """Return this host's rows of the arrays `names` of a batch on the mesh, as NumPy arrays.

    Waits for the device.
    """
    parts = [batch[name] for name in names]
    local = multihost_utils.global_array_to_host_local_array(parts, mesh, [BATCH] * len(parts))
    return {name: np.asarray(part) for name, part in zip(names, local, strict=True)}


def decode_responses(rows: dict[str, np.ndarray], tokenizer: Tokenizer) -> list[str]:
    """Return the texts of `response_BR` up to where `mask_BR` ends, what is in its holes too.

    `rows`: both arrays, [B, R], by name. Special tokens, the end among them, are in no text.
    """
    texts = []
    for response_R, mask_R in zip(rows["response_BR"], rows["mask_BR"], strict=True):
        # Not the mask's sum: it may have holes, tokens that an environment wrote.
        length = int(mask_R.nonzero()[0].max(initial=-1)) + 1
        texts.append(tokenizer.decode(response_R[:length].tolist()))
    return texts


def check_scores(reward: str, scores: Sequence[Any], count: int) -> None:
    """Raise UserError, which names `reward`, unless `scores` are `count` finite numbers.

    They are to be finite in float32, as which they are used.
    """
    for score in scores:
        value = score.item() if isinstance(score, np.generic) else score
        # NaN is not at most any number; an integer of any length is compared as it is.
        if not isinstance(value, int | float) or not abs(value) <= LARGEST:
            raise UserError(
                f"--reward={reward}: returned {reprlib.repr(score)}; it must return a finite "
                f"number, at most {LARGEST:.3g} either way"
            )
    if len(scores) != count:
        raise UserError(f"--reward={reward}: returned {len(scores)} scores for {count} responses")
