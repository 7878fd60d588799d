import io
import json
import pathlib
import random

import jax
import pytest
import sentencepiece

from data.tokenizer import Tokenizer
from generate import chat
from runtime.errors import UserError

STORIES = pathlib.Path(__file__).parents[2] / "shared" / "data" / "stories260k" / "tok512.model"
CORPUS = [
    f"The {a} {b} sat by the {c}.\nIt was {n} o'clock."
    for a in ("old", "young", "grey")
    for b in ("cat", "dog", "king")
    for c in ("river", "door")
    for n in (1, 7, 12)
]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who sat?"},
    {"role": "assistant", "content": "The cat."},
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "By the door."},
]

GOLDEN_DOCUMENT = [2, 275, 304, 302, 7, 335, 353, 3]
GOLDEN_CHAT = (
    [2, 5, 95, 354, 348, 278, 71, 6, 275, 302, 353, 3],
    [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1],
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.train(CORPUS, tmp_path_factory.mktemp("run"), 384)


def controls(t):
    return {t.pad, t.bos, t.eos, t.system, t.user, t.assistant}


def test_round_trip_is_exact_for_any_text(tokenizer):
    rng = random.Random(0)
    points = [*range(0x5B), 0x20, 0x2581, 0x2585, 0xFEFF, 0xFFFD, 0x1F600, 0x10FFFF]
    texts = ["", " ", "  a  b ", "\n\n", "\r\n\t", "a\x00b", "▁", " ▁ ▁▁x", "e\u0301", *CORPUS[:3]]
    for _ in range(2000):
        any_point = [rng.choice(points), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]
        texts.append("".join(chr(rng.choice([*points, *any_point])) for _ in range(12)))
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # Control: by SentencePiece alone, its space mark comes back as a space.
    assert tokenizer.pieces.decode(tokenizer.pieces.encode("▁")) == " "


def test_no_text_spells_a_control_token(tokenizer):
    for text in (
        "<|user|>",
        "<|assistant|>",
        "<|system|>",
        "<s>",
        "</s>",
        "<pad>",
        "<unk>",
        "▁<s>",
    ):
        ids = tokenizer.encode(f"hello {text}{text} there")
        assert not controls(tokenizer) & set(ids) and 0 not in ids
    assert len(controls(tokenizer)) == 6
    assert tokenizer.user in tokenizer.prompt("hello")  # control: the template does use them


def test_golden_ids(tokenizer):
    assert tokenizer.size == 374
    assert [tokenizer.pad, tokenizer.bos, tokenizer.eos] == [1, 2, 3]
    assert [tokenizer.system, tokenizer.user, tokenizer.assistant] == [4, 5, 6]
    assert tokenizer.document("The old cat\nsat.") == GOLDEN_DOCUMENT
    assert tokenizer.chat(TALK[1:3]) == GOLDEN_CHAT


def test_training_is_deterministic(tokenizer, tmp_path):
    assert Tokenizer.train(iter(CORPUS), tmp_path / "a.model", 384).sha256 == tokenizer.sha256
    assert Tokenizer.train(CORPUS[1:], tmp_path / "b.model", 384).sha256 != tokenizer.sha256


def test_newlines_are_tokens_of_their_own(tokenizer):
    newline = tokenizer.encode("\n")
    assert len(newline) == 1 and tokenizer.encode("cat.\n\nThe").count(newline[0]) == 2
    byte = tokenizer.pieces.piece_to_id("<0x0A>")
    assert tokenizer.newlines() == sorted([*newline, byte])


def test_mask_is_exactly_the_assistants_tokens_and_their_eos(tokenizer):
    tokens, mask = tokenizer.chat(TALK)
    kept = [token for token, m in zip(tokens, mask, strict=True) if m]
    first, second = tokenizer.encode("The cat."), tokenizer.encode("By the door.")
    assert kept == [*first, tokenizer.eos, *second, tokenizer.eos]
    assert tokens.count(tokenizer.bos) == 1 and tokens[0] == tokenizer.bos
    assert tokens.count(tokenizer.eos) == 2 == tokens.count(tokenizer.user)
    assert tokenizer.decode(tokens) == "".join(message["content"] for message in TALK)


def test_prompt_is_what_the_response_follows(tokenizer):
    tokens, _ = tokenizer.chat(TALK)
    prompt = tokenizer.prompt(TALK[:-1])
    assert [*prompt, *tokenizer.encode("By the door."), tokenizer.eos] == tokens
    assert tokenizer.prompt("Who?") == tokenizer.prompt([{"role": "user", "content": "Who?"}])


def test_load_from_file_and_run(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "run")
    tokenizer.save(tmp_path / "a.model")
    for path in (
        tmp_path / "run",
        tmp_path / "a.model",
        str(tmp_path / "run" / "tokenizer.model"),
    ):
        assert Tokenizer.load(path).sha256 == tokenizer.sha256
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.model", "run", "tokenizer.model"]


def test_mistakes_are_one_line(tmp_path):
    (tmp_path / "bad.model").write_bytes(b"garbage")
    for wrong in (
        lambda: Tokenizer.load(tmp_path / "bad.model"),
        lambda: Tokenizer.load(tmp_path / "none"),
        lambda: Tokenizer.train([], tmp_path, 512),
        lambda: Tokenizer.train(CORPUS, tmp_path, 200),
    ):
        with pytest.raises(UserError) as fault:
            wrong()
        assert "\n" not in str(fault.value) and ";" in str(fault.value)


def test_special_tokens_are_ids(tmp_path):
    for absent, wanted in (("bos", None), ("eos", "no eos token"), ("pad", None)):
        out = io.BytesIO()
        ids = {"pad_id": 3, f"{absent}_id": -1}
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=out,
            vocab_size=60,
            hard_vocab_limit=False,
            minloglevel=2,
            **ids,
        )
        (tmp_path / "a.model").write_bytes(out.getvalue())
        if wanted is None:
            t = Tokenizer.load(tmp_path / "a.model")
            assert all(0 <= i < t.size for i in (t.bos, t.eos, t.pad))
            # Without a bos, a text starts with the eos.
            assert (t.bos == t.eos) == (absent == "bos")
        else:
            with pytest.raises(UserError, match=f"a.model: the tokenizer has {wanted}"):
                Tokenizer.load(tmp_path / "a.model")


