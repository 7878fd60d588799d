"""A SentencePiece model written as a tokenizer.json that gives the same ids.

SentencePiece writes a space as U+2581, and so takes that character for a space. Here pieces have
their spaces as they are: the character falls to its bytes, as data/tokenizer.py has it too.
"""

import base64
import re
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import sentencepiece

from runtime.errors import UserError

SPACE_MARK = "▁"
"""How SentencePiece writes a space."""
UNIGRAM, BPE = 1, 2
"""Numbers of the algorithms in a model file; the others are no longer used."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Numbers of the types of pieces in a model file."""
ENDS_KEY = b"\xc2\x3e"
"""Key of field 1000, of bytes; the format leaves numbers from 200 to others."""
ENDS = b"ends of a response: "
TEMPLATE_KEY = b"\xca\x3e"
"""Key of field 1001, of bytes."""
TEMPLATE = b"chat template: "
NEVER = 1000.0
"""How far below the worst piece's score a token is put that no text may spell."""


class Piece(NamedTuple):
    """A piece of a model file; its place is its id."""

    text: str
    """With spaces as they are, but for the names of control tokens, unk and bytes."""
    score: float
    type: int


class Spec(NamedTuple):
    """A model file, as far as encoding and decoding hang on it."""

    pieces: list[Piece]
    algorithm: int
    has_bytes: bool
    """True where what no piece covers falls to its bytes."""
    charsmap: bytes
    """Table of the normaliser; empty where letters stay as they are."""
    adds_prefix: bool
    """True where a text gets a space in front."""
    trims_spaces: bool
    """True where a text loses the spaces at its ends, and of several in a row all but one."""
    marks_words: bool
    """True where a space is marked, in front of words."""
    symbols: frozenset[str]
    """User-defined pieces of several characters: merges would cut them."""

    @property
    def cuts_text(self) -> bool:
        """True if a symbol, as an added token, would cut a text whose parts are changed then."""
        return bool(self.symbols) and (self.adds_prefix or self.trims_spaces)


def tokenizer_json(model: bytes) -> dict[str, Any]:
    """Return the content of the tokenizer.json that encodes and decodes as SentencePiece does.

    `model`: the bytes of a model file. Control tokens and unk are special there, and a text has no
    bos yet. Raises UserError for a model that no tokenizer.json can stand for.
    """
    spec = read_spec(model)
    _refuse_uncovered(spec, model)
    tokens = _bpe(spec) if spec.algorithm == BPE else _unigram(spec)

    # Tokens found in a text as they are spelled: special ones, and symbols where they may be.
    added = []
    for i, piece in enumerate(spec.pieces):
        is_special = piece.type in (CONTROL, UNKNOWN)
        if is_special or (piece.text in spec.symbols and not spec.cuts_text):
            added.append(added_token(i, piece.text, is_special))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": _normalizer(spec),
        "pre_tokenizer": _pre_tokenizer(spec),
        "post_processor": None,
        "decoder": _decoder(spec),
        "model": {**tokens, "byte_fallback": spec.has_bytes},
    }


def may_differ(model: bytes) -> str | None:
    """Say where the tokenizer.json of `model` may give other ids than SentencePiece; else None."""
    spec = read_spec(model)
    if spec.charsmap:
        return "compatibility characters that a combining mark follows"
    if spec.algorithm == UNIGRAM:
        return "texts with two equally likely segmentations"
    return None


