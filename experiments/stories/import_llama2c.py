"""Import a llama2.c checkpoint ("version 0" layout, float32) and its SentencePiece model as a run.

export PYTHONPATH=.
python experiments/stories/import_llama2c.py stories260K.bin tok512.model --run=runs/stories
python generate.py --run=runs/stories --temperature=0 --max_new_tokens=200 --raw
"""

import runtime.interrupt  # noqa: F401

import dataclasses
import pathlib
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from data.tokenizer import Tokenizer
from model import LanguageModel, Params, init_and_apply
from model_config import PRESETS, ModelConfig
from runtime import flags
from runtime.checkpoint import Checkpoints
from runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    bin: Annotated[str, tyro.conf.Positional] = ""
    """The checkpoint, such as stories260K.bin."""
    tokenizer: Annotated[str, tyro.conf.Positional] = ""
    """Its SentencePiece .model."""
    run: str = "runs/stories"
    """Folder to write."""
    model: ModelConfig = PRESETS["stories260k"]
    """Filled from the checkpoint's header; what the header does not say stays as here."""


def half_split(w_LDNH: np.ndarray) -> np.ndarray:
    """Reorder head dimensions from llama2.c's RoPE to ours.

    Its RoPE turns 2i with 2i + 1, ours i with i + H/2.
    """
    return np.concatenate([w_LDNH[..., 0::2], w_LDNH[..., 1::2]], axis=-1)


def read(path: str, model: ModelConfig) -> tuple[ModelConfig, Params]:
    """Return the model and its parameters; raise UserError for a file of another layout."""
    try:
        content = pathlib.Path(path).read_bytes()
    except OSError as fault:
        raise UserError(
            f"{path}: cannot be read ({fault.strerror}); name a llama2.c .bin file"
        ) from None
    if len(content) < 28:
        raise UserError(f"{path}: too short for a header; name a llama2.c .bin file")

    # The header: seven sizes; a vocabulary below 0 says that the head is not the embedding.
    D, F, L, N, K, V, T = (int(x) for x in np.frombuffer(content, "<i4", 7))
    tied = V > 0
    V = abs(V)
    H = D // max(N, 1)

    # Then the tensors, in this order; RoPE's tables, two of them, are not read.
    shapes = [
        (V, D),
        (L, D),
        (L, N, H, D),
        (L, K, H, D),
        (L, K, H, D),
        (L, D, N, H),
        (L, D),
        (L, F, D),
        (L, D, F),
        (L, F, D),
        (D,),
        (T, H // 2),
        (T, H // 2),
    ]
    if not tied:
        shapes.append((V, D))
    sizes = [int(np.prod(shape)) for shape in shapes]
    if min((D, F, L, N, K, V, T)) < 1 or len(content) != 28 + 4 * sum(sizes):
        raise UserError(
            f"{path}: its size does not fit its header (llama2.c version 0, float32); "
            "restore the file"
        )
    numbers = np.frombuffer(content, "<f4", offset=28)
    parts = np.split(numbers, np.cumsum(sizes)[:-1])
    tensors = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
    embed, norm1, wq, wk, wv, wo, norm2, w1, w2, w3, final, *rest = tensors

    def inward(w: np.ndarray) -> np.ndarray:
        """Move the input dimension, llama2.c's last, after the layers'."""
        return np.moveaxis(w, -1, 1)

    # Into our tree, with our order of axes.
    attention = {
        "q": half_split(inward(wq)),
        "k": half_split(inward(wk)),
        "v": inward(wv),
        "o": np.moveaxis(wo, 1, -1),
    }
    mlp = {"gate": inward(w1), "down": inward(w2), "up": inward(w3)}
    layers = {"attention_norm": norm1, "attention": attention, "mlp_norm": norm2, "mlp": mlp}
    params: dict[str, Any] = {"decoder": {"embed": embed, "final_norm": final, "layers": layers}}
    if not tied:
        params["unembed"] = rest[-1].T
    shape = {
        "vocab": V,
        "width": D,
        "mlp_width": F,
        "layers": L,
        "heads": N,
        "kv_heads": K,
        "head_dim": H,
    }
    return dataclasses.replace(model, **shape, context=T, tied=tied), params


def main(config: Config) -> Params:
    """Write the run at step 0; return the parameters."""
    model, params = read(config.bin, config.model)
    params = jax.tree.map(np.ascontiguousarray, params)
    tokenizer = Tokenizer.load(config.tokenizer)
    if tokenizer.size != model.vocab:
        raise UserError(
            f"{config.tokenizer}: {tokenizer.size} tokens, {config.bin} has {model.vocab}; "
            "name its own"
        )

    # The shapes are those of a model that is made here.
    init, _ = init_and_apply(LanguageModel(model))
    wanted = jax.eval_shape(init, jax.random.key(0))
    assert jax.tree.map(np.shape, wanted) == jax.tree.map(np.shape, params)

    # A finished run of no steps.
    config = dataclasses.replace(config, model=model)
    with Checkpoints(
        config.run, config, script="import_llama2c", tokenizer=tokenizer.model
    ) as checkpoints:
        checkpoints.save(0, {"params": jax.tree.map(jax.numpy.asarray, params)})
    print(f"{config.run}: {sum(x.size for x in jax.tree.leaves(params)):,} parameters")
    return params


if __name__ == "__main__":
    flags.run(main, Config)
