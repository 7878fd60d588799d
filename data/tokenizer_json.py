"""Tokenizers of Hugging Face folders: SentencePiece's tokenizer.model, or a tokenizer.json.

A run keeps either as `tokenizer.model`; a tokenizer.json (read by the package `tokenizers`) with
the names of its bos, eos and pad, and the ids of further ends, added.
"""

import functools
import json
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import sentencepiece

from data.chat_template import TEMPLATE_FILE, read_template
from data.sentencepiece_json import (
    SPACE_MARK,
    added_token,
    may_differ,
    split_ends,
    split_template,
    tokenizer_json,
    with_ends,
    with_template,
)
from runtime.errors import UserError
from runtime.foreign import (
    OBJECT,
    TEXT,
    Kind,
    check_values,
    either,
    file_in,
    list_of,
    object_of,
    one_line,
    read_object,
    read_object_if_there,
    whole,
)

ADDED = "plumb_special"
"""Entry of the kept JSON: {"bos", "eos", "pad": names of tokens, "ends": ids, "chat_template":
the template's text, or None}."""

OWN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""The chat template of models with the tokenizers that are trained here."""

TOKEN = whole(0, (1 << 31) - 1)
IDS = {name: either(TOKEN, list_of(TOKEN)) for name in ("bos_token_id", "eos_token_id")}
"""Kinds of the ids in config.json and generation_config.json."""

NAMED = Kind(
    "an object with a text `content`",
    lambda value: type(value) is dict and type(value.get("content")) is str,
)
NUMBERED = Kind(
    "an object with a text `content` and a whole number `id`",
    lambda value: NAMED.holds(value) and TOKEN.holds(value.get("id")),
)
BY_NUMBER = Kind(
    "an object of ids and tokens",
    lambda value: (
        object_of(NAMED).holds(value)
        and all(i.isascii() and i.isdigit() and len(i) < 10 for i in value)
    ),
)
EMPTY = Kind("empty", lambda value: value in ([], {}))
KINDS = {
    "bos_token": either(TEXT, NAMED),
    "eos_token": either(TEXT, NAMED),
    "pad_token": either(TEXT, NAMED),
    "added_tokens_decoder": either(BY_NUMBER, EMPTY),
    "added_tokens": either(list_of(NUMBERED), EMPTY),
    "model": OBJECT,
}
"""Kinds of the fields of a tokenizer_config.json, special_tokens_map.json or tokenizer.json."""


class JsonPieces:
    """A kept tokenizer.json with the methods of SentencePiece's processor that Tokenizer uses.

    An id of -1 is no token.
    """

    def __init__(self, model: bytes):
        """Raise UserError for what is no kept tokenizer.json, and without the package."""
        try:
            content = json.loads(model)
            names = content.pop(ADDED)
            self._ends = list(names.pop("ends", []))
            self._chat_template = names.pop("chat_template", None)
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as fault:
            raise UserError(
                f"no kept tokenizer.json ({one_line(fault)}); restore the file"
            ) from None
        self._content = content
        self._inner = _parsed(content)
        # In a text, the spelling of a special token is text.
        self._inner.encode_special_tokens = True
        self._ids = {name: self.piece_to_id(token) for name, token in names.items()}
        added = self._inner.get_added_tokens_decoder()
        self._controls = {i for i, token in added.items() if token.special}
        # Ids may have gaps: what counts is the largest.
        self._size = 1 + max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1)

    def get_piece_size(self) -> int:
        return self._size

    def bos_id(self) -> int:
        return self._ids["bos"]

    def eos_id(self) -> int:
        return self._ids["eos"]

    def pad_id(self) -> int:
        return self._ids["pad"]

    def unk_id(self) -> int:
        return -1

    def end_ids(self) -> list[int]:
        return self._ends

    def chat_template(self) -> str | None:
        return self._chat_template

    def piece_to_id(self, piece: str) -> int:
        i = self._inner.token_to_id(piece)
        return -1 if i is None else i

    def is_control(self, i: int) -> bool:
        return i in self._controls

    def id_to_piece(self, i: int) -> str:
        return self._inner.id_to_token(i)

    def encode(self, text: str) -> list[int]:
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_with_controls(self, text: str) -> list[int]:
        """Encode a text in which the spelling of a special token is that token."""
        return self._spelled.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _spelled(self) -> Any:
        return _parsed(self._content)

    def controls(self) -> list[str]:
        """Return the spellings of the special tokens."""
        return [self.id_to_piece(i) for i in sorted(self._controls)]

    def decode(self, ids: list[int]) -> str:
        return self._inner.decode(ids, skip_special_tokens=False)


class SentencePieces:
    """A kept SentencePiece model, with the methods of JsonPieces; others are its processor's."""

    def __init__(self, model: bytes):
        """Raise UserError for bytes that are no model."""
        self._processor = sentencepiece_pieces(model)
        rest, self._ends = split_ends(model)
        _, self._chat_template = split_template(rest)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def end_ids(self) -> list[int]:
        return self._ends

    def chat_template(self) -> str | None:
        return self._chat_template

    def controls(self) -> list[str]:
        """Return the spellings of the control tokens."""
        ids = filter(self._processor.is_control, range(self._processor.get_piece_size()))
        return [self._processor.id_to_piece(i) for i in ids]

    def encode_with_controls(self, text: str) -> list[int]:
        """Encode a text in which the spelling of a control token is that token."""
        ids: list[int] = []
        for part in self._control.split(text):
            i = self._processor.piece_to_id(part)
            if part and self._processor.is_control(i):
                ids.append(i)
            else:
                ids += self._processor.encode(part)
        return ids

    @functools.cached_property
    def _control(self) -> re.Pattern[str]:
        return any_of(self.controls())


