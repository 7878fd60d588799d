"""Tokenizers, and conversations as tokens: by the model's own chat template, or else as

<bos> (<|system|> text)? <|user|> text <|assistant|> text <eos> <|user|> text <|assistant|> ...
"""

import functools
import hashlib
import io
import os
import pathlib
import re
import reprlib
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import sentencepiece

from data.bad_rows import RecordRefused
from data.chat_template import ChatTemplate
from data.messages import Message, is_trained
from data.records import Record
from data.sentencepiece_json import SPACE_MARK
from data.tokenizer_json import JsonPieces, SentencePieces, any_of
from runtime.errors import UserError
from runtime.foreign import one_line
from runtime.run_folder import refuse_other_tokenizer
from runtime.writes import atomic_bytes

ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
BYTES_AND_SPECIALS = 256 + 4 + len(ROLES) + 1
"""Tokens that every trained tokenizer has: bytes, unk, pad, bos, eos, roles and the newline."""
PROBE: tuple[Message, ...] = (
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
)
"""A conversation that shows how a chat template ends a turn."""
BYTE_LEVEL_SPACES = ("Ġ", "Ċ")
"""How byte-level vocabularies write a space and a newline."""
TRAINING_RECORDS = 20_000
"""Records that a script's tokenizer is trained on."""


def is_ended(response: Sequence[int], ends: Sequence[int]) -> bool:
    """Return whether a response, ids, has one of `ends` as its last token."""
    return len(response) > 0 and response[-1] in ends


