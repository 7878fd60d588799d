"""Comparisons and judgements as KTO's candidates: judged responses, and one to another prompt."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from data.messages import Message
from data.records import Record
from data.sources import Source
from runtime.errors import UserError


def best_and_worst_index(ranking: Sequence[int] | np.ndarray) -> tuple[int, int | None]:
    """Return the indices of the first best and the first worst rank; worst None where all tie.

    Rank 1 is best; rank 0 marks an absent candidate, which is neither.
    """
    # Absent candidates stand behind all others; their 0 is never the worst.
    ranks = np.asarray(ranking)
    last = ranks.max() + 1
    best = int(np.where(ranks > 0, ranks, last).argmin())
    worst = int(ranks.argmax())
    if ranks[worst] == ranks[best]:
        return best, None
    return best, worst


def best_and_worst_response(record: Record) -> tuple[str, str | None]:
    """Return the first best and the first worst response of a comparison; None if all tie."""
    best, worst = best_and_worst_index(record["ranking"])
    responses = record["responses"]
    if worst is None:
        return responses[best], None
    return responses[best], responses[worst]


def judged_responses(record: Record) -> tuple[list[str], list[int]]:
    """Return the judged responses of a record, and 1 (desirable), 2 (not) or 0 (not judged) each.

    Of an unpaired record, {"response", "desirable"}, its one response. Of a comparison,
    {"responses", "ranking"}, the best and the worst; where all tie, the best twice, not judged.
    """
    if "desirable" in record:
        rank = 1 if record["desirable"] else 2
        return [record["response"]], [rank]

    # Of a comparison, what is between best and worst is left out.
    best, worst = best_and_worst_response(record)
    if worst is None:
        return [best, best], [0, 0]
    return [best, worst], [1, 2]


def records_of_other_prompts(
    prompt: list[Message], source: Source, places: Sequence[int], others: Source | None = None
) -> list[Record]:
    """Return a record of `source` for each of `places`, all with prompts unlike `prompt`.

    It is the record at that place, or the first one after it, round the source, whose prompt is
    neither `prompt` nor that of an earlier one found. A source of too few prompts, as a small
    held-out split may be, takes them from `others`; raises UserError where there are none.
    """
    prompts = [prompt]
    found = []
    count = len(source)
    for place in places:
        # Rows of one prompt often stand together, or half a file apart.
        after = (source[(place + k) % count] for k in range(count))
        record = next((other for other in after if other["prompt"] not in prompts), None)
        if record is None and others is not None:
            return records_of_other_prompts(prompt, others, places)
        if record is None:
            raise UserError(
                f"{source.name}: too few different prompts ({len(prompts)}) to give each record "
                "one more; add rows with other prompts"
            )
        prompts.append(record["prompt"])
        found.append(record)
    return found


def with_mismatched(source: Source, others: Source | None = None) -> Source:
    """Turn comparisons or unpaired records into judged responses and one to another prompt.

    Records are {"prompt", "responses", "ranking"}: `judged_responses`, and last a response of
    rank 0, from which KTO estimates its KL (Ethayarajh et al. 2024). That one belongs to a record
    of another prompt, the first from half way round the source on, the same each time, so that the
    reference's log-probability of it can be cached. A source of one prompt takes it from `others`.
    Raises UserError where there is no other prompt.
    """
    # An odd offset of about half the source.
    count = len(source)
    offset = count // 2 | 1

    def read(i: int) -> Record:
        record = source[i]
        responses, ranking = judged_responses(record)
        (other,) = records_of_other_prompts(record["prompt"], source, [i + offset], others)
        candidates, _ = judged_responses(other)
        mismatched = candidates[i % len(candidates)]
        return {
            "prompt": record["prompt"],
            "responses": [*responses, mismatched],
            "ranking": [*ranking, 0],
        }

    # The mistake is said now, not in mid-run.
    read(0)
    first_responses, _ = judged_responses(source[0])
    candidates = len(first_responses) + 1
    return dataclasses.replace(source, rows=range(count), read=read, candidates=candidates)
