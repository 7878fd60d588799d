import json

import numpy as np
import pytest

from data import batches as module
from data.batches import (
    Batches,
    Layout,
    bucket,
    chat_batches,
    collate,
    comparison_batches,
    cut_left,
    encode_chat,
    encode_comparison,
    encode_prompt,
    pad_comparisons,
    pad_examples,
    pad_prompts,
    prompt_batches,
    text_batches,
)
from data.sources import Source, open_source
from data.tokenizer import Tokenizer
from runtime.errors import UserError

WORDS = [
    "the",
    "cat",
    "sat",
    "by",
    "a",
    "river",
    "and",
    "then",
    "it",
    "saw",
    "nine",
    "dogs",
    "run",
    "home",
]


def sentence(i):
    return " ".join(WORDS[(i * k + k) % len(WORDS)] for k in range(1, 2 + i % 9)) + f" {i}"


def turn(role, content):
    return {"role": role, "content": content}


RECORDS = {
    "text": [{"text": sentence(i)} for i in range(37)],
    "chat": [
        {"messages": [turn("user", sentence(i)), turn("assistant", sentence(i + 1))]}
        for i in range(37)
    ],
    "comparison": [
        {
            "prompt": [turn("user", sentence(i))],
            "responses": [sentence(i + 1), sentence(i + 2)],
            "ranking": [1, 2 - i % 2],
        }
        for i in range(37)
    ],
    "prompt": [{"prompt": [turn("user", sentence(i))]} for i in range(37)],
}


def padded_chat_batches(source, tokenizer, **options):
    """Make batches of one conversation a row, padded on the right."""
    return Batches(Layout(encode_chat, pad_examples), source, tokenizer, **options)


KINDS = [
    ("text", text_batches),
    ("chat", chat_batches),
    ("chat", padded_chat_batches),
    ("comparison", comparison_batches),
    ("prompt", prompt_batches),
]


def source_of(records, candidates=2):
    return Source("tests", range(len(records)), records.__getitem__, candidates)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [record["text"] for record in RECORDS["text"]]
    return Tokenizer.train(texts, tmp_path_factory.mktemp("run"), 400)


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr(module, "PACKING_WINDOW", 7)


