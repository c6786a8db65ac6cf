"""The values that must not be seen, and how they look where they were written another way.

Owns which values an environment hides, and their spellings: escaped for JSON, Python, HTML and addresses, base64 in any
alignment, hexadecimal, broken over lines, cut short. Knows nothing of where a text goes.
"""

from __future__ import annotations

import base64
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from urllib.parse import unquote

from raydata_llm.engine.secret_names import is_telling
from raydata_llm.engine.secret_shapes import MASK, password_of

# Values that say nothing, of variables such as USE_TOKEN=1 or AUTH=disabled.
_TRIVIAL = frozenset(
    """
    true false yes no on off none null nil auto default enabled disabled enable disable required optional basic
    bearer token key secret password pass auth test tests user root admin local localhost login info debug error
    errors row rows value values text file files model prompt string data name names ray ssl tls http https s3
    """.split()  # noqa: SIM905 (a list of words)
)
# Shorter ones are masked behind a telling name alone ("pin=123"): they are part of any text.
_SHORTEST = 4
# From this length on (less, of letters and digits mixed) a value is masked inside of words too.
_ANYWHERE, _MIXED_ANYWHERE = 8, 6
# So much of a value gives it away where a text was cut.
_GIVEN_AWAY = 6
_CUTS = re.compile(r"\s?(?:\.{2,}|…|\[\.\.\.\])\s?|\\+\.{3}")
_SIGNS = re.compile(r"[\\%&\n+]")
_PIECE = re.compile(r"[,;\s]+")
_LONG_PIECE = 16
_GAP = r"(?:[ \t]*\\?\r?\n[ \t]*|(?:\\+r)?\\+n[ \t]*)?"
# Stands where base64 or hexadecimal stood until all of it is found.
_CODE = "\ue0ff"
_AROUND_CODE = re.compile(rf"(?:[A-Za-z0-9+/_-]{{0,2}}{_GAP}{_CODE})+{_GAP}[A-Za-z0-9+/_-]{{0,2}}(?:=|%3D){{0,2}}")
_NAMES = {"&": "amp", "<": "lt", ">": "gt", '"': "quot", "'": "apos"}
_SHORT_ESCAPES = {"\n": "n", "\t": "t", "\r": "r"}


def secret_values(environment: Mapping[str, str]) -> list[str]:
    """The values of variables with telling names, their parts, and the passwords in addresses."""
    found: dict[str, None] = {}
    for name, value in environment.items():
        text = str(value)
        if is_telling(name):
            found |= dict.fromkeys(_parts(text))
        elif "://" in text and (password := password_of(text)):
            found |= dict.fromkeys((password, unquote(password)))
    return [value for value in found if _is_secret(value)]


def _is_secret(value: str) -> bool:
    if value.lower() in _TRIVIAL or set(value) <= set("*.-_ "):
        return False
    return len(value) >= _SHORTEST


def _parts(value: str) -> Iterable[str]:
    """A value, and what of it is a secret by itself: lines of a PEM file, entries of JSON, a token after "Bearer"."""
    yield value
    stripped = value.strip()
    yield stripped
    if password := password_of(stripped):
        yield from (password, unquote(password))
    if stripped[:1] in "{[" and (nested := _read_json(stripped)) is not None:
        yield from _entries(nested)
        return
    if stripped.lower().startswith(("bearer ", "basic ", "token ")):
        yield stripped.partition(" ")[2].strip()
    for piece in _PIECE.split(stripped):
        name, sign, rest = piece.partition("=")
        if sign and rest.strip("=") and is_telling(name):
            yield rest
        elif len(piece) >= _LONG_PIECE and piece != stripped and "://" not in piece:
            yield piece


def _read_json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _entries(nested: object, telling: bool = False) -> Iterable[str]:
    if isinstance(nested, dict):
        for name, entry in nested.items():
            yield from _entries(entry, telling or is_telling(name))
    elif isinstance(nested, list):
        for entry in nested:
            yield from _entries(entry, telling)
    elif isinstance(nested, str) and telling:
        yield from _parts(nested) if nested[:1] not in "{[" else (nested,)


