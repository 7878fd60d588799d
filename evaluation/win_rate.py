"""How often one model's responses beat another's."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from data.batches import cut_left
from data.tokenizer import Message, Tokenizer, is_ended
from evaluation.intervals import share_interval
from objectives.policy import MissingEos, missing_eos
from responses import LoadedRun, Tokens, has_ended, make_sampler
from rewards.models import make_text_scorer
from sampling import SamplingConfig


class Judged(NamedTuple):
    """One model's responses to N prompts."""

    rewards_N: np.ndarray
    """As the reward model scores the sampled tokens."""
    ended_N: np.ndarray
    """True for a response that came to its end."""


def make_judge(
    reward: LoadedRun, sampling: SamplingConfig, max_prompt: int, seed: int
) -> Callable[[LoadedRun, Sequence[Sequence[Message]]], Judged]:
    """Make judge(policy, prompts) -> Judged: sample a response to each prompt, and score it.

    `reward`: a reward model, which scores the tokens that were sampled, as in training; a response
    by another tokenizer is spelt in its own, with an end where it had one. Prompts are cut on the
    left to `max_prompt` tokens. `seed`: of the samples.
    """
    config, tokenizer, params = reward
    score = make_text_scorer(config, tokenizer, max_prompt + sampling.max_new_tokens)

    def in_own_tokens(response: Tokens, theirs: Tokenizer) -> Tokens:
        """Spell a response of the tokenizer `theirs` in the reward model's."""
        end = [tokenizer.turn_end] if is_ended(response, theirs.ends) else []
        return [*tokenizer.encode(theirs.decode(response)), *end]

    def judge(policy: LoadedRun, prompts: Sequence[Sequence[Message]]) -> Judged:
        # A response to each prompt.
        theirs = policy.tokenizer
        respond = make_sampler(policy.config, sampling, theirs)
        asked = [cut_left(theirs.prompt(prompt), max_prompt, theirs) for prompt in prompts]
        responses = respond(policy.params, asked, jax.random.key(seed))
        ended_N = has_ended(responses, theirs.ends)

        # Its reward.
        if theirs.sha256 != tokenizer.sha256:
            responses = [in_own_tokens(response, theirs) for response in responses]
        return Judged(np.array(score(params, prompts, responses)), ended_N)

    return judge


def ruled(ours: Judged, theirs: Judged, rule: MissingEos) -> tuple[np.ndarray, np.ndarray]:
    """Return the rewards of both after `rule` on responses without an end, over both together.

    By `lowest` such a response loses to every one that ended, and ties with one that did not.
    """
    rewards_2N = np.concatenate([ours.rewards_N, theirs.rewards_N])
    ended_2N = np.concatenate([ours.ended_N, theirs.ended_N])
    ours_N, theirs_N = np.split(np.asarray(missing_eos(rewards_2N, ended_2N, rule)), 2)
    return ours_N, theirs_N


def wins(ours: Sequence[float] | np.ndarray, theirs: Sequence[float] | np.ndarray) -> np.ndarray:
    """Compare scores prompt by prompt: 1 where ours is higher, 1/2 for a tie, else 0.

    A score of nan is in no order: nan.
    """
    our_N = np.asarray(ours)
    their_N = np.asarray(theirs)
    won_N = our_N > their_N
    tied_N = our_N == their_N
    return np.where(np.isnan(our_N) | np.isnan(their_N), np.nan, won_N + 0.5 * tied_N)


def win_rate_table(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """Compare the rewards [N] of two models' responses to the same prompts.

    Returns `n`, `win_rate` with its interval `win_rate_ci`, and the mean rewards, `reward` (ours)
    and `reward_against`.
    """
    rate = share_interval(wins(ours, theirs))
    return {
        "n": len(ours),
        "win_rate": rate.value,
        "win_rate_ci": rate.ends,
        "reward": float(ours.mean()),
        "reward_against": float(theirs.mean()),
    }
