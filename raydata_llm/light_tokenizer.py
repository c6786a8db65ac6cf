"""A tokenizer made of the `tokenizers` library and jinja2 alone: what a task of a job needs, without transformers.

Owns the few calls that `raydata_llm.tokenizer` makes for plain texts and chats. Knows no cache: it is given a prepared
folder (see `tokenizer_cache`), which holds its settings when it can stand for the transformers tokenizer. For what it
cannot do it loads that one, once. Measured for SmolLM2-135M, import and load: 0.1 CPU seconds instead of 0.9.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers

from raydata_llm.chat_template import Unsupported, limited_transformers, render

SETTINGS_FILE = "light.json"
_PROBES = ("", "Hello , world . It 's  <s>odd</s>\n", " naïve café 你好 🦊 ")


@dataclass(frozen=True, kw_only=True)
class LightSettings:
    """What the behaviour of a plain tokenizer follows from beside its `tokenizer.json`."""

    chat_template: str | None
    special_tokens: Mapping[str, str]
    split_special_tokens: bool

    @classmethod
    def of(cls, tokenizer: Any) -> LightSettings | None:
        """Those of a plain transformers tokenizer; None for one that does more than its backend."""
        backend = tokenizer.backend_tokenizer
        # For BPE transformers ignores this setting, or did not: `is_equal` finds out.
        cleans = tokenizer.clean_up_tokenization_spaces and not isinstance(backend.model, tokenizers.models.BPE)
        if cleans or not isinstance(tokenizer.chat_template, str | None):
            return None
        return cls(
            chat_template=tokenizer.chat_template,
            special_tokens=dict(tokenizer.special_tokens_map),
            split_special_tokens=bool(tokenizer.split_special_tokens),
        )

    def write(self, folder: Path) -> None:
        """Leave them in a prepared folder."""
        (folder / SETTINGS_FILE).write_text(json.dumps(asdict(self)))


class LightTokenizer:
    """As a transformers tokenizer, where `raydata_llm.tokenizer` calls one in a task.

    Args:
        folder: A prepared folder with `LightSettings`.
        load_whole: Loads the transformers tokenizer of the folder.
    """

    def __init__(self, folder: Path, load_whole: Callable[[Path], Any]) -> None:
        settings = LightSettings(**json.loads((folder / SETTINGS_FILE).read_text()))
        self.chat_template = settings.chat_template
        self._special_tokens = settings.special_tokens
        self._folder, self._load_whole = folder, load_whole
        self._backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = settings.split_special_tokens

    def __call__(self, texts: Sequence[str], *, add_special_tokens: bool, **_: Any) -> dict[str, list[list[int]]]:
        """`{"input_ids": ...}`; other arguments only say which other results transformers would give."""
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return {"input_ids": [one.ids for one in encoded]}

    @property
    def backend_tokenizer(self) -> tokenizers.Tokenizer:
        """As transformers names what tokenises."""
        return self._backend

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of the tokens."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def convert_ids_to_tokens(self, token_ids: Sequence[int]) -> list[str | None]:
        """What the vocabulary calls the tokens."""
        return [self._backend.id_to_token(token_id) for token_id in token_ids]

    @functools.cached_property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """The tokens that stand beside the vocabulary, special ones among them, by id."""
        return dict(self._backend.get_added_tokens_decoder())

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]],
        *,
        tools: Any,
        chat_template: str | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        tokenize: bool,
        **variables: Any,
    ) -> str:
        """The conversation's text."""
        assert not tokenize
        template = chat_template or self.chat_template
        try:
            if continue_final_message or template is None:
                raise Unsupported
            return render(
                template,
                conversation,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                special_tokens=self._special_tokens,
                variables=variables,
            )
        except Unsupported:
            with limited_transformers():
                whole: str = self._whole.apply_chat_template(
                    conversation,
                    tools=tools,
                    chat_template=chat_template,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    tokenize=False,
                    **variables,
                )
            return whole

    def is_equal(self, tokenizer: Any) -> bool:
        """Whether it does what the transformers tokenizer does, on a few probes."""
        texts = list(_PROBES)
        for special in (True, False):
            encoded = self(texts, add_special_tokens=special)["input_ids"]
            if encoded != tokenizer(texts, add_special_tokens=special)["input_ids"]:
                return False
            if any(self.decode(ids, skip_special_tokens=special) != tokenizer.decode(ids, special) for ids in encoded):
                return False
        return self.chat_template is None or _rendered(self) == _rendered(tokenizer)

    @functools.cached_property
    def _whole(self) -> Any:
        return self._load_whole(self._folder)


def _rendered(tokenizer: Any) -> str:
    """A chat as the tokenizer's template writes it, or how it fails."""
    chat = [{"role": "user", "content": _PROBES[1]}]
    try:
        return str(
            tokenizer.apply_chat_template(
                chat,
                tools=None,
                chat_template=None,
                add_generation_prompt=True,
                continue_final_message=False,
                tokenize=False,
            )
        )
    except Exception as error:  # a template is a program: anything may come out of it
        return type(error).__name__
