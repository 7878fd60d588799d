"""A run and prompts in, responses out: what every collector, searcher and page samples with."""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from tqdm import tqdm

from data.batches import pad_prompts
from data.tokenizer import Tokenizer
from model import LanguageModel, Params, init_and_apply
from model_config import ModelConfig, stored_model
from runtime.errors import UserError
from runtime.run_folder import load_config
from sampling import Samples, SamplingConfig, generate, generate_in_slots
from sharding import to_host
from train_state import load_params


def load_run(run: str, reward: bool = False) -> tuple[ModelConfig, Tokenizer, Params]:
    """Model, tokenizer and parameters of a language model's run, or of a `reward` model's; UserError for the other."""
    config, params = load_config(run), load_params(run)
    if ("head" in params) != reward:
        kinds = ("language model", "reward model")
        raise UserError(
            f"{run}: a {kinds[not reward]} (of {config['script']}); name the run of a {kinds[reward]}"
        )
    return stored_model(run), Tokenizer.load(run), params


def make_sampler(
    config: ModelConfig,
    sampling: SamplingConfig,
    tokenizer: Tokenizer,
    n: int = 1,
    *,
    slots: int | None = None,
    ends: Sequence[int] = (),
):
    """respond(params, prompts: token lists, key) -> n responses a prompt, in order, as token lists.

    Prompts are padded to a power of two in length and to `rows` a call, so that few shapes are compiled. `slots`:
    responses decoded at a time (`generate_in_slots`). `ends`: tokens that end a response beside the tokenizer's.
    """
    _, apply = init_and_apply(LanguageModel(config))
    decode = generate if slots is None else partial(generate_in_slots, slots=slots)

    @jax.jit
    def sample(params: Params, prompts: dict[str, jax.Array], key: jax.Array) -> Samples:
        eos = jnp.array([tokenizer.eos, *ends])
        return decode(
            apply, config, params, prompts, key, sampling, eos=eos, pad=tokenizer.pad, n=n
        )

    def respond(params: Params, prompts: Sequence[list[int]], key: jax.Array, rows: int = 256):
        length = max(len(tokens) for tokens in prompts)
        length = max(16, 1 << (length - 1).bit_length())
        rows = min(rows, len(prompts))
        out: list[list[int]] = []
        for start in range(0, len(prompts), rows):
            part = list(prompts[start : start + rows])
            padded = [{"tokens": tokens} for tokens in part + [part[0]] * (rows - len(part))]
            batch = pad_prompts(padded, length, tokenizer.pad, fixed=True)
            samples = to_host(sample(params, batch, jax.random.fold_in(key, start)))
            lengths = samples.mask_BR.sum(1).astype(int)[: len(part) * n]
            out += [
                row[:end].tolist() for row, end in zip(samples.response_BR, lengths, strict=False)
            ]
        return out

    return respond


def in_parts(count: int, rows: int, name: str) -> Iterator[int]:
    """0, `rows`, 2 `rows`, ... below `count`: where each part of `count` prompts starts, with a progress bar."""
    with tqdm(total=count, desc=name, unit="prompt", mininterval=2) as bar:
        for start in range(0, count, rows):
            yield start
            bar.update(min(rows, count - start))