def equal(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(("schema", "make"), KINDS)
def test_resuming_at_any_step_equals_going_on(tokenizer, narrow, schema, make):
    def start(seed=0):
        return make(source_of(RECORDS[schema]), tokenizer, batch_size=3, length=64, seed=seed)

    whole = start()
    states = []
    expected = []
    while whole.epoch < 2.2:
        states.append(json.loads(json.dumps(whole.state)))
        expected.append(next(whole))
    ends = {state["row"] for state in states}
    packs = make in (text_batches, chat_batches)
    assert len(ends) > 1 if packs else ends == {0}
    for step, state in enumerate(states):
        resumed = start()
        next(resumed)  # a position of its own, which restoring overrides
        resumed.restore(state)
        for want in expected[step : step + 4]:
            assert equal(next(resumed), want)
    # Control: another seed.
    assert not all(equal(next(other), want) for other in [start(seed=1)] for want in expected)


@pytest.mark.parametrize(("schema", "make"), KINDS)
def test_shapes_and_types(tokenizer, schema, make):
    batch = next(make(source_of(RECORDS[schema]), tokenizer, batch_size=6, length=64))
    for key, array in batch.items():
        letters = key.rsplit("_", 1)[1]
        assert array.ndim == len(letters) and array.shape[0] == 6
        assert array.dtype == (np.float32 if key.startswith(("loss_mask", "margin")) else np.int32)
        if letters.endswith("T"):
            assert array.shape[-1] in (16, 32, 48, 64)


def first_tokens(batch):
    """Return the tokens of each packed example."""
    rows = zip(batch["tokens_BT"], batch["segment_ids_BT"], strict=True)
    return [tuple(tokens[ids == s]) for tokens, ids in rows for s in range(1, ids.max() + 1)]


def test_hosts_read_disjoint_parts_that_cover_each_epoch(tokenizer):
    def prompts(processes):
        seen = []
        for process in range(processes):
            made = prompt_batches(
                source_of(RECORDS["prompt"]),
                tokenizer,
                batch_size=4,
                length=64,
                process=process,
                processes=processes,
            )
            part = []
            for _ in range(37 * 2 // 4 + 1):
                assert next(made)["tokens_BT"].shape[0] == 4 // processes
                part += [record["prompt"][0]["content"] for record in made.records]
            seen.append(part)
        return [text for step in zip(*seen, strict=True) for text in step]  # the global order

    one, two = prompts(1), prompts(2)
    assert one == two and len(set(two[:37])) == 37 == len(set(two[37:74]))
    assert two[:37] != two[37:74]  # each epoch in an order of its own


def test_an_epoch_packs_every_example_once(tokenizer, narrow):
    made = chat_batches(source_of(RECORDS["chat"]), tokenizer, batch_size=1, length=64)
    found = []
    while made.state["window"] * 7 < 37 * 7:  # 7 epochs are whole windows
        found += first_tokens(next(made))
    want = [tuple(tokenizer.chat(record["messages"])[0]) for record in RECORDS["chat"]] * 7
    assert sorted(found) == sorted(want) and made.epoch == 7


def test_packed_chat_predicts_what_padded_chat_does(tokenizer):
    padded = collate(encode_chat, pad_examples, RECORDS["chat"], tokenizer, 64)
    made = chat_batches(source_of(RECORDS["chat"]), tokenizer, batch_size=1, length=64)
    weight = 0
    while made.state["window"] == 0:
        weight += next(made)["loss_mask_BT"].sum()
    assert padded["loss_mask_BT"].shape[0] == 37
    repeats = module.PACKING_WINDOW / 37
    assert abs(weight / padded["loss_mask_BT"].sum() - repeats) < 0.5


def test_comparisons_mask_exactly_the_responses(tokenizer):
    records = [
        {
            "prompt": [turn("user", "cat?")],
            "responses": ["a river", "home", "it"],
            "ranking": [2, 1, 2],
            "margin": 0.5,
        },
        RECORDS["comparison"][1],
    ]
    batch = collate(
        encode_comparison, lambda *a: pad_comparisons(*a, candidates=4), records, tokenizer, 64
    )
    prompt = tokenizer.prompt("cat?")
    for c, response in enumerate(records[0]["responses"]):
        tokens, mask = batch["tokens_BCT"][0, c], batch["loss_mask_BCT"][0, c]
        assert tokens[mask > 0].tolist() == [*tokenizer.encode(response), tokenizer.eos]
        assert tokens[: len(prompt)].tolist() == prompt and not mask[: len(prompt)].any()
        n = batch["segment_ids_BCT"][0, c].sum()
        assert n == len(prompt) + mask.sum() and (tokens[n:] == tokenizer.pad).all()
    assert batch["ranks_BC"].tolist() == [[2, 1, 2, 0], [1, 1, 0, 0]]
    assert batch["margin_B"].tolist() == [0.5, 0.0]
    assert not batch["segment_ids_BCT"][:, 3].any() and not batch["loss_mask_BCT"][1, 2:].any()
    with pytest.raises(UserError, match="3 responses, more than 2"):
        collate(encode_comparison, pad_comparisons, records, tokenizer, 64)


def test_prompts_are_padded_on_the_left(tokenizer):
    records = [*RECORDS["prompt"][:5], {"text": "the river"}]
    batch = collate(encode_prompt, pad_prompts, records, tokenizer, 64)
    for b, record in enumerate(records):
        real = batch["segment_ids_BT"][b] > 0
        tokens = batch["tokens_BT"][b][real].tolist()
        raw = "text" in record
        assert tokens == (
            [tokenizer.bos, *tokenizer.encode("the river")]
            if raw
            else tokenizer.prompt(record["prompt"])
        )
        assert batch["positions_BT"][b][real].tolist() == list(range(len(tokens)))
        assert real[-len(tokens) :].all() and real.sum() == len(tokens)
        assert (batch["tokens_BT"][b][~real] == tokenizer.pad).all()


def test_prompts_too_long_lose_their_beginning(tokenizer):
    tokens = tokenizer.prompt("one two three\n" * 20 + "the end")
    for length in (12, 20, 33, 64):
        cut = cut_left(tokens, length, tokenizer)
        assert length // 2 - 2 <= len(cut) <= length
        assert cut[:2] == [tokenizer.bos, tokenizer.user] and cut[-1] == tokenizer.assistant
        assert cut[2:] == tokens[-len(cut) + 2 :]
    assert tokenizer.decode(cut).startswith("one two three\n")
    assert cut_left(tokens, len(tokens), tokenizer) == tokens
    raw = [tokenizer.bos, *tokenizer.encode("abcdefghijklmnop" * 2)]
    assert cut_left(raw, 9, tokenizer) == [tokenizer.bos, *raw[-8:]]
    assert len(cut_left(tokens, 3, tokenizer)) <= 3
    with pytest.raises(UserError, match="2 tokens hold no prompt"):
        cut_left(tokens, 2, tokenizer)


def test_what_does_not_fit_is_counted(tokenizer):
    long = " ".join(WORDS * 9)
    chats = [
        {"messages": [turn("user", "cat"), turn("assistant", long)]},
        {"messages": [turn("user", long), turn("assistant", "cat")]},
        RECORDS["chat"][0],
    ]
    made = padded_chat_batches(source_of(chats), tokenizer, batch_size=2, length=32)
    while made.epoch < 2:
        assert next(made)["loss_mask_BT"].any(axis=1).all()
    assert made.epoch == made.truncated == made.dropped == 2
    pairs = [
        {**RECORDS["comparison"][0], "responses": ["cat", long]},
        {**RECORDS["comparison"][0], "prompt": [turn("user", long)]},
        RECORDS["comparison"][0],
    ]
    made = comparison_batches(source_of(pairs), tokenizer, batch_size=2, length=40)
    while made.epoch < 1:
        assert (next(made)["loss_mask_BCT"].sum(2) > 0).all()
    assert made.truncated > 0 and made.dropped > 0


def test_mistakes_are_one_line(tokenizer, capsys):
    source = source_of(
        [{"messages": [turn("user", " ".join(WORDS * 9)), turn("assistant", "cat")]}]
    )
    with pytest.raises(UserError, match="no record fits 16 tokens"):
        next(chat_batches(source, tokenizer, batch_size=2, length=16))
    assert "has 1 records, fewer than a batch of 2" in capsys.readouterr().err
    with pytest.raises(UserError, match="multiple of the 2 hosts"):
        chat_batches(source, tokenizer, batch_size=3, length=16, processes=2)
    made = prompt_batches(source_of(RECORDS["prompt"]), tokenizer, batch_size=2, length=16)
    with pytest.raises(UserError, match="saved on 4 hosts"):
        made.restore({**made.state, "processes": 4})


def test_few_lengths_and_several_hosts_agree_on_one():
    assert {bucket(n, 100) for n in range(1, 101)} == {32, 56, 80, 100}
    assert {bucket(n, 100, fixed=True) for n in range(1, 101)} == {100}
    assert all(bucket(n, 100) >= n for n in range(1, 101))


def test_the_world_in_batches(tokenizer):
    made = chat_batches(open_source("world", "chat", "train"), tokenizer, batch_size=4, length=256)
    batch = next(made)
    assert (batch["segment_ids_BT"] > 0).mean() > 0.9
    assert (batch["tokens_BT"] == tokenizer.bos).sum() == batch["segment_ids_BT"].max(axis=1).sum()


def test_batches_left_out_are_passed_over_and_the_rest_stays(tokenizer, narrow):
    def start(**options):
        return chat_batches(
            source_of(RECORDS["chat"]), tokenizer, batch_size=3, length=64, **options
        )

    whole, without = start(), start(without={1, 4, 5})
    numbers = [2, 3, 6, 7]
    batches = [next(whole) for _ in range(7)]
    for number in numbers:
        assert equal(next(without), batches[number - 1]) and without.state["batches"] == number
    resumed = start(without={9})
    resumed.restore(without.state)
    assert equal(next(resumed), next(whole)) and next(whole) and equal(next(resumed), next(whole))


def rows_of(made):
    """Return the rows of batches, of which padding on the right is cut, as a sorted list."""
    rows = []
    for batch in made:
        letters = "BCT" if "tokens_BCT" in batch else "BT"
        real = batch[f"segment_ids_{letters}"] > 0
        for b in range(len(real)):
            if real[b].any():
                rows.append(tuple(batch[f"tokens_{letters}"][b][real[b]].tolist()))
    return sorted(rows)


@pytest.mark.parametrize(("schema", "make"), KINDS)
def test_an_evaluation_has_each_record_once_and_padding_at_the_end(tokenizer, schema, make):
    source = source_of(RECORDS[schema])
    whole = make(source, tokenizer, batch_size=37, length=64).once()
    # 37 records in batches of 8, or as many packed rows as they fill.
    made = make(source, tokenizer, batch_size=8, length=64).once()
    assert rows_of(made) == rows_of(whole)
    name = next(name for name in made[0] if name.startswith("tokens"))
    assert all(len(batch[name]) == 8 for batch in made)
    mask = next((name for name in made[0] if name.startswith("loss_mask")), name)
    counted = sum(batch[mask].sum() for batch in made)
    assert counted == sum(batch[mask].sum() for batch in whole) or mask == name
    # The first records alone, in order; then as many batches as are wanted.
    first = make(source, tokenizer, batch_size=8, length=64).once(records=3)
    alone = make(source_of(RECORDS[schema][:3]), tokenizer, batch_size=8, length=64).once()
    assert len(first) == 1 and equal(first[0], alone[0])
    assert len(make(source, tokenizer, batch_size=2, length=64).once(batches=2)) == 2


@pytest.mark.parametrize(("schema", "make"), KINDS)
def test_hosts_evaluate_disjoint_rows(tokenizer, schema, make):
    source = source_of(RECORDS[schema])
    parts = []
    for process in range(2):
        options = {"process": process, "processes": 2}
        parts.append(make(source, tokenizer, batch_size=6, length=64, **options).once())
    whole = make(source, tokenizer, batch_size=6, length=64).once()
    assert rows_of([*parts[0], *parts[1]]) == rows_of(whole)
    assert len(parts[0]) == len(parts[1]) == len(whole)


def test_an_evaluation_tells_what_does_not_fit(tokenizer, capsys):
    long = turn("assistant", "river " * 60)
    records = [*RECORDS["chat"][:2], {"messages": [turn("user", "a"), long]}]
    capsys.readouterr()
    assert len(chat_batches(source_of(records), tokenizer, batch_size=8, length=64).once()) == 1
    told = capsys.readouterr().err
    assert "1 are cut and 0 left out" in told and "repeat" not in told
    with pytest.raises(UserError, match="no record fits 8 tokens; raise --length"):
        asked = {"messages": [turn("user", "river " * 60), long]}
        chat_batches(source_of([asked]), tokenizer, batch_size=8, length=8).once()