def any_of(words: Sequence[str]) -> re.Pattern[str]:
    """Return the pattern of any of `words`, as a group; a longer one before its beginning."""
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")


def _parsed(content: dict[str, Any]) -> Any:
    """Return the tokenizer of the package `tokenizers` that a tokenizer.json describes."""
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            "this tokenizer needs a package more: pip install -r requirements-hf.txt"
        ) from None
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(content))
    # The package raises nothing narrower.
    except Exception as fault:
        raise UserError(f"no tokenizer.json ({one_line(fault)}); restore the file") from None


# --- from a folder


class Given(NamedTuple):
    """Tokens that the files beside a tokenizer name."""

    names: dict[str, str]
    """Names by `bos`, `eos` and `pad`, of those that are named."""
    ids: dict[str, list[int]]
    """Ids by `bos` and `eos`, by which a model begins, and its responses end."""
    added: dict[int, str]
    """Names of tokens beside the tokenizer's own, or of all."""
    words: set[int]
    """Those of them that a text may spell: they are not special."""

    def more_ends(self, eos: int) -> list[int]:
        """Return the ids that end a response beside `eos`, each once."""
        return [i for i in dict.fromkeys(self.ids.get("eos", [])) if i != eos]


def read_tokenizer(folder: pathlib.Path) -> bytes:
    """Return what a run keeps of a Hugging Face folder's tokenizer; raises UserError.

    A tokenizer.model is kept as it is where the files beside it name no other tokens. Without a
    bos, a text starts with the eos. The ids that end a response, those of generation_config.json
    or else of config.json, are kept too.
    """
    given = _given(folder)
    template = read_template(folder)
    file = file_in(folder, "tokenizer.model")
    described = file_in(folder, "tokenizer.json")

    # A SentencePiece model as it is, where it says all that is known of its tokens.
    if file.exists():
        model = file.read_bytes()
        pieces = sentencepiece_pieces(model)
        if _says_the_same(pieces, given):
            if template is not None:
                model = with_template(model, template)
            return with_ends(model, given.more_ends(pieces.eos_id()))

    # Else the folder's tokenizer.json, or one made from the model with those tokens added.
    if described.exists():
        content = read_object(described)
    elif file.exists():
        content = _with_added(tokenizer_json(model), given)
    else:
        raise UserError(
            f"{folder}: no tokenizer.model, and no tokenizer.json; restore one of them"
        )

    # What a run keeps beside it: which tokens begin, end and fill up a text.
    inner = _parsed(content)
    special = {**_special(folder, inner, given), "chat_template": template}
    # Other tools are to begin a text as a run does.
    _start_with(content, special["bos"], inner.token_to_id(special["bos"]))
    return json.dumps({**content, ADDED: special}).encode()


