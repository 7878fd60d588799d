"""A run and prompts in, responses out: what every collector, searcher and page samples with."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from data.batches import pad_prompts
from data.tokenizer import Tokenizer, is_ended
from model import LanguageModel, Params, init_and_apply
from model_config import ModelConfig, stored_model
from runtime.errors import UserError, require
from runtime.run_folder import load_config
from sampling import Samples, SamplingConfig, generate
from sharding import to_host
from slots import generate_in_slots
from train_state import has_scalar_head, load_params

Tokens = list[int]
Respond = Callable[..., list[Tokens]]
"""respond(params, prompts, key, rows=256) -> responses, lists of token ids; see `make_sampler`."""
Item = TypeVar("Item")
# Columns that prompts are padded to at least.
SHORTEST_WIDTH = 16


class LoadedRun(NamedTuple):
    """The model of a run: its shape, its tokenizer, its whole parameters (NumPy arrays)."""

    config: ModelConfig
    tokenizer: Tokenizer
    params: Params


def load_run(run: str, reward: bool = False) -> LoadedRun:
    """Load a language model, or with `reward` a reward model: the newest step of the run `run`.

    `run`: its folder, or a RunAtStep, a str too, of which it is that step. Which of the two models
    it is follows from its parameters: a reward model has a scalar head. They are NumPy arrays, and
    need no mesh; adapters come merged. Raises UserError for the other kind, and as load_params
    does, as for a missing run. All processes must call it.
    """
    # A run of the other kind is named by its script.
    script = load_config(run)["script"]
    is_reward_model = has_scalar_head(run)
    if is_reward_model != reward:
        found = "reward model" if is_reward_model else "language model"
        wanted = "reward model" if reward else "language model"
        raise UserError(f"{run}: a {found} (of {script}); name the run of a {wanted}")
    return LoadedRun(stored_model(run), Tokenizer.load(run), load_params(run))


def make_sampler(
    config: ModelConfig,
    sampling: SamplingConfig,
    tokenizer: Tokenizer,
    n: int = 1,
    *,
    slots: int | None = None,
    ends: Sequence[int] = (),
) -> Respond:
    """Make the sampler of `n` responses to each prompt by a language model of shape `config`.

    Returns respond(params, prompts, key, rows=256) -> a list of responses, n to each prompt, in
    the order of the prompts, of which there must be one or more. `params`: whole parameters.
    Prompts and responses are lists of token ids; a response has its end token where it came to
    one, and no padding. Prompts are not cut: that one and `max_new_tokens` fit the context is up
    to the caller (not checked). `rows`: most prompts decoded in one call, any number, each call
    with a key of its own. Prompts are padded on the left to a power of two in length, which may
    exceed the context, and the last of several calls is filled up to `rows`: so few shapes are
    compiled. Waits for the device; every process must call it.

    `slots`: responses decoded at a time over all devices (`generate_in_slots`), any number from 1;
    None: all of a call (`generate`). `ends`: ids of tokens that end a response beside the
    tokenizer's. make_sampler raises UserError where `max_new_tokens` is not below the context.
    """
    require(
        sampling.max_new_tokens < config.context,
        f"--max_new_tokens={sampling.max_new_tokens}: must be below {config.context}, the model's "
        "context, to leave a prompt room",
    )
    # Compiled once for each shape of prompts.
    _, apply = init_and_apply(LanguageModel(config))
    decode = generate if slots is None else partial(generate_in_slots, slots=slots)

    @jax.jit
    def sample(params: Params, prompts: dict[str, jax.Array], key: jax.Array) -> Samples:
        # A search over steps, say, also stops at the end of a line.
        eos = jnp.array([*tokenizer.ends, *ends])
        return decode(
            apply, config, params, prompts, key, sampling, eos=eos, pad=tokenizer.pad, n=n
        )

    def respond(
        params: Params, prompts: Sequence[Tokens], key: jax.Array, rows: int = 256
    ) -> list[Tokens]:
        # Few widths: a power of two that holds the longest prompt.
        longest = max(len(tokens) for tokens in prompts)
        width = max(SHORTEST_WIDTH, 1 << (longest - 1).bit_length())

        # Part by part, each with the key of the index at which it starts.
        responses: list[Tokens] = []
        for start, part in full_parts(prompts, min(rows, len(prompts))):
            padded = [{"tokens": tokens} for tokens in part]
            batch = pad_prompts(padded, width, tokenizer.pad, fixed=True)
            part_key = jax.random.fold_in(key, start)
            samples = to_host(sample(params, batch, part_key))
            refuse_not_finite(samples.logp_BR)

            # Responses without their padding.
            lengths_B = samples.mask_BR.sum(1).astype(int)
            for response_R, length in zip(samples.response_BR, lengths_B, strict=True):
                responses.append(response_R[:length].tolist())
        # What the last part was filled up with is cut off.
        return responses[: len(prompts) * n]

    return respond


def refuse_not_finite(logp_BR: np.ndarray) -> None:
    """Raise UserError where a sampler's log-probabilities say that its logits were not finite."""
    # Of such logits no token is the best: what was drawn is no token either.
    require(
        bool(np.isfinite(logp_BR).all()),
        "the model's log-probabilities are not finite: its weights are damaged, or too large for "
        "its --model.dtype",
    )


def has_ended(responses: Sequence[Tokens], ends: Sequence[int]) -> np.ndarray:
    """Return [N] bool: True for a response, a list of token ids, whose last one is in `ends`.

    An empty response is False.
    """
    return np.array([is_ended(tokens, ends) for tokens in responses], bool)


def full_parts(items: Sequence[Item], size: int) -> Iterator[tuple[int, list[Item]]]:
    """Yield (start, part): parts of `items`, lists of `size`, and the index at which each starts.

    The last part is filled up with copies of its first item, so that all have one shape to
    compile: cut what is made of all parts, in order, to the number of the items. No items give no
    part.
    """
    for start in range(0, len(items), size):
        yield start, filled(items[start : start + size], size)


def filled(items: Sequence[Item], size: int) -> list[Item]:
    """Return a list of `items` filled up to `size` with copies of the first; there must be one.

    Longer `items` are returned whole. Raises IndexError where there is none.
    """
    return [*items, *[items[0]] * (size - len(items))]


def split_evenly(items: Sequence[Item], size: int) -> list[list[Item]]:
    """Cut `items` into lists of `size`, in order: such as n responses to each prompt, by prompt.

    The last list is shorter where `size`, at least 1, does not divide their number; no items give
    [].
    """
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def in_parts(count: int, rows: int, name: str, unit: str = "prompt") -> Iterator[int]:
    """Yield 0, `rows`, 2 `rows`, ... below `count`, under a progress bar on stderr called `name`.

    These are where each part of `count` prompts, or of what `unit` calls them, starts. The bar
    counts prompts, not parts; each process that calls it shows one.
    """
    with tqdm(total=count, desc=name, unit=unit, mininterval=2) as bar:
        for start in range(0, count, rows):
            yield start
            # The caller is done with the part.
            bar.update(min(rows, count - start))
