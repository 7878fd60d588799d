"""Held-out loss within the length a model was trained at, and beyond it, on the world's documents.

    sh experiments/alibi/run.sh 0        # trains both models with seed 0 and measures them

Run with the model.py that made the run first on Python's path, as run.sh does. A document's tokens
are scored in three ways: `within`, those at positions that training saw; `beyond`, those further
on, with the whole document before them; `cut`, the tokens of `beyond` again, in pieces of the
training length.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
import json
import pathlib

import jax
import numpy as np

from data.batches import pad_examples
from data.packing import split_document
from data.sources import open_source
from model import LanguageModel, init_and_apply, unembed
from objectives.likelihood import inputs, token_logprobs
from responses import load_run
from runtime import flags
from runtime.errors import require
from runtime.run_folder import load_config
from sharding import MeshConfig, make_mesh


@dataclasses.dataclass(frozen=True)
class Config:
    run: str = "runs/alibi/rope-0"
    """Run of train_lm.py to measure."""
    documents: int = 500
    """Held-out documents scored."""
    out: str = "experiments/alibi/results.jsonl"
    """JSON Lines file that the result is added to."""


def main(config: Config) -> dict[str, float]:
    """Score held-out documents; return and write the loss per token of the three ways, in nats."""
    make_mesh(MeshConfig())
    model, tokenizer, params = load_run(config.run)
    stored = load_config(config.run)
    length = stored["length"]
    require(2 * length <= model.context, f"{config.run}: twice {length} exceeds the context")
    _, apply = init_and_apply(LanguageModel(model))

    @jax.jit
    def nll(params, batch):
        """Negative log-likelihood of each token, [B, T], in nats."""
        output = apply(params, *inputs(batch))
        return -token_logprobs(unembed(output.x_BTD, output.unembed_DV), batch["tokens_BT"])

    # Documents longer than the training length, as far as twice that length.
    source = open_source("world", "text", "heldout", seed=0)
    documents = [tokenizer.document(source[i]["text"]) for i in range(4 * config.documents)]
    documents = [tokens[: 2 * length] for tokens in documents if len(tokens) > length]
    documents = documents[: config.documents]

    # Whole documents: the first token has no context, and is not scored.
    whole = [{"tokens": tokens, "mask": [0] + [1] * (len(tokens) - 1)} for tokens in documents]
    batch = pad_examples(whole, 2 * length, tokenizer.pad, fixed=True)
    nll_BT = np.asarray(nll(params, batch)) * batch["loss_mask_BT"]
    within = nll_BT[:, :length].sum() / batch["loss_mask_BT"][:, :length].sum()
    beyond = nll_BT[:, length:].sum() / batch["loss_mask_BT"][:, length:].sum()

    # The same later tokens in pieces of the training length, as training cuts documents.
    second = [split_document(tokens, length)[1] for tokens in documents]
    rows = [{"tokens": tokens, "mask": mask} for tokens, mask in second]
    pieces = pad_examples(rows, length, tokenizer.pad, fixed=True)
    cut_BT = np.asarray(nll(params, pieces)) * pieces["loss_mask_BT"]

    result = {
        "run": pathlib.Path(config.run).name,
        "seed": stored["seed"],
        "steps": stored["steps"],
        "length": length,
        "documents": len(documents),
        "within": float(within),
        "beyond": float(beyond),
        "cut": float(cut_BT.sum() / pieces["loss_mask_BT"].sum()),
    }
    with open(config.out, "a") as file:
        file.write(json.dumps(result) + "\n")
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    flags.run(main, Config)
