"""LESS: rows whose gradients point where those of a validation set do (Xia et al. 2024).

A row is as good as training on it would lower the validation loss. To first order that is the
inner product of two gradients: of the validation loss, and of the update that Adam would make of
the row's own. Gradients are of low-rank adapters, and projected at random, so that they are small.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from collect.examples import ROWS, Example, over_examples, padded_parts, record_example
from collect.scores import over_records
from data.batches import Batch
from data.records import Record
from data.selection import generator
from data.sources import Source
from lora import LoraConfig, lora_base, trainable_part, with_adapters
from model import LanguageModel, Params, init_and_apply
from model_config import ModelConfig
from objectives.likelihood import likelihood_objective, without_auxiliary
from responses import LoadedRun

LORA = LoraConfig(rank=8, alpha=16.0)
# Adam's, of the warm-up and of a row's update.
RATE = 1e-3
BETA1 = 0.9
BETA2 = 0.999
EPSILON = 1e-8
# Numbers of a projected gradient, and rows of the projection that are drawn at a time.
WIDTH = 1024
DRAWN = 4096
# Rows whose gradients are computed at a time; those of a batch are held together.
GRADIENTS = 8

Loss = Callable[[Params, Params, Batch], jax.Array]
"""loss(adapters, base, batch): the mean negative log-likelihood of a batch's responses, in nats.

`base`: the weights under the adapters, which do not change."""
Features = Callable[[Batch], jax.Array]
"""features(batch) -> [B, WIDTH]: a projected gradient, or update, of each row."""


class WarmedUp(NamedTuple):
    """Adapters after a warm-up, and Adam's means of their gradients and of the squares."""

    base: Params
    adapters: Params
    first: Params
    second: Params
    steps: int


def influences(
    model: LoadedRun,
    source: Source,
    validation: Source,
    *,
    length: int,
    warmup: int,
    most: int,
    key: jax.Array,
) -> np.ndarray:
    """Return the cosine of each row's update with the validation's gradient, [N] (eq. 3).

    `model`: from which the adapters start; they are first trained for `warmup` updates on rows
    drawn at random, as the paper's are on 5 % of the data. The validation's gradient is the mean
    over its first `most` records. Examples are cut to `length` tokens.
    """
    tokenizer = model.tokenizer
    start_key, draw_key, project_key = jax.random.split(key, 3)
    loss = make_loss(model.config)

    def encoded(records: Iterable[Record]) -> list[Example]:
        return [record_example(record, tokenizer, length) for record in records]

    def features_of(features: Features, records: list[Record]) -> np.ndarray:
        return over_examples(features, encoded(records), length, tokenizer.pad)

    def drawn() -> Iterator[Batch]:
        rng = generator(draw_key)
        for _ in range(warmup):
            numbers = rng.integers(len(source), size=ROWS)
            examples = encoded(source[int(i)] for i in numbers)
            yield from padded_parts(examples, length, tokenizer.pad)

    # Adapters that have seen some of the data: at their start B is 0, and so is A's gradient.
    adapters = trainable_part(LORA, model.params, start_key)
    warmed_up = warm_up(loss, adapters, lora_base(LORA, model.params) or {}, drawn())
    project = partial(projected, key=project_key)

    # The direction that lowers the validation loss, then each row's update against it.
    gradients = make_features(loss, warmed_up, project, of_adam=False)
    target_W = features_of(gradients, validation.first(most)).mean(0)
    updates = make_features(loss, warmed_up, project, of_adam=True)

    def score(records: list[Record]) -> np.ndarray:
        return cosines(features_of(updates, records), target_W)

    return over_records(score, source, "less")


def make_loss(config: ModelConfig) -> Loss:
    """Make the loss of adapters of a language model of shape `config`."""
    _, apply = init_and_apply(LanguageModel(config))

    def loss(adapters: Params, base: Params, batch: Batch) -> jax.Array:
        full = with_adapters(LORA, base, adapters)
        total, (weight, beside) = likelihood_objective(apply, full, batch)
        # The loss that balances experts says nothing of a row's text.
        return without_auxiliary(total, beside) / jnp.maximum(weight, 1)

    return loss


