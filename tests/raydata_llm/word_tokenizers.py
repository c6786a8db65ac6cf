"""Tokenizers of other kinds than byte-level BPE, built on the spot: as Llama-2's, Mistral's and BERT's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<|user|>"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_WORDS = ["▁hello", "▁world", "▁the", "▁end", "hello"]
_LETTERS = [*"▁�é{}[]\":,.'-", *"abcdefghijklmnopqrstuvwxyz0123456789"]
# A word is made of its first letters and the one after them.
_MERGES = list(
    dict.fromkeys((word[: end - 1], word[end - 1 : end]) for word in _WORDS for end in range(2, len(word) + 1))
)
VOCABULARY = [*SPECIAL_TOKENS, *_BYTES, *_LETTERS, *(left + right for left, right in _MERGES)]


def llama_tokenizer() -> Tokenizer:
    """As Llama-2's and TinyLlama's files have it: a space before each text, which the decoder takes away again."""
    tokenizer = _sentencepiece()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def metaspace_tokenizer(prepend_scheme: str) -> Tokenizer:
    """As newer conversions of Mistral and T5 have it."""
    tokenizer = _sentencepiece()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=prepend_scheme, split=False)
    strips = [] if prepend_scheme == "never" else [decoders.Strip(" ", 1, 0)]
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strips]
    whole = decoders.Metaspace("▁", prepend_scheme=prepend_scheme)
    tokenizer.decoder = whole if prepend_scheme == "always" else decoders.Sequence(pieces)
    return tokenizer


def wordpiece_tokenizer() -> Tokenizer:
    """As BERT's: words, and parts of words that begin with ##."""
    words = ["[UNK]", "[CLS]", "[SEP]", "hello", "world", "##ing", "the", "."]
    tokenizer = Tokenizer(models.WordPiece({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in words[:3]])
    return tokenizer


def save_llama_tokenizer(folder: Path, **config: Any) -> Path:
    """Write `llama_tokenizer` as a model's files; plain text gets a BOS before it."""
    folder.mkdir(parents=True, exist_ok=True)
    llama_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        **config,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _sentencepiece() -> Tokenizer:
    vocabulary = {piece: place for place, piece in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.BPE(vocabulary, _MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer
