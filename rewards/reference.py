"""The reference's log-probabilities of all candidates that a run will meet, computed once and kept in its folder."""

import hashlib
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from data.batches import Batch
from sharding import BATCH, to_mesh


def candidate_keys(batch: Batch) -> list[int]:
    """A digest of each candidate's tokens and loss mask, whatever its padding, row by row."""
    names = ("tokens_BCT", "loss_mask_BCT", "segment_ids_BCT")
    candidates = zip(
        *(batch[name].reshape(-1, batch[name].shape[-1]) for name in names), strict=True
    )
    contents = (
        tokens[real > 0].tobytes() + mask[real > 0].tobytes() for tokens, mask, real in candidates
    )
    return [
        int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) for content in contents
    ]


def cached_reference(
    run: str,
    batches: Iterable[Batch],
    counts: Sequence[int],
    logprobs: Callable,
    load_reference: Callable,
    mesh: Any,
) -> Callable[[Batch], Batch]:
    """with_reference(batch) -> the batch with `reference_BC`, for the batches of `batches` in any order.

    They are so many held out and so many of training, `counts`; a run that goes on may ask for more of either.
    `logprobs(params, batch)` gives [B, C]. What an earlier epoch has met is not computed again, unless there are
    several hosts, which must compute together; each has a file of its own.
    """
    path = pathlib.Path(run) / f"reference-{jax.process_index()}.npz"
    known: dict[int, float] = {}
    covered = np.zeros(len(counts), int)
    if path.exists():
        with np.load(path) as saved:
            known, covered = (
                dict(zip(saved["keys"].tolist(), saved["logps"].tolist(), strict=True)),
                saved["count"],
            )
    if (covered < counts).any():
        reference = load_reference()
        for batch in tqdm(
            batches, "reference", sum(counts), unit="batch", disable=not sys.stderr.isatty()
        ):
            keys = candidate_keys(batch)
            if jax.process_count() > 1 or not known.keys() >= set(keys):
                logp_BC = logprobs(reference, to_mesh(batch, mesh))
                logp_BC = multihost_utils.global_array_to_host_local_array(logp_BC, mesh, BATCH)
                for key, logp in zip(keys, np.asarray(logp_BC).ravel().tolist(), strict=True):
                    known.setdefault(key, logp)
        new = path.with_suffix(".new")
        with new.open("wb") as file:
            keys, logps = (
                np.array(list(known), np.uint64),
                np.array(list(known.values()), np.float32),
            )
            np.savez(file, keys=keys, logps=logps, count=np.maximum(covered, counts))
        new.replace(path)

    def with_reference(batch: Batch) -> Batch:
        logps = [known[key] for key in candidate_keys(batch)]
        return {
            **batch,
            "reference_BC": np.array(logps, np.float32).reshape(batch["ranks_BC"].shape),
        }

    return with_reference
