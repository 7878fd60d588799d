"""Tokenizers of Hugging Face folders: SentencePiece's tokenizer.model, or a tokenizer.json.

A run keeps either as `tokenizer.model`; a tokenizer.json (read by the package `tokenizers`) with
the names of its bos, eos and pad added.
"""

import json
import pathlib
from typing import Any

from runtime.errors import UserError

ADDED = "plumb_special"
"""Entry of the kept JSON: {"bos", "eos", "pad": names of tokens}."""


class JsonPieces:
    """A kept tokenizer.json with the methods of SentencePiece's processor that Tokenizer uses.

    An id of -1 is no token.
    """

    def __init__(self, model: bytes):
        """Raise RuntimeError for what is no kept tokenizer.json, UserError without the package."""
        try:
            import tokenizers
        except ImportError:
            raise UserError(
                "tokenizer.json needs a package more: pip install -r requirements-hf.txt"
            ) from None
        try:
            content = json.loads(model)
            names = content.pop(ADDED)
            self._inner = tokenizers.Tokenizer.from_str(json.dumps(content))
        # The package raises nothing narrower.
        except Exception as fault:
            raise RuntimeError(f"not a tokenizer.json: {fault}") from None
        # In a text, the spelling of a special token is text.
        self._inner.encode_special_tokens = True
        self._ids = {name: self._inner.token_to_id(token) for name, token in names.items()}
        added = self._inner.get_added_tokens_decoder()
        self._controls = {i for i, token in added.items() if token.special}
        # Ids may have gaps: what counts is the largest.
        self._size = 1 + max(self._inner.get_vocab(with_added_tokens=True).values())

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

    def piece_to_id(self, piece: str) -> int:
        i = self._inner.token_to_id(piece)
        return -1 if i is None else i

    def is_control(self, i: int) -> bool:
        return i in self._controls

    def id_to_piece(self, i: int) -> str:
        return self._inner.id_to_token(i)

    def encode(self, text: str) -> list[int]:
        return self._inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._inner.decode(ids, skip_special_tokens=False)


def read_tokenizer(folder: pathlib.Path) -> bytes:
    """Return what a run keeps of a Hugging Face folder's tokenizer; raises UserError.

    Without a bos, a text starts with the eos; the pad is never the eos, but another special
    token, or the bos where there is none.
    """
    sentencepiece_model = folder / "tokenizer.model"
    if sentencepiece_model.exists():
        return sentencepiece_model.read_bytes()
    try:
        content = json.loads((folder / "tokenizer.json").read_text())
        options = json.loads((folder / "tokenizer_config.json").read_text())
    except (OSError, ValueError) as fault:
        raise UserError(
            f"{folder}: no tokenizer.model, and no tokenizer.json that can be read ({fault})"
        ) from None
    bos = _special_name(options, "bos")
    eos = _special_name(options, "eos")
    pad = _special_name(options, "pad")
    if eos is None:
        file = folder / "tokenizer_config.json"
        raise UserError(f"{file}: eos_token: missing; name the token that ends a text")
    bos = bos or eos
    if pad in (None, eos):
        specials = [token["content"] for token in content["added_tokens"] if token["special"]]
        free = [name for name in specials if name not in (bos, eos)]
        pad = free[0] if free else bos
    content[ADDED] = {"bos": bos, "eos": eos, "pad": pad}
    return json.dumps(content).encode()


def _special_name(options: dict[str, Any], kind: str) -> str | None:
    """Return the name of the bos, eos or pad, which may stand alone or in an object."""
    name = options.get(f"{kind}_token")
    return name["content"] if isinstance(name, dict) else name


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """Return the files, by name, from which other tools load a run's tokenizer.

    `tokenizer`: a data.tokenizer.Tokenizer.
    """
    pieces = tokenizer.pieces
    options: dict[str, Any] = {
        "bos_token": pieces.id_to_piece(tokenizer.bos),
        "eos_token": pieces.id_to_piece(tokenizer.eos),
        "pad_token": pieces.id_to_piece(tokenizer.pad),
    }
    if isinstance(pieces, JsonPieces):
        content = json.loads(tokenizer.model)
        del content[ADDED]
        options["tokenizer_class"] = "PreTrainedTokenizerFast"
        return {
            "tokenizer.json": json.dumps(content).encode(),
            "tokenizer_config.json": json.dumps(options).encode(),
        }

    # SentencePiece's model, whose control tokens a text must not spell there either.
    controls = [i for i in range(tokenizer.size) if pieces.is_control(i) or pieces.is_unknown(i)]
    flat = {
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
        "special": True,
    }
    first_piece = pieces.id_to_piece(pieces.encode("a")[0])
    options |= {
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": pieces.id_to_piece(pieces.unk_id()),
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": first_piece.startswith("▁"),
        "legacy": False,
        "added_tokens_decoder": {
            str(i): {"content": pieces.id_to_piece(i), **flat} for i in controls
        },
    }
    return {
        "tokenizer.model": tokenizer.model,
        "tokenizer_config.json": json.dumps(options, indent=1).encode(),
    }
