"""A byte-level tokenizer small enough for the tiny models, built on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
# Like many real templates it writes the BOS itself, and fails on what it does not know.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if tools %}tools:{{ tools | tojson }}\n{% endif %}"
    "{% if mood is defined %}mood:{{ mood }}\n{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'clown' %}{{ raise_exception('no clowns') }}{% endif %}"
    "{% if 'tool_calls' in message %}calls:{{ message.tool_calls | length }}{% endif %}"
    "{{ '<|' + message.role + '|>' + message.content + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_tokenizer(folder: Path, **config: Any) -> Path:
    """Write tokenizer.json and tokenizer_config.json into `folder`; plain text gets a BOS before it.

    Args:
        config: Values that replace those of tokenizer_config.json; None leaves one out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog", "hello world"] * 5, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "chat_template": CHAT_TEMPLATE,
        **config,
    }
    kept = {name: value for name, value in settings.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    return folder


def save_pair_tokenizer(folder: Path) -> Path:
    """As `save_tokenizer`, but as BERT's: `<s> text </s>`, and `<s> text </s> other </s>` with token types."""
    save_tokenizer(folder, chat_template=None)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