class Masker:
    """Takes certain values out of texts.

    Args:
        values: As of `secret_values`, or whatever else must not be seen.
    """

    def __init__(self, values: Iterable[str]) -> None:
        # Long ones first: one value may begin with another.
        chosen = sorted({value for value in values if _is_secret(value)}, key=len, reverse=True)
        self._anywhere = [value for value in chosen if _is_anywhere(value)]
        self._words = [value for value in chosen if not _is_anywhere(value)]
        self._codes = sorted(_encoded(self._anywhere), key=len, reverse=True)

    def mask(self, text: str) -> str:
        """The text without these values."""
        if not self._anywhere and not self._words:
            return text
        for value in self._anywhere:
            if value in text:
                text = text.replace(value, MASK)
        for code in self._codes:
            if code in text:
                text = text.replace(code, _CODE)
        if _SIGNS.search(text):
            for pattern, mask in self._spelled:
                text = pattern.sub(mask, text)
        if _CODE in text:
            # The characters beside a code are of the value in part.
            text = _AROUND_CODE.sub(MASK, text)
        for pattern in self._bounded:
            text = pattern.sub(MASK, text)
        return self._mask_cut(text)

    @functools.cached_property
    def _spelled(self) -> list[tuple[re.Pattern[str], str]]:
        """Values and their base64 as they stand in JSON, repr, HTML and addresses, and broken over lines."""
        codes = [code for value in self._anywhere for code in sorted(_base64_of(value))]
        values = [(re.compile(_spelling(value)), MASK) for value in self._anywhere]
        return [*values, *((re.compile(_spelling(code)), _CODE) for code in codes)]

    @functools.cached_property
    def _bounded(self) -> list[re.Pattern[str]]:
        """Short values, as words of their own."""
        patterns = []
        for value in self._words:
            begin = r"(?<!\w)" if value[0].isalnum() or value[0] == "_" else ""
            end = r"(?!\w)" if value[-1].isalnum() or value[-1] == "_" else ""
            patterns.append(re.compile(begin + _spelling(value) + end))
            whole = base64.b64encode(value.encode()).decode().rstrip("=")
            patterns.append(re.compile(rf"(?<![\w+/]){re.escape(whole)}(={{1,2}}|(?![\w+/=]))"))
        return patterns

    def _mask_cut(self, text: str) -> str:
        """Mask the first or the last part of a value where a text was cut."""
        for value in self._anywhere:
            if len(value) <= _GIVEN_AWAY:
                continue
            head, tail = value[:_GIVEN_AWAY], value[-_GIVEN_AWAY:]
            if head in text:
                ends = [*(cut.start() for cut in _CUTS.finditer(text)), len(text.rstrip("'\")}] "))]
                for end in reversed(sorted(set(ends))):
                    length = _longest(len(value), lambda n: text.endswith(value[:n], 0, end))  # noqa: B023 (called at once)
                    if length:
                        text = f"{text[: end - length]}{MASK}{text[end:]}"
            if tail in text:
                begins = [0, *(cut.end() for cut in _CUTS.finditer(text))]
                for begin in reversed(sorted(set(begins))):
                    length = _longest(len(value), lambda n: text.startswith(value[-n:], begin))  # noqa: B023
                    if length:
                        text = f"{text[:begin]}{MASK}{text[begin + length :]}"
        return text


def _longest(size: int, fits: Callable[[int], bool]) -> int:
    """The longest part of a value that fits, 0 for none that would give it away."""
    return next((n for n in range(size - 1, _GIVEN_AWAY - 1, -1) if fits(n)), 0)


def _is_anywhere(value: str) -> bool:
    marks = {"a" if c.islower() else "A" if c.isalpha() else "0" if c.isdigit() else "-" for c in value}
    mixed = len(marks) > 1
    return len(value) >= (_MIXED_ANYWHERE if mixed else _ANYWHERE)


def _encoded(values: Iterable[str]) -> set[str]:
    """The values in base64 and in hexadecimal."""
    found: set[str] = set()
    for value in values:
        raw = value.encode("utf-8", "surrogatepass")
        found |= {raw.hex(), raw.hex().upper(), raw.hex(" "), raw.hex(":"), *_base64_of(value)}
    return found


def _base64_of(value: str) -> set[str]:
    """The characters of base64, plain and for addresses, that a value fills whole, at each of its three places."""
    raw, found = value.encode("utf-8", "surrogatepass"), set()
    for place in range(3):
        code = base64.b64encode(bytes(place) + raw).decode()
        core = code[-(-8 * place // 6) : 8 * (place + len(raw)) // 6]
        found |= {core, core.replace("+", "-").replace("/", "_")}
    return found


def _spelling(value: str) -> str:
    """A pattern of all the ways in which a value may be written."""
    return _GAP.join(_ways(character) for character in value)


@functools.lru_cache(maxsize=1024)
def _ways(character: str) -> str:
    code = ord(character)
    raw = character.encode("utf-8", "surrogatepass")
    ways = [
        re.escape(character),
        rf"\\+x{_digits(f'{code:02x}')}" if code < 256 else "",
        rf"\\+u{_digits(f'{code:04x}')}" if code < 1 << 16 else _pair(code),
        rf"\\+U{_digits(f'{code:08x}')}",
        "".join(rf"\\+x{_digits(f'{byte:02x}')}" for byte in raw),
        "".join(rf"%(?:25)*{_digits(f'{byte:02x}')}" for byte in raw),
        rf"&(?:amp;)*#0*{code};",
        rf"&(?:amp;)*#[xX]0*{_digits(f'{code:x}')};",
    ]
    if character in _NAMES:
        # Escaped for JSON before, as `\&quot;`.
        ways.append(rf"\\*&(?:amp;)*{_NAMES[character]};")
    if character in _SHORT_ESCAPES:
        ways.append(rf"\\+{_SHORT_ESCAPES[character]}")
    if character in "\"'/\\":
        ways.append(rf"\\+{re.escape(character)}")
    if character == " ":
        ways.append(r"\+")
    return f"(?:{'|'.join(dict.fromkeys(way for way in ways if way))})"


def _pair(code: int) -> str:
    high, low = divmod(code - 0x10000, 0x400)
    return rf"\\+u{_digits(f'{0xD800 + high:04x}')}\\+u{_digits(f'{0xDC00 + low:04x}')}"


def _digits(number: str) -> str:
    """Hexadecimal digits in either case."""
    return "".join(f"[{digit}{digit.upper()}]" if digit.isalpha() else digit for digit in number)


@functools.lru_cache(maxsize=8)
def masker_of(environment: tuple[tuple[str, str], ...], values: frozenset[str]) -> Masker:
    """The masker of an environment as it is at a moment, and of further values."""
    return Masker([*secret_values(dict(environment)), *values])