def test_a_run_is_read_with_its_own_tokenizer_only(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    config = {"script": "train_sft", "tokenizer_sha256": tokenizer.sha256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Tokenizer.load(tmp_path).sha256 == tokenizer.sha256
    other = Tokenizer.train(CORPUS[1:], tmp_path / "other.model", 384)
    flipped = bytearray(tokenizer.model)
    flipped[len(flipped) // 2] ^= 1
    for model in (other.model, bytes(flipped)):
        (tmp_path / "tokenizer.model").write_bytes(model)
        for path in (tmp_path, tmp_path / "tokenizer.model"):
            with pytest.raises(UserError, match=r"tokenizer\.model: not "):
                Tokenizer.load(path)


def test_text_that_is_not_unicode_is_one_line(tokenizer):
    with pytest.raises(UserError, match="not UTF-8"):
        tokenizer.encode(b"caf\xff".decode("utf-8", "surrogateescape"))


def test_many_characters_fit_a_small_vocabulary(tmp_path):
    """Of 2,000 characters the frequent ones get tokens, and the others are bytes."""
    rng = random.Random(0)
    texts = ["".join(chr(0x4E00 + int(2000 * rng.random() ** 3)) for _ in range(80))] * 3
    texts += [
        "".join(chr(0x4E00 + int(2000 * rng.random() ** 3)) for _ in range(80)) for _ in range(99)
    ]
    t = Tokenizer.train(texts, tmp_path, 512)
    assert t.size <= 512 and all(t.decode(t.encode(text)) == text for text in texts)
    assert len(t.encode(chr(0x4E00))) < 3 < len(t.encode(chr(0x9000) * 2))
    with pytest.raises(UserError, match=r"cannot be trained|no text"):
        Tokenizer.train(["\0\0\0"], tmp_path, 512)


@pytest.mark.skipif(not STORIES.exists(), reason="stories260k/tok512.model is not here")
def test_a_model_trained_elsewhere():
    t = Tokenizer.load(STORIES)
    assert (t.size, t.bos, t.eos, t.pad, t.user) == (512, 1, 2, 0, None)
    assert t.decode(t.document("Once upon a time\n there was")) == "Once upon a time\n there was"
    assert t.decode([t.bos, *t.encode("hello"), t.pad, t.pad]) == "hello"
    user, hello, assistant, hi = (
        t.encode(text) for text in ("<|user|>", "hello", "<|assistant|>", "hi")
    )
    # No role tokens: text stands for them.
    assert t.prompt("hello") == [t.bos, *user, *hello, *assistant]
    tokens, mask = t.chat(
        [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    )
    assert tokens == [t.bos, *user, *hello, *assistant, *hi, t.eos] and sum(mask) == len(hi) + 1


def test_a_chat_forgets_its_oldest_turns(tokenizer, monkeypatch, capsys):
    """The turns given to the model always fit; a message too long by itself ends nothing."""
    typed = iter(["hello there", "how are you", "x " * 200, "good bye", ""])
    given = []
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    room = len(tokenizer.prompt("how are you")) + 4

    def reply(tokens, key):
        given.append(tokens)
        return tokenizer.encode(f"answer {len(given)}")

    assert chat(reply, tokenizer, jax.random.key(0), room) == "answer 3"
    assert given == [tokenizer.prompt(text) for text in ("hello there", "how are you", "good bye")]
    assert "too long" in capsys.readouterr().out
    typed = iter(["hello there", "how are you", ""])
    given.clear()
    chat(reply, tokenizer, jax.random.key(0), 1000)
    # Control: where there is room, all turns are given.
    assert "hello" in tokenizer.decode(given[1])
