"""LoRA (Hu et al. 2021): the base's weights stay, and low-rank adapters alone are trained.

    python train_sft.py --init=runs/llama --lora.rank=8 --run=runs/llama-sft

Beside the weight `q` [L, D, N, H] lie `q_a` [L, D, rank] and `q_b` [L, rank, N, H], and likewise
for every matrix of the layers but experts; where model.py finds them it adds x A B (eq. 3). A
reward model's head is trained whole, among the adapters. train_state.load_params loads a run of
adapters merged.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from model import Params
from runtime.errors import UserError
from runtime.inputs import at_newest, step_of_sum
from runtime.ranges import ABOVE_0, check_ranges

INPUTS = {
    "attention": {"q": 1, "k": 1, "v": 1, "o": 2},
    "mlp": {"gate": 1, "up": 1, "down": 1},
}
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

    def __post_init__(self):
        check_ranges(self, {"alpha": ABOVE_0}, "lora.")


# --- trees


def trainable_part(config: LoraConfig, params: Params, key: jax.Array) -> Params:
    """Return what is trained of `params`: new adapters and the head, or at rank 0 all of it.

    `params`: whole parameters. The tree is {"decoder": {"layers": {"attention", "mlp"}}}, with
    "head" and "bias" beside it where `params` has them. In it each matrix of the layers, such as
    `q`, has `q_a` [L, inputs, rank], drawn by `key` from a normal distribution of deviation
    inputs^-1/2, and `q_b` [L, rank, outputs], 0, so that nothing changes at first; float32. What
    is not new is not copied: copy it before a step that donates, or run this under jit.
    """
    # All of it, without adapters.
    if not config.rank:
        return params
    # Adapters of every matrix of the layers; each draws with a key of its own.
    layers: Params = {}
    for part, inputs in INPUTS.items():
        layers[part] = {}
        for name, count in inputs.items():
            key, own_key = jax.random.split(key)
            # A feed-forward layer may have no gate, or be experts, which have no adapters.
            weight = params["decoder"]["layers"][part].get(name)
            if weight is None:
                continue
            depth, *shape = weight.shape
            # From the inputs to the rank, and from there to the outputs.
            a_shape = (depth, *shape[:count], config.rank)
            b_shape = (depth, config.rank, *shape[count:])
            scale = math.prod(shape[:count]) ** -0.5
            a = jax.random.normal(own_key, a_shape) * scale
            layers[part][f"{name}_a"] = a
            layers[part][f"{name}_b"] = jnp.zeros(b_shape)
    # A head, beside them.
    whole = {name: params[name] for name in WHOLE if name in params}
    return {"decoder": {"layers": layers}, **whole}


def lora_base(config: LoraConfig, params: Params) -> Params | None:
    """Return the parameters under the adapters, not copied: `params` without a ScalarModel's head.

    `params`: whole parameters. What is left out is its "head" and "bias", beside "decoder", which
    are trained whole; a LanguageModel has neither. At rank 0, where all is trained, the result is
    None.
    """
    if not config.rank:
        return None
    return {name: x for name, x in params.items() if name not in WHOLE}


def with_adapters(config: LoraConfig, base: Params | None, trained: Params) -> Params:
    """Return the tree that model.py applies: the base's arrays with the adapters beside them.

    `base`: of `lora_base`; `trained`: of `trainable_part`, or later of a step; neither is changed.
    With None as base, at rank 0, `trained` itself is returned. No weight is copied; B, a new
    array, carries the factor alpha / rank. Gradients by `trained` pass through.
    """
    if base is None:
        return trained
    # model.py multiplies only A and B, so B carries the factor.
    scale = config.alpha / config.rank
    layers = dict(base["decoder"]["layers"])
    for part, adapters in trained["decoder"]["layers"].items():
        # A new dict: the base's own stays as it is.
        beside = dict(layers[part])
        for name, x in adapters.items():
            beside[name] = x * scale if name.endswith("_b") else x
        layers[part] = beside
    # `trained` may have a head; the adapters of its decoder are laid in already.
    decoder = {**base["decoder"], "layers": layers}
    return {**base, **trained, "decoder": decoder}


def merge(config: LoraConfig, base: Params, trained: Params) -> Params:
    """Return W + alpha / rank A B for each adapted weight: whole parameters without adapters.

    `base`, `trained`: as in `with_adapters`, at a rank above 0; both of NumPy or both of JAX
    arrays, float32, as the result then is. What has no adapters is not copied. `trained` with a
    head gives a scalar model's parameters: decoder, head and bias, no unembedding.
    """
    # Each weight and its adapters as matrices, a product a layer.
    rank = config.rank
    scale = config.alpha / rank
    layers = dict(base["decoder"]["layers"])
    for part, adapters in trained["decoder"]["layers"].items():
        merged = dict(layers[part])
        for name in INPUTS[part]:
            # There may be no gate, or experts, which have no adapters.
            if name not in merged:
                continue
            w = merged[name]
            depth = w.shape[0]
            a = adapters[f"{name}_a"]
            b = adapters[f"{name}_b"]
            a = a.reshape(depth, -1, rank)
            b = b.reshape(depth, rank, -1)
            product = (a @ b).reshape(w.shape)
            merged[name] = w + product * w.dtype.type(scale)
        layers[part] = merged
    params = {"decoder": {**base["decoder"], "layers": layers}}

    # The head is trained whole, and takes the place of what the base has beside its decoder.
    whole = {name: trained[name] for name in WHOLE if name in trained}
    if whole:
        return {**params, **whole}
    rest = {name: x for name, x in base.items() if name != "decoder"}
    return {**params, **rest}


# --- the base, a step of another run


def note_lora_base(config: Any) -> Any:
    """Return a copy of a script's `config` with the base's step noted in `lora.base`.

    The fields `lora` and `init` are read. The base is the step that `config.init` means (a
    RunAtStep), or its newest; noted, in place of what was, is the SHA-256 of its manifest, in hex.
    A run that began on another base is refused where its Run is entered. At rank 0 `config` itself
    is returned. Raises UserError for a rank without --init, or where that has no checkpoint.
    """
    # Settings that need a base, and those that need none.
    rank = config.lora.rank
    if rank and config.init is None:
        raise UserError(f"--lora.rank={rank}: needs --init=RUN, the base")
    if not rank:
        return config

    # The step of the base, by the checksum of its manifest.
    lora = dataclasses.replace(config.lora, base=at_newest(config.init).sha256)
    return dataclasses.replace(config, lora=lora)


def base_step(config: LoraConfig, base: str) -> int | None:
    """Return the step of the run `base` that `config.base` notes; None where it is gone.

    `base`: a run's folder, which may be missing. None too where nothing is noted, as at rank 0.
    """
    return step_of_sum(base, config.base)
