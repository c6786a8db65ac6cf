"""Credentials known by their look or place: in addresses, behind telling names, tokens of well-known services.

Owns these forms. Knows no environment.
"""

from __future__ import annotations

import re

from raydata_llm.engine.secret_names import is_telling

MASK = "***"

# scheme://user:password@host, with whatever people put there: "@", "/", "#", "?", quotes. A password with a slash makes
# no address, and is in the message that says so. Not what follows a port (a path with an "@"), nor an IPv6 host.
_SCHEME = r"(?P<scheme>:(?:\\*/){2})"
_USER_INFO = re.compile(
    _SCHEME
    + r"(?:(?!\[)[^/\s'\"@?#:\\,;]*:(?!(?:\\*/){2})(?!\d{1,5}(?:[/\s'\"?#,;)\]}]|$))(?!\*\*\*@)[^\s]{0,400}@"
    + r"|[^/\s'\"@?#:]+(?:@[^/\s'\"@?#:]+)*@)"
)
# The same inside of a query: http%3A%2F%2Fuser%3Apassword%40host.
_QUOTED_USER_INFO = re.compile(r"(%(?:25)?3A(?:%(?:25)?2F){2})(?:(?!%(?:25)?(?:40|2F))[^\s&'\"])+%(?:25)?40", re.I)

# name=value, as in queries, connection strings, command lines and messages: "?sig=", ";AccountKey=", "password='x'".
_ASSIGNED = re.compile(
    r"(?:(?<![\w.])|(?<=%26)|(?<=%3F))(?P<name>[A-Za-z][\w.-]{0,80})(?P<sign>\s?=\s?|%3D)(?P<value>\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|[^\s&;,'\"()\[\]{}]+)",
    re.I,
)
# 'name': 'value', as in JSON and in a dict's repr, quotes escaped or not.
_NAMED = re.compile(
    r"(?P<quote>\\*[\"'])(?P<name>[A-Za-z][\w.-]{0,80})(?P=quote)(?P<sign>\s*:\s*)"
    r"(?P<open>b?\\*[\"'])(?P<value>(?:(?!(?P=quote))[^\n])*)(?P<close>\\*[\"'])",
)
# A header's line, and an environment's or a YAML file's: AUTHORIZATION, X-API-KEY or DB_PASSWORD and a colon.
_HEADER = re.compile(
    r"(?P<name>\b(?:(?:proxy-)?authorization|(?:set-)?cookie|x-[\w-]*(?:key|token|secret|auth)[\w-]*)|(?-i:\b[A-Z][A-Z0-9]*_[A-Z0-9_]+))"
    r"(?P<sign>: ?)(?P<value>(?:(?:bearer|basic|token|digest|negotiate|apikey)\s+)?[^\s,;'\"]+)",
    re.I,
)
# A cookie's or an authorization's whole line: it may have several parts.
_HEADER_LINE = re.compile(
    r"(?P<name>\b(?:(?:proxy-)?authorization|(?:set-)?cookie))(?P<sign>:[ \t]*)(?P<value>[^\r\n'\"]+)", re.I
)
# --password x, of a command line.
_FLAG = re.compile(r"(?<=--)(?P<name>[A-Za-z][\w-]{0,80})(?P<sign>\s)(?P<value>[^\s-][^\s]*)")
_NO_VALUE = re.compile(r"(?i)[\"']?(none|null|true|false|\*+|<[^>]*>|\.{3,}|-?\d{1,5}(\.\d+)?|)[\"']?\.?")

_TOKENS = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?:AKIA|ASIA|ABIA|ACCA|AROA|AIDA)[A-Z0-9]{12,}"
    r"|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|gl(?:pat|dt|rt|cbt)-[\w-]{16,}"
    r"|(?:hf|api_org)_[A-Za-z0-9]{16,}"
    r"|(?:sk|pk|rk)-(?=[\w-]*\d)[\w-]{16,}|[srp]k_(?:live|test)_\w{10,}"
    r"|xox[abeoprs]-[\w-]{10,}|xapp-[\w-]{10,}|AIza[\w-]{30,}|ya29\.[\w-]{16,}"
    r"|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{30,}|nvapi-[\w-]{16,}|gsk_[A-Za-z0-9]{20,}|dapi[0-9a-f]{32}"
    r"|SG\.[\w-]{16,}\.[\w-]{16,}|(?:dckr_pat|aph0|esecret)_[\w-]{12,}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"
    r")"
)
_BEARER = re.compile(r"(?i)\b(bearer|basic)(\s+|%20|\+)(?=[\w.~+/=-]*[\d=])[\w.~+/=-]{8,}")
_PEM = re.compile(
    r"-----BEGIN ([A-Z0-9 ]*)PRIVATE KEY( BLOCK)?-----.*?(-----END [A-Z0-9 ]*PRIVATE KEY( BLOCK)?-----|\Z)", re.S
)


def mask_shapes(text: str) -> str:
    """The text without what looks like a credential."""
    # Each form needs a sign that most texts lack.
    if "-----BEGIN" in text:
        text = _PEM.sub(MASK, text)
    if "@" in text:
        text = _USER_INFO.sub(rf"\g<scheme>{MASK}@", text)
    if "%" in text:
        text = _QUOTED_USER_INFO.sub(rf"\g<1>{MASK}%40", text)
    text = _TOKENS.sub(MASK, text)
    text = _BEARER.sub(rf"\1\2{MASK}", text)
    if ":" in text:
        text = _HEADER_LINE.sub(_mask_value, text)
        text = _HEADER.sub(_mask_value, text)
        text = _NAMED.sub(_mask_entry, text)
    if "--" in text:
        text = _FLAG.sub(_mask_value, text)
    if "=" in text or "%3" in text:
        text = _ASSIGNED.sub(_mask_value, text)
    return text


def password_of(address: str) -> str | None:
    """The password in an address."""
    found = _USER_INFO.search(address)
    if found is None:
        return None
    user_info = found[0].removeprefix(found["scheme"]).removesuffix("@")
    return user_info.partition(":")[2] or user_info


def _mask_value(found: re.Match[str]) -> str:
    value = found["value"]
    if found["name"] == "key" and found.string[: found.start()][-1:] not in ("?", "&", ";"):
        # sorted(rows, key=len), in a traceback.
        return found[0]
    if _NO_VALUE.fullmatch(value) or not is_telling(found["name"]):
        return found[0]
    quote = value[0] if value[0] in "'\"" else ""
    return f"{found['name']}{found['sign']}{quote}{MASK}{quote}"


def _mask_entry(found: re.Match[str]) -> str:
    if _NO_VALUE.fullmatch(found["value"]) or not is_telling(found["name"]):
        return found[0]
    quote = found["quote"]
    return f"{quote}{found['name']}{quote}{found['sign']}{found['open']}{MASK}{found['close']}"
