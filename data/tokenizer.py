"""SentencePiece tokenizer and the chat template.

<bos> (<|system|> text)? <|user|> text <|assistant|> text <eos> <|user|> text <|assistant|> ...
"""

import hashlib
import io
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sentencepiece

from data.tokenizer_json import JsonPieces
from runtime.errors import UserError

ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPACE_MARK = "▁"  # SentencePiece writes a space as U+2581, so the character itself travels as its three bytes

Message = dict[str, str]
TRAINING_RECORDS = 20_000
"""Records that a script's tokenizer is trained on."""


class Tokenizer:
    """Text to token ids and back. Control tokens (pad, bos, eos, roles) cannot be spelled by any text.

    Models trained elsewhere may lack pad (then `pad` is unk, never eos) and roles (then `user` is None, and the
    chat template spells it out, as text that a message could spell too).
    """

    def __init__(self, model: bytes):
        self.model = model
        is_json = model[:1] == b"{"
        self.pieces = (
            JsonPieces(model)
            if is_json
            else sentencepiece.SentencePieceProcessor(model_proto=model)
        )
        pieces = self.pieces
        self.size: int = pieces.get_piece_size()
        self.sha256: str = hashlib.sha256(model).hexdigest()
        self.bos: int = pieces.bos_id()
        self.eos: int = pieces.eos_id()
        self.pad: int = pieces.pad_id() if pieces.pad_id() >= 0 else pieces.unk_id()
        self.system, self.user, self.assistant = (self._control(name) for name in ROLES.values())
        self._roles = {"system": self.system, "user": self.user, "assistant": self.assistant}
        self._hidden = {self.pad, self.bos, self.eos, *self._roles.values()}
        marks = [pieces.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self._mark = [i for i in marks if i != pieces.unk_id()]

    def _control(self, piece: str) -> int | None:
        i = self.pieces.piece_to_id(piece)
        return i if self.pieces.is_control(i) else None

    @classmethod
    def train(cls, texts: Iterable[str], path: str | os.PathLike, vocab_size: int) -> "Tokenizer":
        """A byte-pair tokenizer of at most `vocab_size` tokens (270 or more), saved to `path` (see `save`).

        Deterministic. Of very many texts a million are sampled.
        """
        sentencepiece.set_random_generator_seed(0)
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                byte_fallback=True,
                character_coverage=1.0,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                split_digits=True,
                user_defined_symbols=["\n"],
                unk_id=0,
                pad_id=1,
                bos_id=2,
                eos_id=3,
                control_symbols=list(ROLES.values()),
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
            raise
        tokenizer = cls(model.getvalue())
        tokenizer.save(path)
        return tokenizer

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """From a `.model` file or from a run's folder (its `tokenizer.model`); raises UserError."""
        file = _file(path)
        try:
            return cls(file.read_bytes())
        except FileNotFoundError:
            raise UserError(
                f"{file}: no tokenizer here; name a .model file or the folder of a run"
            ) from None
        except (OSError, RuntimeError):
            raise UserError(
                f"{file}: not a SentencePiece model; restore the file or train another"
            ) from None

    def save(self, path: str | os.PathLike) -> None:
        """Write `path` if it ends in `.model`, else `<path>/tokenizer.model`; all of it or nothing."""
        file = _file(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        partial.write_bytes(self.model)
        partial.replace(file)

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone: no bos, no eos, never a control token."""
        if SPACE_MARK not in text or not self._mark:
            return self.pieces.encode(text)
        first, *rest = (self.pieces.encode(part) for part in text.split(SPACE_MARK))
        return [*first, *(i for part in rest for i in (*self._mark, *part))]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; exactly inverts `encode` for tokenizers of `train`.

        Left out are control tokens, and ids that only the model has, whose vocabulary may be the larger.
        """
        return self.pieces.decode(
            [int(i) for i in ids if int(i) < self.size and int(i) not in self._hidden]
        )

    def ended(self, responses: Iterable[Sequence[int]]) -> list[str]:
        """The texts of those that came to their end; others are no whole answers."""
        return [self.decode(ids) for ids in responses if ids and ids[-1] == self.eos]

    def newlines(self) -> list[int]:
        """The tokens whose text ends in a newline; those of other makers may have one for `.` and a newline."""
        return [i for i in range(self.size) if self.decode([i]).endswith("\n")]

    def document(self, text: str) -> list[int]:
        """A whole text: bos, its tokens, eos."""
        return [self.bos, *self.encode(text), self.eos]

    def chat(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Tokens of a conversation and their loss mask: 1 on each assistant's tokens and its eos, else 0."""
        tokens, mask = [self.bos], [0]
        for message in messages:
            content = self.encode(message["content"])
            answers = message["role"] == "assistant"
            role, content = (
                self._role(message["role"]),
                [*content, *([self.eos] if answers else [])],
            )
            tokens += [*role, *content]
            mask += [0] * len(role) + [int(answers)] * len(content)
        return tokens, mask

    def prompt(self, messages: str | Sequence[Message]) -> list[int]:
        """Tokens up to and with `<|assistant|>`: what a response follows. A string is one user's turn."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return [*self.chat(messages)[0], *self._role("assistant")]

    def _role(self, name: str) -> list[int]:
        return self.encode(ROLES[name]) if self._roles[name] is None else [self._roles[name]]


def _file(path: str | os.PathLike) -> pathlib.Path:
    path = pathlib.Path(path)
    return path if path.suffix == ".model" else path / "tokenizer.model"


def tokenizer_for(config: Any, source: Any) -> Tokenizer:
    """A script's tokenizer: its run's (resuming), that of `config.init` or `config.tokenizer`, or one made of `source`.

    Training reads the first TRAINING_RECORDS records; the vocabulary is the model's. Raises UserError.
    """
    if (pathlib.Path(config.run) / "tokenizer.model").exists():
        return Tokenizer.load(config.run)
    if config.init is not None:
        tokenizer = Tokenizer.load(config.init)
        if (
            config.tokenizer is not None
            and Tokenizer.load(config.tokenizer).sha256 != tokenizer.sha256
        ):
            raise UserError(
                f"--tokenizer={config.tokenizer}: not that of --init={config.init}; leave it out"
            )
        return tokenizer
    if config.tokenizer is not None:
        return Tokenizer.load(config.tokenizer)
    records = (source[i] for i in range(min(len(source), TRAINING_RECORDS)))
    with tempfile.TemporaryDirectory() as folder:
        return Tokenizer.train(
            (text for record in records for text in texts_of(record)), folder, config.model.vocab
        )


def texts_of(record: Any) -> Iterator[str]:
    """All text in a record, of any schema."""
    if isinstance(record, str):
        yield record
    elif isinstance(record, dict):
        yield from (
            text for name, value in record.items() if name != "role" for text in texts_of(value)
        )
    elif isinstance(record, list | tuple):
        yield from (text for value in record for text in texts_of(value))