def added_token(i: int, name: str, special: bool) -> dict[str, Any]:
    """Return an entry of a tokenizer.json's `added_tokens`, found in a text as it is spelled."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": name, **flags, "special": special}


def _refuse_uncovered(spec: Spec, model: bytes) -> None:
    """Raise UserError for what a tokenizer.json has no word for."""
    types = {piece.type for piece in spec.pieces}
    # Symbols are added tokens, which are found before a text is normalised or segmented.
    is_changed = bool(spec.charsmap) or spec.algorithm == UNIGRAM
    faults = {
        "another algorithm than BPE and Unigram": spec.algorithm not in (BPE, UNIGRAM),
        "spaces that are not marked in front of words": not spec.marks_words,
        "unused pieces": UNUSED in types,
        "user-defined symbols beside a normaliser or in Unigram": (
            USER_DEFINED in types and is_changed
        ),
        "pieces that its merges do not make": spec.cuts_text and not _makes_all(spec, model),
    }
    for fault, is_there in faults.items():
        if is_there:
            raise UserError(
                f"tokenizer: its SentencePiece model has {fault}, which a tokenizer.json cannot "
                "say; use another tokenizer"
            )


def _makes_all(spec: Spec, model: bytes) -> bool:
    """True if each piece, as a whole text, is encoded as itself."""
    # A later part of a message wins: no space in front, and none taken away.
    plain = sentencepiece.SentencePieceProcessor(model_proto=model + b"\x1a\x04\x18\x00\x20\x00")
    for i, piece in enumerate(spec.pieces):
        if piece.type == NORMAL and plain.encode(piece.text) != [i]:
            return False
    return True


# --- the parts of a tokenizer.json


def _bpe(spec: Spec) -> dict[str, Any]:
    """Return the model: ids of pieces, and all pairs that make a piece, the best pieces first."""
    ids = {piece.text: i for i, piece in enumerate(spec.pieces)}
    normal = [piece for piece in spec.pieces if piece.type == NORMAL]
    texts = {piece.text for piece in normal}

    # All pairs of pieces that are a piece when joined. The sort is stable: of equal scores the
    # earlier piece comes first, then the longer left half.
    merges = []
    for piece in sorted(normal, key=_minus_score):
        for cut in range(len(piece.text) - 1, 0, -1):
            left, right = piece.text[:cut], piece.text[cut:]
            if left in texts and right in texts:
                merges.append([left, right])
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": _unk(spec).text,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        # A symbol stands alone where the pre-tokenizer has cut it out.
        "ignore_merges": spec.cuts_text,
        "vocab": ids,
        "merges": merges,
    }


def _minus_score(piece: Piece) -> float:
    """Return a key to sort pieces by, the highest score first."""
    return -piece.score


def _unigram(spec: Spec) -> dict[str, Any]:
    """Return the model: pieces with their scores, which no control token and no byte has."""
    # So far below all scores that no segmentation has such a token.
    scores = [piece.score for piece in spec.pieces if piece.type == NORMAL]
    never = min(scores) - NEVER
    vocab = []
    for piece in spec.pieces:
        score = piece.score if piece.type == NORMAL else never
        vocab.append([piece.text, score])
    unk = spec.pieces.index(_unk(spec))
    return {"type": "Unigram", "unk_id": unk, "vocab": vocab}


def _unk(spec: Spec) -> Piece:
    """Return the piece of what is unknown, which every model has."""
    return next(piece for piece in spec.pieces if piece.type == UNKNOWN)


def _normalizer(spec: Spec) -> dict[str, Any] | None:
    """Return what is done to a text first, in SentencePiece's order; None for nothing."""
    steps: list[dict[str, Any]] = []
    if spec.charsmap:
        table = base64.b64encode(spec.charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": table})
    # Without bytes to spell it, the mark in a text is a space.
    if not spec.has_bytes:
        steps.append(_replacement({"String": SPACE_MARK}, " "))
    if spec.trims_spaces:
        steps.append(_replacement({"Regex": r"\A +| +\z"}, ""))
        steps.append(_replacement({"Regex": " {2,}"}, " "))
    if spec.adds_prefix:
        steps.append({"type": "Prepend", "prepend": " "})
    return {"type": "Sequence", "normalizers": steps} if steps else None


def _replacement(pattern: dict[str, str], content: str) -> dict[str, Any]:
    """Return the step that writes `content` in place of `pattern`, a String or a Regex."""
    return {"type": "Replace", "pattern": pattern, "content": content}


def _pre_tokenizer(spec: Spec) -> dict[str, Any] | None:
    """Return how a text is cut: at symbols, where added tokens would not do; None for not."""
    if not spec.cuts_text:
        return None
    # The longest first: an alternative that matches is taken.
    longest_first = sorted(spec.symbols, key=len, reverse=True)
    pattern = {"Regex": "|".join(map(re.escape, longest_first))}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def _decoder(spec: Spec) -> dict[str, Any]:
    """Return how pieces become a text: bytes are joined, and a space in front is taken off."""
    unknown = _replacement({"String": _unk(spec).text}, " ⁇ ")
    steps: list[dict[str, Any]] = [unknown, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if spec.adds_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


# --- the model file, a protocol buffer


def with_ends(model: bytes, ends: Sequence[int]) -> bytes:
    """Return a model file that also names the ids `ends`, which end a response beside its eos.

    They are the last field, of a number that the format leaves to others: SentencePiece reads the
    file as before.
    """
    if not ends:
        return model
    text = ENDS + ",".join(map(str, ends)).encode()
    # Their length in two bytes of seven bits each.
    size = bytes([len(text) & 127 | 128, len(text) >> 7])
    return model + ENDS_KEY + size + text


def split_ends(model: bytes) -> tuple[bytes, list[int]]:
    """Return a model file as it was before `with_ends`, and the ids."""
    found = re.search(ENDS_KEY + b".." + ENDS + rb"([\d,]+)\Z", model, re.DOTALL)
    if found is None:
        return model, []
    return model[: found.start()], [int(i) for i in found[1].split(b",")]


def with_template(model: bytes, template: str) -> bytes:
    """Return a model file that also holds a chat template, as a field that SentencePiece skips.

    `model`: without the ids of `with_ends`, which come last.
    """
    text = TEMPLATE + template.encode()
    return model + TEMPLATE_KEY + _in_four_bytes(len(text)) + text


def split_template(model: bytes) -> tuple[bytes, str | None]:
    """Return a model file as it was before `with_template`, and the template; None without one.

    `model`: as `split_ends` returns it.
    """
    start = model.rfind(TEMPLATE_KEY)
    while start >= 0:
        # The key's bytes may stand elsewhere too: the field is the one that ends the file.
        text = start + len(TEMPLATE_KEY) + 4
        size = _in_four_bytes(len(model) - text)
        if model[text - 4 :].startswith(size + TEMPLATE):
            return model[:start], model[text + len(TEMPLATE) :].decode()
        start = model.rfind(TEMPLATE_KEY, 0, start)
    return model, None


def _in_four_bytes(number: int) -> bytes:
    """Return a protocol buffer's number, seven bits a byte, in as many bytes as a long one."""
    low = [number >> shift & 127 for shift in (0, 7, 14)]
    # The highest bit of a byte says that another one follows.
    continued = [part | 128 for part in low]
    last = number >> 21 & 127
    return bytes([*continued, last])


def read_spec(model: bytes) -> Spec:
    """Read a model file that SentencePiece has taken."""
    # Fields of the file, in sentencepiece_model.proto: pieces, the trainer's and normaliser's.
    pieces = []
    parts: dict[int, dict[int, Any]] = {2: {}, 3: {}}
    for number, value in _fields(model):
        if number == 1:
            pieces.append(_piece(dict(_fields(value))))
        elif number in parts:
            parts[number].update(_fields(value))
    trainer, normalizer = parts.values()

    # A field that is not there has its default.
    own = [piece.text for piece in pieces if piece.type == USER_DEFINED]
    return Spec(
        pieces=pieces,
        algorithm=trainer.get(3, UNIGRAM),
        has_bytes=bool(trainer.get(35, False)),
        charsmap=normalizer.get(2, b""),
        adds_prefix=bool(normalizer.get(3, True)),
        trims_spaces=bool(normalizer.get(4, True)),
        marks_words=bool(normalizer.get(5, True)) and not trainer.get(24, False),
        symbols=frozenset(text for text in own if len(text) > 1),
    )


def _piece(fields: dict[int, Any]) -> Piece:
    """Return a piece of its text, score and type."""
    text = fields.get(1, b"").decode()
    (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
    kind = fields.get(3, NORMAL)
    if kind in (NORMAL, USER_DEFINED, UNUSED):
        text = text.replace(SPACE_MARK, " ")
    return Piece(text, score, kind)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield number and value of a protocol buffer's fields: an int, or the bytes of the rest."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        # A value has 8 bytes, or 4, or their number stands before it.
        size = {1: 8, 5: 4}.get(wire_type)
        if size is None:
            size, at = _varint(message, at)
        yield number, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Return the number that starts at `at`, seven bits a byte, and where it ends."""
    value = 0
    shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
