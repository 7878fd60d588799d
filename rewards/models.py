"""Reward models, and their scores of texts and of the steps of solutions.

All scores are made of `make_scalars`, also those of rollouts (rewards/scorer.py). They differ in
how rows come to be, and in which of a row's scalars make its score.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import jax
import numpy as np

from data.batches import SHORTEST_PROMPT, Row, cut_left, pad_examples, pad_prompts
from data.tokenizer import Message, Tokenizer
from model import Params, ScalarModel, init_and_apply
from model_config import ModelConfig, stored_model
from objectives.policy import last_token
from objectives.reward import StepScore, running_score, step_ends
from objectives.unpadded import run_model
from responses import Tokens, full_parts
from runtime.errors import UserError, require
from runtime.run_folder import load_config
from sharding import abstract, to_host, to_mesh
from train_state import has_scalar_head, load_params

Batch = Mapping[str, Any]
"""Arrays by name."""
Prompt = str | Sequence[Message]
STEP_SCORES: tuple[StepScore, ...] = get_args(StepScore)
"""How the probabilities of a response's steps make its score (running_score)."""
# Rows a call, of texts and of solutions; those of the last call are filled up.
TEXT_ROWS = 128
STEP_ROWS = 512


class RewardModel(NamedTuple):
    """The shape of a reward model, and its parameters on the mesh."""

    config: ModelConfig
    params: Params


def load_reward_model(
    run: str, tokenizer: Tokenizer, mesh: jax.sharding.Mesh, of_steps: bool = True
) -> RewardModel:
    """Load the reward model of the folder `run`, whichever script trained it, onto `mesh`.

    `tokenizer`: the policy's. `of_steps`: the caller can read scores of steps. Raises UserError
    for the run of a language model, for a run with another tokenizer, and, unless `of_steps`, for
    one that was trained on steps: its Config has the field `scores`, as train_prm.py's.
    """
    # What the run holds says what it is.
    stored = load_config(run)
    script = stored["script"]
    if not has_scalar_head(run):
        raise UserError(f"{run}: a language model (of {script}); name the run of a reward model")
    if stored.get("scores") == "steps" and not of_steps:
        raise UserError(
            f"{run}: scores steps, not whole responses (of {script}); name a run of train_rm.py, "
            "or have train_ppo.py read it by --step_rewards"
        )
    # The policy's tokens must mean the same to it.
    theirs = Tokenizer.load(run).sha256
    ours = tokenizer.sha256
    if theirs != ours:
        raise UserError(
            f"{run}: its tokenizer is {theirs[:12]}, that of the policy is {ours[:12]}; "
            "use one trained from it"
        )

    config = stored_model(run)
    init, _ = init_and_apply(ScalarModel(config))
    shapes = jax.eval_shape(init, jax.random.key(0))
    return RewardModel(config, load_params(run, shapes=abstract(shapes, mesh)))


def refuse_nan(run: str, scores: Sequence[float] | np.ndarray) -> None:
    """Raise UserError for a score of `run` that is nan: nothing is chosen by it."""
    require(
        not np.isnan(scores).any(),
        f"{run}: its scores are not finite; name a run whose training went well",
    )


def make_scalars(config: ModelConfig) -> Callable[[Params, Batch], jax.Array]:
    """Make the pass of a reward model of shape `config` over rows of prompt and response.

    Returns scalars(params, batch) -> float32 [B, T], for use under jit: the scalar at each token,
    which says how good the row is up to it. `batch`: `tokens_BT`, `segment_ids_BT` and
    `positions_BT`, one example a row, padded on either side, and perhaps a `room`
    (objectives.unpadded).
    """
    _, apply = init_and_apply(ScalarModel(config))

    def scalars(params: Params, batch: Batch) -> jax.Array:
        return run_model(apply, params, batch).scalars_BT

    return scalars