def _given(folder: pathlib.Path) -> Given:
    """Read the files beside a tokenizer."""
    # Special tokens, as the first file that names each one has it, and added ones by id.
    names: dict[str, str] = {}
    added: dict[int, str] = {}
    words: set[int] = set()
    for file_name in ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"):
        path = folder / file_name
        content = read_object_if_there(path)
        check_values(path, content, KINDS)
        for kind in ("bos", "eos", "pad"):
            token = content.get(f"{kind}_token")
            name = token["content"] if type(token) is dict else token
            if name is not None:
                names.setdefault(kind, name)
        for token in content.get("added_tokens") or []:
            added[token["id"]] = token["content"]
        for i, token in (content.get("added_tokens_decoder") or {}).items():
            added[int(i)] = token["content"]
            if token.get("special") is False:
                words.add(int(i))

    # Older folders have them in a file of their own.
    path = folder / "added_tokens.json"
    older = read_object_if_there(path)
    check_values(path, older, dict.fromkeys(older, TOKEN))
    added.update({i: name for name, i in older.items() if i is not None})

    # What generates looks into config.json only without the other.
    ids: dict[str, list[int]] = {}
    for file_name in ("generation_config.json", "config.json"):
        path = folder / file_name
        content = read_object_if_there(path)
        check_values(path, content, IDS)
        for kind in ("bos", "eos"):
            value = content.get(f"{kind}_token_id")
            if value is not None:
                ids.setdefault(kind, value if type(value) is list else [value])
    return Given(names, ids, added, words)


def sentencepiece_pieces(model: bytes) -> sentencepiece.SentencePieceProcessor:
    """Return the processor of a SentencePiece model; raises UserError for what is none."""
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        # It takes no bytes for no model.
        pieces.LoadFromSerializedProto(model or b"none")
        pieces.get_piece_size()
    except (RuntimeError, TypeError) as fault:
        raise UserError(
            f"not a SentencePiece model ({one_line(fault)}); restore the file or train another"
        ) from None
    return pieces


def _says_the_same(pieces: sentencepiece.SentencePieceProcessor, given: Given) -> bool:
    """True if a SentencePiece model has all that the files beside it name."""
    # The model's bos and eos must be called as the files call them.
    added = dict(given.added)
    for kind, i in {"bos": pieces.bos_id(), "eos": pieces.eos_id()}.items():
        if kind in given.names:
            added.setdefault(i, given.names[kind])
            if added[i] != given.names[kind]:
                return False

    # And it must have each token that they name, under the same id.
    for i, name in added.items():
        if not 0 <= i < pieces.get_piece_size():
            return False
        if pieces.id_to_piece(i) not in (name, name.replace(" ", SPACE_MARK)):
            return False
    return True


def _with_added(content: dict[str, Any], given: Given) -> dict[str, Any]:
    """Return a SentencePiece model's tokenizer.json with the tokens that are named beside it."""
    # The pieces that are there, by id: BPE and Unigram keep them differently.
    tokens = {token["id"]: token for token in content["added_tokens"]}
    vocab = content["model"]["vocab"]
    is_bpe = content["model"]["type"] == "BPE"
    if is_bpe:
        pieces = {i: piece for piece, i in vocab.items()}
    else:
        pieces = {i: piece for i, (piece, _) in enumerate(vocab)}

    # Tokens that are new, or called otherwise.
    for i, name in sorted(given.added.items()):
        old = pieces.get(i, "")
        if i in pieces and old in (name, name.replace(SPACE_MARK, " ")):
            continue
        tokens[i] = added_token(i, name, special=i not in given.words)
        # A name has one id, and an id one name.
        if is_bpe:
            vocab.pop(old, None)
            vocab[name] = i
    content["added_tokens"] = [tokens[i] for i in sorted(tokens)]
    return content


