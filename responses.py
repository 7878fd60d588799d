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
"""respond(params, prompts, key, rows=256) -> responses; see `make_sampler`."""
Item = TypeVar("Item")
# Columns that prompts are padded to at least.
SHORTEST_WIDTH = 16


class LoadedRun(NamedTuple):
    """The model of a run: its shape, its tokenizer, its parameters (NumPy arrays)."""

    config: ModelConfig
    tokenizer: Tokenizer
    params: Params


def load_run(run: str, reward: bool = False) -> LoadedRun:
    """Load the run, in the folder `run`, of a language model, or with `reward` of a reward model.

    Which of the two it is follows from its parameters: a reward model has a scalar head. Raises
    UserError for the other kind, and as load_params does.
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

    Returns respond(params, prompts, key, rows=256) -> responses, n to each prompt, in the order of
    the prompts, of which there must be one or more. Prompts and responses are lists of token ids;
    a response has its end token where it came to one, and no padding. `rows`: prompts a call, each
    call with a key of its own. Prompts are padded on the left to a power of two in length, and the
    last call is filled up to `rows`: so few shapes are compiled.

    `slots`: responses decoded at a time (`generate_in_slots`). `ends`: ids of tokens that end a
    response beside the tokenizer's. Raises UserError for responses longer than the context.
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

            # Responses without their padding.
            lengths_B = samples.mask_BR.sum(1).astype(int)
            for response_R, length in zip(samples.response_BR, lengths_B, strict=True):
                responses.append(response_R[:length].tolist())
        # What the last part was filled up with is cut off.
        return responses[: len(prompts) * n]

    return respond


def has_ended(responses: Sequence[Tokens], ends: Sequence[int]) -> np.ndarray:
    """Return [N] bool: True for a response, a list of token ids, whose last one is in `ends`."""
    return np.array([is_ended(tokens, ends) for tokens in responses], bool)


def full_parts(items: Sequence[Item], size: int) -> Iterator[tuple[int, list[Item]]]:
    """Yield `items` in parts of `size`, each with the index at which it starts; none of no items.

    The last part is filled up with copies of its first item, so that all have one shape to
    compile. What is made of them all, in order, wants to be cut to the items' number.
    """
    for start in range(0, len(items), size):
        yield start, filled(items[start : start + size], size)


def filled(items: Sequence[Item], size: int) -> list[Item]:
    """Return a list of `items` filled up to `size` with copies of the first; there must be one."""
    return [*items, *[items[0]] * (size - len(items))]


def split_evenly(items: Sequence[Item], size: int) -> list[list[Item]]:
    """Cut `items` into lists of `size`: responses, n to each prompt, by their prompt.

    The last list is shorter where `size` does not divide their number.
    """
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def in_parts(count: int, rows: int, name: str, unit: str = "prompt") -> Iterator[int]:
    """Yield 0, `rows`, 2 `rows`, ... below `count`, under a progress bar called `name`.

    These are where each part of `count` prompts, or of what `unit` calls them, starts.
    """
    with tqdm(total=count, desc=name, unit=unit, mininterval=2) as bar:
        for start in range(0, count, rows):
            yield start
            # The caller is done with the part.
            bar.update(min(rows, count - start))
