"""The reference's log-probabilities of all candidates that a run will meet, computed once.

They are kept in the run folder, so that training holds one model, not two.
"""

import hashlib
import pathlib
import sys
import zipfile
from collections.abc import Callable, Collection, Iterable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from data.batches import Batch
from model import Params
from runtime.hosts import progressed
from runtime.run_folder import accepted_hashes, identity_hash, load_config
from runtime.writes import atomic_file
from sharding import BATCH, to_mesh

Known = dict[int, float]
"""Log-probabilities, in nats, by `candidate_keys`."""


def candidate_keys(batch: Batch) -> list[int]:
    """Return a 64-bit digest of each candidate of a batch of comparisons, B * C ints, row by row.

    `batch`: NumPy arrays, as data.batches.comparison_batches yields. A digest is of the
    candidate's tokens and loss mask alone: the same in a batch of another width.
    """
    length = batch["tokens_BCT"].shape[-1]
    tokens_MT = batch["tokens_BCT"].reshape(-1, length)
    mask_MT = batch["loss_mask_BCT"].reshape(-1, length)
    is_real_MT = batch["segment_ids_BCT"].reshape(-1, length) > 0
    keys = []
    for tokens, mask, is_real in zip(tokens_MT, mask_MT, is_real_MT, strict=True):
        # What is padding depends on the other candidates of the batch.
        content = tokens[is_real].tobytes() + mask[is_real].tobytes()
        digest = hashlib.blake2b(content, digest_size=8).digest()
        keys.append(int.from_bytes(digest))
    return keys


def cached_reference(
    run: str,
    batches: Iterable[Batch],
    counts: Sequence[int],
    logprobs: Callable[[Params, dict[str, jax.Array]], jax.Array],
    load_reference: Callable[[], Params],
    mesh: jax.sharding.Mesh,
) -> Callable[[Batch], Batch]:
    """Compute what the folder `run` does not have yet; return with_reference(batch) -> batch.

    with_reference adds `reference_BC` [B, C] float32, nats, to a host's batch; it knows every
    candidate of `batches`, in any order, and raises KeyError for others.

    `batches`: this host's, of data.batches.comparison_batches; read only if something is missing.
    `counts`: (held-out batches, training batches) in it; a run that goes on may ask for more of
    either. `logprobs(reference, batch on the mesh)` returns [B, C] nats. `load_reference()`
    returns the reference's parameters; it is called at most once, and they are not kept. A
    candidate that an earlier epoch has met is not computed again, unless there are several hosts:
    all must call this, and compute together. Each host writes its own file,
    `reference-<process>.npz`, whole or not at all.
    """
    path = pathlib.Path(run) / f"reference-{jax.process_index()}.npz"
    # Under which settings it was computed: a file of another run is of no use.
    config = load_config(run)
    known, covered = _load(path, len(counts), accepted_hashes(config))
    if (covered < counts).any():
        # One pass over all batches, with a second model in memory for as long as it takes.
        reference = load_reference()
        often = 0.1 if sys.stderr.isatty() else 10.0
        progress = tqdm(
            batches,
            "reference",
            sum(counts),
            unit="batch",
            mininterval=often,
            disable=jax.process_index() > 0,
        )
        for batch in progress:
            progressed()
            keys = candidate_keys(batch)
            is_known = known.keys() >= set(keys)
            if not is_known or jax.process_count() > 1:
                logp_BC = logprobs(reference, to_mesh(batch, mesh))
                own_BC = multihost_utils.global_array_to_host_local_array(logp_BC, mesh, BATCH)
                values = np.asarray(own_BC).ravel().tolist()
                # The first value stands, so that a resumed run reads what the run has read.
                for key, value in zip(keys, values, strict=True):
                    known.setdefault(key, value)
        _save(path, known, np.maximum(covered, counts), identity_hash(config))

    def with_reference(batch: Batch) -> Batch:
        # Absent candidates too: their keys are digests of nothing, their sums 0.
        values = [known[key] for key in candidate_keys(batch)]
        reference_BC = np.array(values, np.float32).reshape(batch["ranks_BC"].shape)
        return {**batch, "reference_BC": reference_BC}

    return with_reference


def _load(path: pathlib.Path, kinds: int, configs: Collection[str]) -> tuple[Known, np.ndarray]:
    """Return what an earlier start computed, and of how many batches of each kind.

    Nothing, with a note, of a file that is damaged or of a config not in `configs`, hashes.
    """
    nothing: tuple[Known, np.ndarray] = {}, np.zeros(kinds, int)
    if not path.exists():
        return nothing
    try:
        with np.load(path) as saved:
            # Python's own numbers, as `candidate_keys` gives them.
            keys = saved["keys"].tolist()
            values = saved["logps"].tolist()
            # An older version evaluated other records: the rest of them is looked for.
            covered = saved["covered"] if "covered" in saved else np.zeros(kinds, int)
            is_ours = "config" not in saved or str(saved["config"]) in configs
        known = dict(zip(keys, values, strict=True))
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, NotImplementedError):
        is_ours = False
    if not is_ours or covered.shape != (kinds,):
        print(f"note: {path}: damaged, or another run's; computed again", file=sys.stderr)
        return nothing
    return known, covered


def _save(path: pathlib.Path, known: Known, covered: np.ndarray, config: str) -> None:
    keys = np.fromiter(known, np.uint64)
    values = np.fromiter(known.values(), np.float32)
    with atomic_file(path) as file:
        np.savez(file, keys=keys, logps=values, covered=covered, config=config)
