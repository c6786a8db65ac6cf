"""Structural tags as a grammar in llguidance's terms: free text in which a trigger opens a part that follows a schema.

Owns how text and special tokens stand in such a grammar: a special token is one token and no text, so that `<f>` is a
token where the tokenizer says so, and three characters where it does not. Knows no requests.

    start: (tag_0 | tag_1)* tag_end
    tag_0: TAG_TEXT <[7]> "{" %json {...} "}"             its trigger begins with a special token
    tag_1_trigger[lazy]: TAG_TEXT "<function"             its trigger is text
    tag_1: tag_1_trigger "=f>" %json {...} "</function>"
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any


def tag_grammar(tags: Sequence[Mapping[str, Any]], special_tokens: Mapping[str, int]) -> str:
    """The grammar of some tags.

    Args:
        tags: Trigger, begin, schema and end of each; begin starts with the trigger.
        special_tokens: The tokenizer's, by what they are called.
    """
    names = [f"tag_{number}" for number in range(len(tags))]
    rules = [_rules(name, tag, special_tokens) for name, tag in zip(names, tags, strict=True)]
    head = ["%llguidance {}", f"start: ({' | '.join(names)})* tag_end", "tag_end: TAG_TEXT", r"TAG_TEXT: /(.|\n)*/"]
    return "\n".join([*head, *rules, ""])


def _rules(name: str, tag: Mapping[str, Any], special_tokens: Mapping[str, int]) -> str:
    trigger, begin = tag["trigger"], tag["begin"]
    body = [f"%json {json.dumps(tag['schema'])}", *_items(tag["end"], special_tokens)]
    if any(trigger.startswith(token) for token in special_tokens):
        return " ".join([f"{name}: TAG_TEXT", *_items(begin, special_tokens), *body])
    rest = _items(begin.removeprefix(trigger), special_tokens)
    return f"{name}_trigger[lazy]: TAG_TEXT {json.dumps(trigger)}\n" + " ".join(
        [f"{name}: {name}_trigger", *rest, *body]
    )


def _items(text: str, special_tokens: Mapping[str, int]) -> list[str]:
    """A text as a grammar's items: special tokens by their ids, the rest quoted."""
    # The longest first, where one's name begins another's.
    pattern = "|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True)))
    parts = re.split(f"({pattern})", text) if pattern else [text]
    return [f"<[{special_tokens[part]}]>" if part in special_tokens else json.dumps(part) for part in parts if part]