def warm_up(loss: Loss, adapters: Params, base: Params, batches: Iterable[Batch]) -> WarmedUp:
    """Train adapters on `base` by Adam, an update a batch."""
    adam = optax.scale_by_adam(BETA1, BETA2, EPSILON)

    @jax.jit
    def step(adapters: Params, state: optax.ScaleByAdamState, base: Params, batch: Batch):
        gradients = jax.grad(loss)(adapters, base, batch)
        updates, state = adam.update(gradients, state)
        adapters = jax.tree.map(lambda x, update: x - RATE * update, adapters, updates)
        return adapters, state

    state = adam.init(adapters)
    for batch in batches:
        adapters, state = step(adapters, state, base, batch)
    return WarmedUp(base, adapters, state.mu, state.nu, int(state.count))


def make_features(
    loss: Loss, warmed_up: WarmedUp, project: Callable[[jax.Array], jax.Array], *, of_adam: bool
) -> Features:
    """Make the projected gradients of rows, or, `of_adam`, the updates that Adam makes of them.

    `project(x [n, P]) -> [n, W]`: P numbers of a gradient to W.
    """
    # The next step's number.
    step = warmed_up.steps + 1

    def adam_update(gradient_P: jax.Array, first_P: jax.Array, second_P: jax.Array) -> jax.Array:
        # Adam's means with this gradient, their bias taken off (section 4.1 of the paper).
        mean_P = (BETA1 * first_P + (1 - BETA1) * gradient_P) / (1 - BETA1**step)
        square_P = (BETA2 * second_P + (1 - BETA2) * gradient_P**2) / (1 - BETA2**step)
        return mean_P / (jnp.sqrt(square_P) + EPSILON)

    # Weights are arguments: as constants they would be part of the program.
    @jax.jit
    def features(base: Params, adapters: Params, first: Params, second: Params, batch: Batch):
        first_P, _ = ravel_pytree(first)
        second_P, _ = ravel_pytree(second)

        def of_row(row: Batch) -> jax.Array:
            # A batch of this row alone.
            alone = {name: x[None] for name, x in row.items()}
            gradient_P, _ = ravel_pytree(jax.grad(loss)(adapters, base, alone))
            return adam_update(gradient_P, first_P, second_P) if of_adam else gradient_P

        # Few rows' activations at a time; all rows' gradients are projected by the same draw.
        return project(jax.lax.map(of_row, batch, batch_size=GRADIENTS))

    return partial(features, *warmed_up[:4])


def projected(x_NP: jax.Array, key: jax.Array, width: int = WIDTH) -> jax.Array:
    """Project rows of P numbers to `width` by random signs, [n, width].

    Cosines are kept to about 1 / sqrt(width) (Johnson and Lindenstrauss 1984; Achlioptas 2003).
    The signs are drawn part by part, and never held together.
    """
    count, numbers = x_NP.shape
    parts = -(-numbers // DRAWN)
    padded_NP = jnp.pad(x_NP, ((0, 0), (0, parts * DRAWN - numbers)))
    part_CND = padded_NP.reshape(count, parts, DRAWN).swapaxes(0, 1)

    def add(total_NW: jax.Array, part: tuple[jax.Array, jax.Array]):
        number, x_ND = part
        signs_DW = random_signs(jax.random.fold_in(key, number), DRAWN, width)
        return total_NW + jnp.einsum("ND,DW->NW", x_ND, signs_DW), None

    start_NW = jnp.zeros((count, width))
    total_NW, _ = jax.lax.scan(add, start_NW, (jnp.arange(parts), part_CND))
    return total_NW / width**0.5


def random_signs(key: jax.Array, rows: int, width: int) -> jax.Array:
    """Draw 1 and -1 with equal chances, [rows, width], one random bit each."""
    # Enough words of 32 bits for each row, and their bits one after another.
    words = jax.random.bits(key, (rows, -(-width // 32)), jnp.uint32)
    shifts = jnp.arange(32, dtype=jnp.uint32)
    bits = (words[:, :, None] >> shifts) & 1
    bits = bits.reshape(rows, -1)

    # As many as a row is wide: 0 becomes 1, and 1 becomes -1.
    kept = bits[:, :width].astype(jnp.float32)
    return 1.0 - 2.0 * kept


def cosines(rows_NW: np.ndarray, target_W: np.ndarray) -> np.ndarray:
    """Return the cosine of each row with `target_W`, [N]; 0 where one of them is 0."""
    lengths_N = np.linalg.norm(rows_NW, axis=1) * np.linalg.norm(target_W)
    return rows_NW @ target_W / np.where(lengths_N > 0, lengths_N, 1)