class Tokenizer:
    """Text to token ids and back. Control tokens (pad, bos, eos, roles) are spelled by no text.

    `bos`, `eos` and `pad` are ids, `size` the number of ids, `sha256` that of the model, `model`
    the bytes that a run keeps. `ends` are the ids that end a response: first the eos, by which
    texts that are trained on end, then others that a model trained elsewhere may use. Such models
    may lack bos (a text then starts with the eos), pad (then `pad` is unk) and roles (then `user`
    is None). A model's own chat template (data/chat_template.py) writes conversations where it has
    one; else turns begin with the roles, spelled out as text where the tokenizer lacks them.
    """

    def __init__(self, model: bytes):
        """Read a SentencePiece model, or a kept tokenizer.json (data/tokenizer_json.py).

        Raises UserError, without the file's name, for bytes that are neither, and for a model
        without a token that ends a text.
        """
        self.model = model
        pieces: Any = JsonPieces(model) if model[:1] == b"{" else SentencePieces(model)
        self.pieces = pieces
        self.size: int = pieces.get_piece_size()
        self.sha256: str = hashlib.sha256(model).hexdigest()

        # Control tokens: no text has them, and none is decoded.
        self.eos: int = pieces.eos_id()
        self.bos: int = pieces.bos_id() if pieces.bos_id() >= 0 else self.eos
        self.pad: int = pieces.pad_id() if pieces.pad_id() >= 0 else pieces.unk_id()
        self.ends: list[int] = [self.eos, *pieces.end_ids()]
        self._refuse_no_ids()
        self._roles = {role: self._control(piece) for role, piece in ROLES.items()}
        self.system = self._roles["system"]
        self.user = self._roles["user"]
        self.assistant = self._roles["assistant"]
        self._hidden = {self.pad, self.bos, self.eos, *self._roles.values()}
        self._hidden |= set(filter(pieces.is_control, self.ends))

        # The bytes of the space mark, where the model has tokens for bytes.
        marks = [pieces.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self._mark = [i for i in marks if i not in (-1, pieces.unk_id())]

    @functools.cached_property
    def template(self) -> ChatTemplate | None:
        """The model's own chat template; None for a model without one."""
        source = self.pieces.chat_template()
        if source is None:
            return None
        tokens = {"eos_token": self.eos, "pad_token": self.pad}
        # A model without a bos has its eos in that place, which no template means.
        if self.bos != self.eos:
            tokens["bos_token"] = self.bos
        return ChatTemplate(
            source, {name: self.pieces.id_to_piece(i) for name, i in tokens.items()}
        )

    @functools.cached_property
    def turn_end(self) -> int:
        """The id that ends an assistant's turn: the eos, unless the chat template has another."""
        if self.template is None:
            return self.eos
        try:
            tokens, mask = self.chat(PROBE)
        except RecordRefused as fault:
            # No record's fault: it would refuse any.
            raise UserError(str(fault)) from None
        return [token for token, counts in zip(tokens, mask, strict=True) if counts][-1]

    def _refuse_no_ids(self) -> None:
        """Raise UserError where a special token is none of the model's."""
        for name, i in (("eos", self.eos), ("bos", self.bos), ("pad", self.pad)):
            if not 0 <= i < self.size:
                raise UserError(
                    f"the tokenizer has no {name} token; use one that has, as SentencePiece "
                    f"trains with --{name}_id"
                )
        for i in self.ends:
            if not 0 <= i < self.size:
                raise UserError(
                    f"eos_token_id {i} is not among the tokenizer's {self.size} tokens; correct it"
                )

    def _control(self, piece: str) -> int | None:
        i = self.pieces.piece_to_id(piece)
        return i if self.pieces.is_control(i) else None

    @classmethod
    def train(cls, texts: Iterable[str], path: str | os.PathLike, vocab_size: int) -> "Tokenizer":
        """Train a byte-pair tokenizer of at most `vocab_size` tokens (270 or more) and save it.

        `path`: see `save`. Deterministic. Of very many texts a million are sampled. Raises
        UserError for no text and for a vocabulary too small for bytes and characters.
        """
        sentencepiece.set_random_generator_seed(0)
        kept_texts = _without_rare_characters(texts, vocab_size)
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(kept_texts),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                # Any text survives: bytes for rare characters, no change to spaces or letters.
                byte_fallback=True,
                character_coverage=1.0,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                split_digits=True,
                # A newline is a token of its own: steps end there.
                user_defined_symbols=["\n"],
                unk_id=0,
                pad_id=1,
                bos_id=2,
                eos_id=3,
                control_symbols=list(ROLES.values()),
                # All of every text, in one order on every machine.
                max_sentence_length=1 << 24,
                input_sentence_size=1_000_000,
                shuffle_input_sentence=True,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as fault:
            if "sentences_.empty" in str(fault):
                raise UserError(
                    "tokenizer: no text to train on; give a source with some"
                ) from None
            if "smaller than required" in str(fault):
                raise UserError(
                    f"tokenizer: vocab_size {vocab_size} is too small for bytes, special tokens "
                    "and characters of the text; raise it to 512 or more"
                ) from None
            raise UserError(
                f"tokenizer: cannot be trained on this text ({one_line(fault)}); give another "
                "source, or --tokenizer"
            ) from None
        tokenizer = cls(model.getvalue())
        tokenizer.save(path)
        return tokenizer

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Load a `.model` file, or the `tokenizer.model` of a run's folder.

        Raises UserError, also where it is not the one that the run was made with.
        """
        file = _file(path)
        try:
            model = file.read_bytes()
            # Before it is read: of a damaged one nothing is believed.
            refuse_other_tokenizer(file, model)
            return cls(model)
        except FileNotFoundError:
            raise UserError(
                f"{file}: no tokenizer here; name a .model file or the folder of a run"
            ) from None
        except (OSError, UserError) as fault:
            raise UserError(f"{file}: {one_line(fault)}") from None

    def save(self, path: str | os.PathLike) -> None:
        """Write `path` if it ends in `.model`, else `<path>/tokenizer.model`; all or nothing."""
        file = _file(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_bytes(file, self.model)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` alone: no bos, no eos, never a control token.

        Raises UserError for a text that is not Unicode, as bytes of a command line may be.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{reprlib.repr(text)}: holds bytes that are not UTF-8; give the text in UTF-8"
            ) from None
        if SPACE_MARK not in text or not self._mark:
            return self.pieces.encode(text)
        first, *rest = text.split(SPACE_MARK)
        ids = list(self.pieces.encode(first))
        for part in rest:
            ids += [*self._mark, *self.pieces.encode(part)]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; exactly inverts `encode` for tokenizers of `train`.

        Left out are control tokens, and ids of `size` or more, which a model may have.
        """
        kept = []
        for i in map(int, ids):
            if i < self.size and i not in self._hidden:
                kept.append(i)
        return self.pieces.decode(kept)

    def ended(self, responses: Iterable[Sequence[int]]) -> list[str]:
        """Return the texts of the responses that have come to an end; others are no answers."""
        return [self.decode(ids) for ids in responses if is_ended(ids, self.ends)]

    def newlines(self) -> list[int]:
        """Return all ids whose text ends in a newline, in order.

        Tokenizers trained elsewhere may have one for `.` and a newline.
        """
        return [i for i in range(self.size) if self.decode([i]).endswith("\n")]

    @functools.cached_property
    def word_starts(self) -> frozenset[int]:
        """All ids before which a text may be cut: those that begin with a space or a newline.

        Control tokens too.
        """
        marks = (SPACE_MARK, *BYTE_LEVEL_SPACES, "\n")
        pieces = map(self.pieces.id_to_piece, range(self.size))
        starts = {i for i, piece in enumerate(pieces) if piece.startswith(marks)}
        return frozenset(starts | self._hidden)

    def document(self, text: str) -> list[int]:
        """Return the ids of a whole text: bos, its tokens, eos."""
        return [self.bos, *self.encode(text), self.eos]

    def chat(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Return the ids of a conversation and their loss mask, of the same length.

        It starts with bos; each assistant's turn ends with eos, the others do not. Where the model
        has a chat template of its own, all is as that has it. The mask is 1 on the tokens of each
        assistant's turn and its end, else 0; so it is on a turn of weight 0. Raises RecordRefused
        for messages that the template does not take, or that spell one of its control tokens, and
        UserError for a template that fails.
        """
        if self.template is not None:
            return self._templated_chat(self.template, messages)
        tokens = [self.bos]
        mask = [0]
        for message in messages:
            role = self._role(message["role"])
            content = self.encode(message["content"])
            is_answer = message["role"] == "assistant"
            if is_answer:
                content = [*content, self.eos]
            tokens += [*role, *content]
            mask += [0] * len(role) + [int(is_trained(message))] * len(content)
        return tokens, mask

    def prompt(self, messages: str | Sequence[Message]) -> list[int]:
        """Return the ids from bos up to and with `<|assistant|>`: what a response follows.

        Or those up to where the model's own chat template begins an answer. A string is one user's
        turn. Raises UserError as `chat` does.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if self.template is not None:
            self._refuse_controls(messages)
            return self.pieces.encode_with_controls(self.template.render(messages, True))
        tokens, _ = self.chat(messages)
        return [*tokens, *self._role("assistant")]

    def answer(self, text: str) -> list[int]:
        """Return the ids of an assistant's turn behind `prompt`, its end among them."""
        return [*self.encode(text), self.turn_end]

    def _templated_chat(
        self, template: ChatTemplate, messages: Sequence[Message]
    ) -> tuple[list[int], list[int]]:
        """As `chat`, by the model's own chat template."""
        self._refuse_controls(messages)
        tokens = self.pieces.encode_with_controls(template.render(messages, False))
        mask = [0] * len(tokens)
        for i, message in enumerate(messages):
            if is_trained(message):
                start = self._answer_start(template, messages[:i], tokens)
                end = next((t for t in range(start, len(tokens)) if tokens[t] in self.ends), None)
                if end is None:
                    raise UserError(
                        "the model's chat template ends an assistant's turn with none of the "
                        "tokens that end a response; name it in generation_config.json's "
                        "eos_token_id, and import again"
                    )
                mask[start : end + 1] = [1] * (end + 1 - start)
        return tokens, mask

    def _answer_start(
        self, template: ChatTemplate, before: Sequence[Message], tokens: list[int]
    ) -> int:
        """Return where, in a conversation of `tokens`, the answer to the messages `before` starts.

        That is where the same messages end as a prompt; RecordRefused where they are no beginning.
        """
        head = self.pieces.encode_with_controls(template.render(before, True))
        if tokens[: len(head)] != head:
            raise RecordRefused(
                "the model's chat template writes the beginning of this conversation differently "
                "as a prompt, so an assistant's tokens cannot be told from others; leave out the "
                "earlier turns, or use a model with another template"
            )
        return len(head)

    def _refuse_controls(self, messages: Sequence[Message]) -> None:
        """Raise RecordRefused for a message that would open or end a turn."""
        for message in messages:
            found = self._control_words.search(message["content"])
            if found:
                raise RecordRefused(
                    f"a message of the {message['role']} spells {found[0]}, a control token of "
                    "the model's chat template; take it out"
                )

    @functools.cached_property
    def _control_words(self) -> re.Pattern[str]:
        return any_of(self.pieces.controls())

    def _role(self, name: str) -> list[int]:
        """Return the ids that open a turn: the role's token, or its spelling without one."""
        token = self._roles[name]
        return self.encode(ROLES[name]) if token is None else [token]


def _without_rare_characters(texts: Iterable[str], vocab_size: int) -> list[str]:
    """Return the texts, without rare characters where there are too many for the vocabulary.

    A character that a tokenizer has no token for falls to its bytes. Left out are those that would
    take more than half of the room beside bytes and special tokens: the other half is for words.
    """
    kept_texts = list(texts)
    counts: Counter[str] = Counter()
    for text in kept_texts:
        counts.update(text)
    room = max(2, vocab_size - BYTES_AND_SPECIALS) // 2
    if len(counts) <= room:
        return kept_texts
    # A newline keeps apart what they stood between.
    rare = [character for character, _ in counts.most_common()[room:]]
    table = str.maketrans(dict.fromkeys(rare, "\n"))
    return [text.translate(table) for text in kept_texts]


def _file(path: str | os.PathLike) -> pathlib.Path:
    path = pathlib.Path(path)
    return path if path.suffix == ".model" else path / "tokenizer.model"


class HasVocab(Protocol):
    @property
    def vocab(self) -> int: ...


class TokenizerConfig(Protocol):
    """The fields of a script's configuration that `tokenizer_for` reads."""

    @property
    def run(self) -> str: ...

    @property
    def init(self) -> str | None: ...

    @property
    def tokenizer(self) -> str | None: ...

    @property
    def model(self) -> HasVocab: ...


class Records(Protocol):
    """A source of records (data.sources.Source)."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Record: ...


def tokenizer_for(config: TokenizerConfig, source: Records) -> Tokenizer:
    """Return a script's tokenizer: its run's, that of --init or --tokenizer, or a new one.

    The first of these that there is. A new one is trained on the first TRAINING_RECORDS records
    of `source`; its vocabulary is the model's. Raises UserError, also where --init has another
    tokenizer than --tokenizer.
    """
    # A run that is resumed has its own.
    if (pathlib.Path(config.run) / "tokenizer.model").exists():
        return Tokenizer.load(config.run)
    if config.init is not None:
        tokenizer = Tokenizer.load(config.init)
        named = config.tokenizer
        if named is not None and Tokenizer.load(named).sha256 != tokenizer.sha256:
            raise UserError(f"--tokenizer={named}: not that of --init={config.init}; leave it out")
        return tokenizer
    if config.tokenizer is not None:
        return Tokenizer.load(config.tokenizer)

    def texts() -> Iterator[str]:
        for i in range(min(len(source), TRAINING_RECORDS)):
            yield from texts_of(source[i])

    # The run keeps the model's bytes, not this file.
    with tempfile.TemporaryDirectory() as folder:
        return Tokenizer.train(texts(), folder, config.model.vocab)


def texts_of(record: Any) -> Iterator[str]:
    """Yield all text in a record of any schema, but the names of roles."""
    if isinstance(record, str):
        yield record
    elif isinstance(record, dict):
        for name, value in record.items():
            if name != "role":
                yield from texts_of(value)
    elif isinstance(record, list | tuple):
        for value in record:
            yield from texts_of(value)
