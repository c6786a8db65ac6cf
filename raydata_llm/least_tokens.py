"""How few tokens a text can have: found by counting characters, so that a text that is far too long is never tokenised.

Tokenising 10 MB takes a minute and gigabytes, and its prompt is refused after that. Owns what is known of tokenizers'
parts: which of them leave characters out. Knows no engine.
Invariant: no text has fewer tokens than `least_tokens` says.
"""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Shorter texts are tokenised in milliseconds; they are not looked at.
LONG_TEXT = 1 << 16
# What to do with a prompt of a model that generates.
TOO_LONG = "shorten it, set truncate_prompt_tokens, or raise max_model_len"
# What leaves no character out but white space. NFC and NFKC join up to four characters.
_KEEPING_NORMALIZERS = {
    "Sequence",
    "Prepend",
    "NFD",
    "NFKD",
    "NFC",
    "NFKC",
    "Lowercase",
    "ByteLevel",
    "Strip",
    "Replace",
}
_KEEPING_SPLITTERS = {
    "Sequence",
    "ByteLevel",
    "Metaspace",
    "Digits",
    "Whitespace",
    "WhitespaceSplit",
    "Split",
    "Punctuation",
}
_MOST_JOINED = 4
_DROPPING_SPACES = {"Strip", "Whitespace", "WhitespaceSplit", "Replace"}
# Of words that hold such a character, any tokenizer of words makes a token at least. Other white space may be left out.
_WORD = re.compile(r"(?<![^ \t\r\n])[^ \t\r\n]*?[0-9A-Za-z]")


_SPACES = re.compile(r"\s+")
_NO_LETTERS = bytes(byte for byte in range(256) if not chr(byte).isascii() or not chr(byte).isalpha())


@dataclass(frozen=True)
class _Bound:
    """What one token stands for at most; 0 where there is no telling.

    Args:
        characters: Characters.
        letters: ASCII letters; a few tokens are long lines of dashes or spaces, and none so long a word.
        counts_spaces: Whether white space counts among the characters, because none is ever left out.
        joined: Characters that may become one before they are looked at.
        counts_words: A token stands for one word at most.
    """

    characters: int = 0
    letters: int = 0
    counts_spaces: bool = False
    joined: int = 1
    counts_words: bool = False


_bounds: weakref.WeakKeyDictionary[Any, _Bound] = weakref.WeakKeyDictionary()


def least_tokens(tokenizer: Any, text: str) -> int:
    """Tokens that the text has at least; 0 for short ones, and for tokenizers that nothing is known of."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if len(text) < LONG_TEXT or backend is None:
        return 0
    bound = _bounds.get(tokenizer)
    if bound is None:
        bound = _bounds[tokenizer] = _bound_of(backend)
    if bound.counts_words:
        return sum(1 for _ in _WORD.finditer(text))
    if not bound.characters:
        return 0
    # ASCII has nothing to be joined.
    joined = 1 if text.isascii() else bound.joined
    characters = len(text) if bound.counts_spaces else len(_SPACES.sub("", text))
    letters = _num_letters(text) if joined == 1 and bound.letters else 0
    return max(characters // (bound.characters * joined), letters // max(1, bound.letters))


def _num_letters(text: str) -> int:
    return len(text.encode("utf-8", "ignore").translate(None, _NO_LETTERS))


def check_length(tokenizer: Any, text: str, most_tokens: int, remedy: str) -> None:
    """Refuse a text that has more tokens than the model takes.

    Raises:
        ValueError: for one that is longer for certain; others are for the engine to count.
    """
    least = least_tokens(tokenizer, text)
    if least > most_tokens:
        raise ValueError(
            f"the prompt has {len(text):,} characters, which are at least {least:,} tokens, and the model takes "
            f"{most_tokens:,}: {remedy}"
        )


def _bound_of(backend: Any) -> _Bound:
    model = backend.model
    kind = type(model).__name__
    parts = [*_parts(backend.normalizer), *_parts(backend.pre_tokenizer)]
    if kind == "WordPiece":
        # A word that it does not know is one token, however long.
        return _Bound(counts_words=_keeps_words(parts))
    normalizer, splitter = _parts(backend.normalizer), _parts(backend.pre_tokenizer)
    keeps = _keeps(normalizer, _KEEPING_NORMALIZERS) and _keeps(splitter, _KEEPING_SPLITTERS)
    if not keeps or not _writes_all(backend, model, parts):
        return _Bound()
    added = backend.get_added_tokens_decoder().values()
    tokens = [*backend.get_vocab(with_added_tokens=True)]
    return _Bound(
        characters=max(map(len, tokens)),
        letters=max(map(_num_letters, tokens)),
        counts_spaces=not any(part["type"] in _DROPPING_SPACES for part in parts)
        and not any(token.lstrip or token.rstrip for token in added),
        joined=_MOST_JOINED if any(part["type"] in ("NFC", "NFKC") for part in parts) else 1,
    )


def _parts(component: Any) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer and all that it consists of, as tokenizers writes them."""
    if component is None:
        return []
    return list(_flattened(json.loads(component.__getstate__())))


def _flattened(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield part
    for inner in (*part.get("normalizers", ()), *part.get("pretokenizers", ())):
        yield from _flattened(inner)


def _keeps(parts: list[dict[str, Any]], known: set[str]) -> bool:
    for part in parts:
        if part["type"] not in known or str(part.get("behavior", "")).lower() == "removed":
            return False
        if part["type"] == "Replace":
            (pattern,) = part["pattern"].values()
            # What is replaced by less may be left out, but for spaces by something else.
            if "Regex" in part["pattern"] or len(part["content"]) < len(pattern.strip()):
                return False
    return True


def _keeps_words(parts: list[dict[str, Any]]) -> bool:
    """Whether a word's ASCII letters and digits are there to be a token, as BERT's normalizer has them."""
    return all(part["type"] in ("BertNormalizer", "BertPreTokenizer", "Lowercase", "Whitespace") for part in parts)


def _writes_all(backend: Any, model: Any, parts: list[dict[str, Any]]) -> bool:
    """Whether it writes every character: an unknown one may else be left out, or many of them be one token."""
    vocab = backend.get_vocab(with_added_tokens=False)
    if any(part["type"] == "ByteLevel" for part in parts):
        from tokenizers.pre_tokenizers import ByteLevel

        return type(model).__name__ == "BPE" and all(letter in vocab for letter in ByteLevel.alphabet())
    # Unigram takes its own, where it has bytes; BPE likewise.
    has_bytes = all(f"<0x{byte:02X}>" in vocab for byte in range(256))
    return has_bytes and bool(json.loads(model.__getstate__()).get("byte_fallback", False))
