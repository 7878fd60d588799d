"""Contrasts: one good response after its own prompt and after others."""

import dataclasses

from data.batches import SHORTEST_PROMPT, Encoded, cut_left
from data.preferences import best_and_worst_response, records_of_other_prompts
from data.records import Record
from data.sources import Source
from data.tokenizer import Tokenizer


def with_other_prompts(source: Source, count: int, others: Source | None = None) -> Source:
    """Turn comparisons into {"prompts", "response"}: the best response after `count` prompts.

    The first prompt is its own; the others differ from it and from one another, and are of
    records elsewhere in the source, the same each time. A source of too few prompts takes them
    from `others`; raises UserError where these have too few.
    """
    # The others stand evenly apart round the source.
    records = len(source)
    stride = records // count | 1

    def read(i: int) -> Record:
        record = source[i]
        places = [i + k * stride for k in range(1, count)]
        around = records_of_other_prompts(record["prompt"], source, places, others)
        best, _ = best_and_worst_response(record)
        return {"prompts": [prompt["prompt"] for prompt in (record, *around)], "response": best}

    return dataclasses.replace(source, rows=range(records), read=read, candidates=count)


def encode_contrast(record: Record, tokenizer: Tokenizer, length: int) -> Encoded:
    """Encode a contrast as data.batches.encode_comparison does a comparison.

    Its candidates are the one response after each of the prompts; the first, its own, has rank 1,
    the others 2. Prompts are cut on the left to fit `length` tokens; the record is dropped where
    too little is left of them.
    """
    prompts = [tokenizer.prompt(prompt) for prompt in record["prompts"]]
    response = tokenizer.answer(record["response"])
    # The longest prompt has least room; the response is never cut.
    room = length - len(response)
    longest = max(map(len, prompts))
    if room < min(longest, SHORTEST_PROMPT):
        return Encoded([], True)
    row = {
        "prompts": [cut_left(prompt, room, tokenizer) for prompt in prompts],
        "responses": [response] * len(prompts),
        "record": record,
        "ranking": [1] + [2] * (len(prompts) - 1),
        "margin": 0.0,
    }
    return Encoded([row], longest > room)
