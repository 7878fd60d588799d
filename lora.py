"""LoRA (Hu et al. 2021): the base's weights stay, and what a script trains is a tree of low-rank adapters alone.

    python train_sft.py --init=runs/llama --lora.rank=8 --run=runs/llama-sft

Beside the weight `q` [L, D, N, H] lie `q_a` [L, D, R] and `q_b` [L, R, N, H], and likewise for every matrix of the
layers; where model.py finds them it adds x A B (eq. 3). A reward model's head is trained whole, among the adapters.
"""

import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from model import LanguageModel, Params, init_and_apply
from model_config import stored_model
from runtime.errors import UserError
from runtime.run_folder import finished_steps
from sharding import abstract

INPUTS = {"attention": {"q": 1, "k": 1, "v": 1, "o": 2}, "mlp": {"gate": 1, "up": 1, "down": 1}}
"""The adapted weights, and how many of their axes after the layer's are inputs."""
WHOLE = ("head", "bias")
"""Parameters without a base, which are trained as they are."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on --init."""

    rank: int = 0
    """Rank of the adapters; 0: all weights are trained."""
    alpha: float = 16.0
    """Their product is multiplied by alpha / rank."""
    base: tyro.conf.Suppress[str] = ""
    """SHA-256 of the manifest of the base's step; filled when the run starts."""


def trainable_part(config: LoraConfig, params: Params, key: jax.Array) -> Params:
    """What is trained of `params`: new adapters, normal A and zero B, and the head; at rank 0 all of it."""
    if not config.rank:
        return params
    layers: Params = {}
    for part, inputs in INPUTS.items():
        layers[part] = {}
        for name, count in inputs.items():
            key, own = jax.random.split(key)
            depth, *shape = params["decoder"]["layers"][part][name].shape
            fan_in = math.prod(shape[:count])
            a = jax.random.normal(own, (depth, *shape[:count], config.rank)) * fan_in**-0.5
            b = jnp.zeros((depth, config.rank, *shape[count:]))
            layers[part] |= {f"{name}_a": a, f"{name}_b": b}
    return {
        "decoder": {"layers": layers},
        **{name: params[name] for name in WHOLE if name in params},
    }


def lora_base(config: LoraConfig, params: Params) -> Params | None:
    """The base: what of `params` stays as it is; None at rank 0."""
    return {name: x for name, x in params.items() if name not in WHOLE} if config.rank else None


def with_adapters(config: LoraConfig, base: Params | None, trained: Params) -> Params:
    """The tree that model.py applies: the base's arrays with the adapters beside them; copies no weight."""
    if base is None:
        return trained
    layers = dict(base["decoder"]["layers"])
    for part, adapters in trained["decoder"]["layers"].items():
        scaled = {
            n: x * (config.alpha / config.rank) if n.endswith("_b") else x
            for n, x in adapters.items()
        }
        layers[part] = {**layers[part], **scaled}
    return {**base, **trained, "decoder": {**base["decoder"], "layers": layers}}


def merge(config: LoraConfig, base: Params, trained: Params) -> Params:
    """W + alpha / rank A B: the parameters of a plain model, of NumPy or JAX as the base's are."""
    layers = dict(base["decoder"]["layers"])
    for part, adapters in trained["decoder"]["layers"].items():
        layers[part] = dict(layers[part])
        for name in INPUTS[part]:
            w, a, b = layers[part][name], adapters[f"{name}_a"], adapters[f"{name}_b"]
            product = a.reshape(w.shape[0], -1, config.rank) @ b.reshape(
                w.shape[0], config.rank, -1
            )
            layers[part][name] = w + product.reshape(w.shape) * w.dtype.type(
                config.alpha / config.rank
            )
    whole = {name: trained[name] for name in WHOLE if name in trained}
    rest = (
        {} if whole else {name: x for name, x in base.items() if name != "decoder"}
    )  # a scalar model unembeds nothing
    return {"decoder": {**base["decoder"], "layers": layers}, **rest, **whole}


def note_lora_base(config: Any) -> Any:
    """A script's `config` with the base's step noted, so that resuming on another base is refused; at rank 0 as it is.

    Raises UserError for a rank below 0, or without --init.
    """
    if config.lora.rank < 0 or (config.lora.rank and config.init is None):
        raise UserError(
            f"--lora.rank={config.lora.rank}: needs --init=RUN, the base; and a rank of 0 or more"
        )
    if not config.lora.rank:
        return config
    steps = finished_steps(pathlib.Path(config.init) / "checkpoints")
    if not steps:
        raise UserError(f"--init={config.init}: no checkpoint; name the folder of a finished run")
    return dataclasses.replace(
        config, lora=dataclasses.replace(config.lora, base=_sum(config.init, steps[0]))
    )


def merged(
    run: str, config: dict[str, Any], trained: Params, load: Callable[..., Params], shapes: Any
) -> Params:
    """The `trained` of `run`, whose config.json is `config`, in its base, which `load(run, step, shapes)` reads.

    `shapes`: as load_params takes them. Raises UserError where the base's step is gone, or for other shapes.
    """
    lora, base = LoraConfig(**config["lora"]), config["init"]
    steps = finished_steps(pathlib.Path(base) / "checkpoints")
    step = next((step for step in steps if _sum(base, step) == lora.base), None)
    if step is None:
        raise UserError(
            f"{run}: its base, a step of {base}, is gone; restore that run, or train the adapters anew"
        )
    if shapes is None:
        return merge(lora, load(base, step, None), trained)
    of_base = jax.eval_shape(
        init_and_apply(LanguageModel(stored_model(run)))[0], jax.random.key(0)
    )
    found = jax.eval_shape(partial(merge, lora), of_base, trained)
    if jax.tree.map(jnp.shape, found) != jax.tree.map(jnp.shape, shapes):
        raise UserError(f"{run}: a model of other parameters or shapes; use that run's config")
    places = jax.tree.map(lambda like: like.sharding, shapes)
    of_base = abstract(of_base, jax.tree.leaves(places)[0].mesh)
    return jax.jit(partial(merge, lora), out_shardings=places, donate_argnums=0)(
        load(base, step, of_base), trained
    )


def _sum(run: str, step: int) -> str:
    content = (pathlib.Path(run) / "checkpoints" / str(step) / "manifest.json").read_bytes()
    return hashlib.sha256(content).hexdigest()
