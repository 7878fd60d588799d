"""Embeddings of rows: the last token's hidden state of prompt and response, kept on the disk.

arXiv 2411.10545, section 2, and Sachdeva et al. 2024. Any run of a language model gives them, its
hidden states after the last norm, or after the same norm those of an earlier layer.
"""

import dataclasses
import hashlib
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from collect.examples import over_examples, record_example
from data.sources import Source
from model import LanguageModel, Params, init_and_apply
from model_config import ModelConfig
from objectives.likelihood import inputs
from objectives.policy import last_places
from responses import LoadedRun, in_parts
from runtime.data_files import content_sum
from runtime.errors import UserError, require
from runtime.inputs import at_newest
from runtime.writes import atomic_file, atomic_text

Batch = dict[str, Any]
# Records read at a time.
RECORDS = 1024
VERSION = 2
"""Version of what is kept. Raise it when a row would have another embedding than before."""


def make_last_states(
    config: ModelConfig, layer: int | None = None
) -> Callable[[Params, Batch], jax.Array]:
    """Make the pass of a language model of shape `config` to rows' last hidden states.

    Returns last_states(params, batch) -> [B, D] float32, after the last norm. `layer`: how many of
    the layers are run, 1 to all; None: all. `batch`: `tokens_BT`, `segment_ids_BT` and
    `positions_BT`, padded on either side. Raises UserError for a layer that there is not.
    """
    layers = config.layers if layer is None else layer
    require(1 <= layers <= config.layers, f"--layer={layer}: the model has 1 to {config.layers}")
    _, apply = init_and_apply(LanguageModel(dataclasses.replace(config, layers=layers)))

    @jax.jit
    def last_states(params: Params, batch: Batch) -> jax.Array:
        # The first layers alone: each weight is stacked over them.
        own = jax.tree.map(lambda stacked: stacked[:layers], params["decoder"]["layers"])
        shortened = {**params, "decoder": {**params["decoder"], "layers": own}}
        x_BTD = apply(shortened, *inputs(batch)).x_BTD

        # The last real token, on whichever side the padding is.
        is_last_BT = last_places(batch["segment_ids_BT"] > 0)
        return jnp.einsum("BTD,BT->BD", x_BTD.astype(jnp.float32), is_last_BT)

    return last_states


def embed(run: str, loaded: LoadedRun, source: Source, data_sum: str, **how: Any) -> np.ndarray:
    """Return the embeddings of all records of `source` by the run `run`, [N, D] float32.

    They are kept in $PLUMB_CACHE as a NumPy file named by a hash of all that they depend on: the
    run's weights, `data_sum`, and `how`; found there, whole by the sum beside it, they are not
    computed again. The array is memory-mapped: a part is in memory while it is read. `how`:
    `length`, in tokens, and `layer`, as of `make_last_states`.
    """
    identity = [VERSION, at_newest(run).sha256, loaded.tokenizer.sha256, data_sum, *how.items()]
    name = hashlib.sha256(repr(identity).encode()).hexdigest()[:32]
    cache = pathlib.Path(os.environ.get("PLUMB_CACHE", "~/.cache/plumb")).expanduser()
    path = cache / f"embeddings-{name}.npy"
    if not is_whole(path):
        write_embeddings(path, loaded, source, **how)
    return np.load(path, mmap_mode="r")


def is_whole(path: pathlib.Path) -> bool:
    """Tell whether the file `path` has the sum that is written beside it; note one that has not.

    Raises UserError for a file that cannot be read.
    """
    if not path.exists():
        return False
    try:
        whole = sum_of(path).exists() and sum_of(path).read_bytes() == content_sum(path).encode()
    except OSError as fault:
        raise UserError(f"{path}: cannot be read ({fault.strerror}); remove it") from None
    if not whole:
        print(f"note: {path}: is damaged; the embeddings are computed again", file=sys.stderr)
    return whole


def sum_of(path: pathlib.Path) -> pathlib.Path:
    """Return the file beside `path` that holds its sum."""
    return path.with_suffix(".sum")


def write_embeddings(
    path: pathlib.Path, loaded: LoadedRun, source: Source, *, length: int, layer: int | None
) -> None:
    """Compute the embeddings of `embed`; write them, part by part, then their sum beside them."""
    config, tokenizer, params = loaded
    last_states = make_last_states(config, layer)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)),
        "fortran_order": False,
        "shape": (len(source), config.width),
    }
    with atomic_file(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in in_parts(len(source), RECORDS, "embeddings", "row"):
            numbers = range(start, min(start + RECORDS, len(source)))
            examples = [record_example(source[i], tokenizer, length) for i in numbers]
            states_ND = over_examples(
                lambda batch: last_states(params, batch), examples, length, tokenizer.pad
            )
            file.write(np.ascontiguousarray(states_ND, np.float32).tobytes())
    with atomic_text(str(sum_of(path))) as file:
        file.write(content_sum(path))