def make_text_scorer(
    config: ModelConfig, tokenizer: Tokenizer, length: int
) -> Callable[[Params, Sequence[Prompt], Sequence[str | Tokens]], list[float]]:
    """Make the scorer of written or sampled responses, by a reward model of shape `config`.

    Returns score_texts(params, prompts, responses) -> one float a response, in order; it waits for
    the device. A prompt, one a response, is a user's text or a list of messages. A response is a
    text, which gets the end token, or the token ids that were sampled, which are scored as they
    are. Rows of more than `length` tokens are cut on the left as in training: the prompt first,
    down to 8 tokens, then whatever is still too long.
    """
    scalars = make_scalars(config)

    @jax.jit
    def last_scalars(params: Params, batch: Batch) -> jax.Array:
        return last_token(scalars(params, batch), batch["segment_ids_BT"])

    def row_of(prompt: Prompt, response: str | Tokens) -> Row:
        # A text is whole; what was sampled may have no end, and must get none.
        answer = response
        if isinstance(response, str):
            answer = tokenizer.answer(response)
        # The prompt is cut first, and the response only where it fills the row alone.
        room = max(length - len(answer), SHORTEST_PROMPT)
        asked = cut_left(tokenizer.prompt(prompt), room, tokenizer)
        return {"tokens": [*asked, *answer][-length:]}

    def score_texts(
        params: Params, prompts: Sequence[Prompt], responses: Sequence[str | Tokens]
    ) -> list[float]:
        rows = [row_of(*pair) for pair in zip(prompts, responses, strict=True)]
        scores: list[float] = []
        for _, part in full_parts(rows, TEXT_ROWS):
            # Padded on the left, all to one width: one program.
            batch = pad_prompts(part, length, tokenizer.pad, fixed=True)
            scores += to_host(last_scalars(params, batch)).tolist()
        return scores[: len(rows)]

    return score_texts


def make_step_scorer(
    run: str, tokenizer: Tokenizer, mesh: jax.sharding.Mesh, length: int
) -> Callable[[Sequence[list[int]], Sequence[list[int]]], dict[StepScore, np.ndarray]]:
    """Load the reward model `run` as a scorer of the steps of solutions.

    Returns score_steps(prompts, responses) -> {way: log of the score, [N] float32} for each of
    STEP_SCORES, N at least 1; it waits for the device. Both arguments are N lists of token ids, a
    pair of at most `length` tokens; a response may have its end token. A partial response is
    scored too: its last token ends a step. An empty one has -inf. Raises UserError as
    `load_reward_model` does.
    """
    config, params = load_reward_model(run, tokenizer, mesh)
    scalars = make_scalars(config)
    newlines = tokenizer.newlines()

    @jax.jit
    def last_scores(params: Params, batch: Batch) -> dict[StepScore, jax.Array]:
        mask_BT = batch["loss_mask_BT"]
        ends_BT = step_ends(batch["tokens_BT"], mask_BT, newlines, tokenizer.ends)
        logits_BT = scalars(params, batch)
        scores = {}
        for way in STEP_SCORES:
            score_BT = running_score(logits_BT, ends_BT, way)
            scores[way] = score_BT[:, -1]
        return scores

    def row_of(prompt: list[int], response: list[int]) -> Row:
        # Steps are the response's; a newline in the prompt ends none.
        tokens = [*prompt, *response]
        mask = [0] * len(prompt) + [1] * len(response)
        return {"tokens": tokens, "mask": mask}

    def score_steps(
        prompts: Sequence[list[int]], responses: Sequence[list[int]]
    ) -> dict[StepScore, np.ndarray]:
        rows = [row_of(*pair) for pair in zip(prompts, responses, strict=True)]
        found: list[dict[StepScore, np.ndarray]] = []
        for _, part in full_parts(rows, STEP_ROWS):
            # Padded on the right, all to one width, and split over the mesh.
            padded = pad_examples(part, length, tokenizer.pad, fixed=True)
            scores = last_scores(params, to_mesh(padded, mesh))
            found.append(to_host(scores))

        # All parts' rows, without what the last part was filled up with.
        scores_N = {}
        for way in STEP_SCORES:
            all_rows = np.concatenate([part_scores[way] for part_scores in found])
            scores_N[way] = all_rows[: len(rows)]
            refuse_nan(run, scores_N[way])
        return scores_N

    return score_steps
