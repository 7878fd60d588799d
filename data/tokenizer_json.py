"""Tokenizers of Hugging Face folders: SentencePiece's tokenizer.model, or tokenizer.json by the tokenizers package.

A run keeps either as `tokenizer.model`; a tokenizer.json with the names of its bos, eos and pad added.
"""

import json
import pathlib
from typing import Any

from runtime.errors import UserError

ADDED = "plumb_special"
"""Entry of the kept JSON: {"bos", "eos", "pad": names of tokens}."""


class JsonPieces:
    """A kept tokenizer.json behind those methods of SentencePiece's processor that Tokenizer uses; -1 is no token."""

    def __init__(self, model: bytes):
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
        except Exception as fault:  # the package raises nothing narrower
            raise RuntimeError(f"not a tokenizer.json: {fault}") from None
        self._inner.encode_special_tokens = (
            True  # in a text, the spelling of a special token is text
        )
        self._ids = {name: self._inner.token_to_id(token) for name, token in names.items()}
        self._controls = {
            i for i, token in self._inner.get_added_tokens_decoder().items() if token.special
        }
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
    """What a run keeps of a Hugging Face folder's tokenizer; raises UserError.

    Without a bos, a text starts with the eos; the pad is never the eos, but another special token.
    """
    if (folder / "tokenizer.model").exists():
        return (folder / "tokenizer.model").read_bytes()
    try:
        content = json.loads((folder / "tokenizer.json").read_text())
        options = json.loads((folder / "tokenizer_config.json").read_text())
    except (OSError, ValueError) as fault:
        raise UserError(
            f"{folder}: no tokenizer.model, and no tokenizer.json that can be read ({fault})"
        ) from None
    names = {kind: options.get(f"{kind}_token") for kind in ("bos", "eos", "pad")}
    names = {
        kind: name["content"] if isinstance(name, dict) else name for kind, name in names.items()
    }
    if names["eos"] is None:
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: eos_token: missing; name the token that ends a text"
        )
    names["bos"] = names["bos"] or names["eos"]
    specials = [token["content"] for token in content["added_tokens"] if token["special"]]
    if names["pad"] in (None, names["eos"]):
        names["pad"] = next(
            (name for name in specials if name not in (names["bos"], names["eos"])), names["bos"]
        )
    return json.dumps({**content, ADDED: names}).encode()


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """The files, by name, from which other tools load a run's tokenizer."""
    pieces = tokenizer.pieces
    special = {
        kind: pieces.id_to_piece(getattr(tokenizer, kind)) for kind in ("bos", "eos", "pad")
    }
    options: dict[str, Any] = {f"{kind}_token": name for kind, name in special.items()}
    if isinstance(pieces, JsonPieces):
        content = json.loads(tokenizer.model)
        del content[ADDED]
        options["tokenizer_class"] = "PreTrainedTokenizerFast"
        return {
            "tokenizer.json": json.dumps(content).encode(),
            "tokenizer_config.json": json.dumps(options).encode(),
        }
    controls = [i for i in range(tokenizer.size) if pieces.is_control(i) or pieces.is_unknown(i)]
    flat = {
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
        "special": True,
    }
    options |= {
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": pieces.id_to_piece(pieces.unk_id()),
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": pieces.id_to_piece(pieces.encode("a")[0]).startswith("▁"),
        "legacy": False,
        "added_tokens_decoder": {
            str(i): {"content": pieces.id_to_piece(i), **flat} for i in controls
        },
    }
    return {
        "tokenizer.model": tokenizer.model,
        "tokenizer_config.json": json.dumps(options, indent=1).encode(),
    }
