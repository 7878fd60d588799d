"""Comparisons in other forms: judged responses for KTO, hindsight chains, instruction contrasts, token weights."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from data.batches import Batch, cut_left
from data.sources import Source
from data.tokenizer import Tokenizer

Record = dict[str, Any]
HELPFUL, UNHELPFUL = "A helpful answer:", "An unhelpful answer:"
"""Prefixes of chain of hindsight; at generation, HELPFUL follows the prompt on a line of its own."""


def first_and_last(ranking: Sequence[int] | np.ndarray) -> tuple[int, int | None]:
    """Where the first of the best is, and the first of the worst: None where all are equal. Rank 0 is an absent one."""
    ranks = np.asarray(ranking)
    worst, best = int(ranks.argmax()), int(np.where(ranks > 0, ranks, ranks.max() + 1).argmin())
    return best, worst if ranks[worst] > ranks[best] else None


def extremes(record: Record) -> tuple[str, str | None]:
    """The first best response of a comparison and its first worst; None where all are equal."""
    best, worst = first_and_last(record["ranking"])
    return record["responses"][best], None if worst is None else record["responses"][worst]


def judged(record: Record) -> tuple[list[str], list[int]]:
    """Responses, and 1 (desirable) or 2 (not) for each: of a comparison the best and the worst, where they differ."""
    if "desirable" in record:
        return [record["response"]], [1 if record["desirable"] else 2]
    best, worst = extremes(record)
    return [best, best if worst is None else worst], [0, 0] if worst is None else [1, 2]


def with_mismatched(source: Source) -> Source:
    """Comparisons or unpaired records as judged responses (ranks 1 and 2), then one of rank 0 to another prompt.

    KTO estimates its KL from the latter (Ethayarajh et al. 2024). It is a response of the record half way round the
    source, the same each time, so that the reference's log-probability of it can be kept.
    """
    n = len(source)

    def read(i: int) -> Record:
        record, other = source[i], judged(source[(i + (n // 2 | 1)) % n])[0]
        responses, ranking = judged(record)
        return {
            "prompt": record["prompt"],
            "responses": [*responses, other[i % len(other)]],
            "ranking": [*ranking, 0],
        }

    return Source(source.name, range(n), read, len(judged(source[0])[0]) + 1)


def hindsight(source: Source) -> Source:
    """Comparisons as conversations: the best and the worst response, each after the words that judge it.

    Chain of hindsight (Liu et al. 2023): trained on as any chat, so the loss is on the responses only. Every
    second chain has the worst first.
    """

    def read(i: int) -> Record:
        record = source[i]
        best, worst = extremes(record)
        chain = [(HELPFUL, best)] + ([(UNHELPFUL, worst)] if worst is not None else [])
        (prefix, first), *rest = chain[:: -1 if i % 2 else 1]
        *before, asked = record["prompt"]
        turns = [
            *before,
            {**asked, "content": f"{asked['content']}\n{prefix}"},
            {"role": "assistant", "content": first},
        ]
        for prefix, response in rest:
            turns += [
                {"role": "user", "content": prefix},
                {"role": "assistant", "content": response},
            ]
        return {"messages": turns}

    return Source(source.name, range(len(source)), read)


def with_other_prompts(source: Source, count: int) -> Source:
    """{"prompts", "response"}: the best response, its own prompt, then `count` - 1 of records elsewhere."""
    n = len(source)

    def read(i: int) -> Record:
        record = source[i]
        others = [source[(i + k * (n // count | 1)) % n]["prompt"] for k in range(1, count)]
        return {"prompts": [record["prompt"], *others], "response": extremes(record)[0]}

    return Source(source.name, range(n), read, count)


def encode_contrast(
    record: Record, tokenizer: Tokenizer, length: int
) -> tuple[list[Record], bool]:
    """As `encode_comparison`, of one response after several prompts, the first of which (rank 1) was its own."""
    prompts = [tokenizer.prompt(prompt) for prompt in record["prompts"]]
    response = [*tokenizer.encode(record["response"]), tokenizer.eos]
    room, longest, count = length - len(response), max(map(len, prompts)), len(prompts)
    if room < min(longest, 8):
        return [], True
    row = {
        "prompts": [cut_left(prompt, room, tokenizer) for prompt in prompts],
        "responses": [response] * count,
        "record": record,
        "ranking": [1] + [2] * (count - 1),
        "margin": 0.0,
    }
    return [row], longest > room


# ---- On batches of comparisons ----


def edit_weights(
    initial: list[int],
    revised: list[int],
    *,
    added: float = 1.0,
    removed: float = -0.5,
    kept: float = 0.0,
) -> tuple[list[float], list[float]]:
    """Weights of the tokens of an answer and of its revision, from a shortest edit between them (Levenshtein's).

    Tokens that the revision adds or puts in another's place weigh `added`, those that it drops or replaces
    `removed`, all others `kept` in the revision and 0 before (Guo et al. 2024, FIGA, section 3).
    """
    before, after, insertions = (
        [removed] * len(initial),
        [added] * len(revised),
        np.arange(len(revised) + 1),
    )
    same = np.array(initial)[:, None] == np.array(revised)
    edits = [
        insertions
    ]  # [i][j]: fewest that make the first j tokens of the revision from the first i
    for equal in same:
        row = edits[-1] + 1
        row[1:] = np.minimum(row[1:], edits[-1][:-1] + ~equal)
        edits.append(np.minimum.accumulate(row - insertions) + insertions)
    i, j = len(initial), len(revised)
    while i and j:
        if same[i - 1, j - 1]:
            before[i - 1], after[j - 1] = 0.0, kept
        if edits[i][j] == edits[i - 1][j - 1] + (not same[i - 1, j - 1]):
            i, j = i - 1, j - 1
        elif edits[i][j] == edits[i - 1][j] + 1:
            i -= 1
        else:
            j -= 1
    return before, after


def with_edit_weights(batch: Batch, removed: float) -> Batch:
    """The batch with `weights_BCT`: of each row, the worst response as the initial answer, the best as its revision."""
    weights_BCT = np.zeros_like(batch["loss_mask_BCT"])
    for b, ranks in enumerate(batch["ranks_BC"]):
        best, worst = first_and_last(ranks)
        if worst is not None:
            masks = [batch["loss_mask_BCT"][b, c] > 0 for c in (worst, best)]
            tokens = [
                batch["tokens_BCT"][b, c][mask].tolist()
                for c, mask in zip((worst, best), masks, strict=True)
            ]
            for c, mask, weights in zip(
                (worst, best), masks, edit_weights(*tokens, removed=-removed), strict=True
            ):
                weights_BCT[b, c, mask] = weights
    return {**batch, "weights_BCT": weights_BCT}


def with_rank_weights(batch: Batch, removed: float) -> Batch:
    """The batch with `weights_BCT`: 1 on the tokens of rank 1, -`removed` on those of any other, for unlikelihood."""
    ranks_BC = batch["ranks_BC"]
    sign_BC = np.where(ranks_BC == 1, 1.0, np.where(ranks_BC > 1, -removed, 0.0)).astype(
        np.float32
    )
    return {**batch, "weights_BCT": sign_BC[:, :, None] * batch["loss_mask_BCT"]}


def forget(batch: Batch, share: float, rng: np.random.Generator) -> Batch:
    """A batch of examples in which a random `share` of past tokens cannot be looked at (Liu et al. 2023).

    Hidden are tokens in the past of others: bos stays, and what would be predicted from a hidden one has no loss.
    """
    hidden_BT = (rng.random(batch["tokens_BT"].shape) < share) & (batch["positions_BT"] > 0)
    mask_BT = batch["loss_mask_BT"].copy()
    mask_BT[:, 1:] *= ~hidden_BT[:, :-1]
    return {
        **batch,
        "loss_mask_BT": mask_BT,
        "segment_ids_BT": np.where(hidden_BT, 0, batch["segment_ids_BT"]),
    }