def _special(folder: pathlib.Path, inner: Any, given: Given) -> dict[str, Any]:
    """Return the entry ADDED: which tokens of `inner`, as the package reads it, are special."""
    # By name, or by the id where only that is given; a text must have an end.
    names: dict[str, str | None] = {}
    for kind in ("bos", "eos"):
        first = given.ids.get(kind, [None])[0]
        name = given.names.get(kind)
        if name is None and first is not None:
            name = inner.id_to_token(first)
        names[kind] = name
    if names["eos"] is None:
        raise UserError(
            f"{folder}/tokenizer_config.json: eos_token: missing; name the token that ends a text"
        )

    # Files and tokenizer must agree on every id.
    for i, name in given.added.items():
        if inner.token_to_id(name) != i:
            raise UserError(
                f"{folder}: the token {name!r} is {inner.token_to_id(name)} in the tokenizer and "
                f"{i} beside it; restore the files"
            )
    for kind, name in names.items():
        if name is not None and inner.token_to_id(name) is None:
            raise UserError(
                f"{folder}: {kind}_token {name!r} is no token of the tokenizer; restore the files"
            )

    # Without a bos the eos begins a text.
    names["bos"] = names["bos"] or names["eos"]
    names["pad"] = _pad_name(inner, given.names.get("pad"), names)
    return {**names, "ends": given.more_ends(inner.token_to_id(names["eos"]))}


def _pad_name(inner: Any, named: str | None, names: dict[str, str | None]) -> str | None:
    """Return the name of the pad: that of the folder, or a special token that no text needs.

    The eos is taken only where it is the bos too and no token is for such use.
    """
    is_free = named is not None and inner.token_to_id(named) is not None
    if is_free and named != names["eos"]:
        return named
    for token in inner.get_added_tokens_decoder().values():
        name = token.content.lower()
        if token.special and ("pad" in name or "unk" in name or "reserved" in name):
            return token.content
    return names["bos"]


# --- to a folder


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """Return the files, by name, from which other tools load a run's tokenizer.

    `tokenizer`: a data.tokenizer.Tokenizer. Raises UserError for a SentencePiece model that no
    tokenizer.json can stand for: other tools would make one, with other ids.
    """
    pieces = tokenizer.pieces
    files = {}
    if isinstance(pieces, JsonPieces):
        content = json.loads(tokenizer.model)
        del content[ADDED]
    else:
        content = tokenizer_json(tokenizer.model)
        where = may_differ(tokenizer.model)
        if where is not None:
            print(
                f"note: from the exported tokenizer.json other tools may give {where} other ids "
                "than tokenizer.model, which lies beside it",
                file=sys.stderr,
            )
        rest, _ = split_ends(tokenizer.model)
        files["tokenizer.model"], _ = split_template(rest)
    options = {
        # It takes the tokenizer.json as it is.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": pieces.id_to_piece(tokenizer.bos),
        "eos_token": pieces.id_to_piece(tokenizer.eos),
        "pad_token": pieces.id_to_piece(tokenizer.pad),
    }
    # Newer tools read the file, older ones the field.
    template = pieces.chat_template() or own_template(tokenizer)
    if template is not None:
        options["chat_template"] = template
        files[TEMPLATE_FILE] = template.encode()
    _start_with(content, options["bos_token"], tokenizer.bos)
    files["tokenizer.json"] = json.dumps(content, ensure_ascii=False).encode()
    files["tokenizer_config.json"] = json.dumps(options, indent=1).encode()
    return files


def own_template(tokenizer: Any) -> str | None:
    """Return the chat template that writes what `Tokenizer.chat` does without one; or None.

    None where the roles are spelled as text: cut into tokens as one text, they may be others.
    """
    return OWN_TEMPLATE if tokenizer.user is not None else None


def is_qwen(tokenizer: Any) -> bool:
    """True if a run's tokenizer works as Qwen's: bytes, of a text in normal form C."""
    if not isinstance(tokenizer.pieces, JsonPieces):
        return False
    content = json.loads(tokenizer.model)
    return content.get("normalizer") == {"type": "NFC"}


def _start_with(content: dict[str, Any], name: str, i: int) -> None:
    """Make a tokenizer.json put the bos, `name` with the id `i`, and no more around a text."""
    bos = {"SpecialToken": {"id": name, "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, second],
        "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]}},
    }
    # Byte-level ones set the places of tokens in the text, and no ids.
    old = content.get("post_processor") or {}
    steps = [step for step in old.get("processors", [old]) if step.get("type") == "ByteLevel"]
    content["post_processor"] = template
    if steps:
        content["post_processor"] = {"type": "Sequence", "processors": [*steps, template]}
