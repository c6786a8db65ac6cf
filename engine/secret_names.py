"""Which names say that their value is a credential: of environment variables, settings, headers and query parameters.

Owns the words. Knows no values.
"""

from __future__ import annotations

import functools
import re

# Words that tell, each in any place of a name.
_WORDS = frozenset(
    """
    secret secrets password passwords passwd passphrase passcode pass pwd pat credential credentials cred creds
    token auth authorization apikey apikeys key signature sig sas cookie cookies bearer jwt dsn webhook connstr
    """.split()  # noqa: SIM905 (a list of words)
)
# Plurals that tell where one of these stands before them: API_KEYS does, MAX_TOKENS does not.
_PLURALS = frozenset({"keys", "tokens"})
_BEFORE_PLURALS = frozenset(
    """
    api access account auth bearer refresh secret session private signing encryption hf gh github gitlab openai
    """.split()  # noqa: SIM905 (a list of words)
)
# What has no gaps between its words: PGPASSWORD, SSHPASS, minioSecretkey, HFTOKEN.
_RUN_TOGETHER = re.compile(
    r"secret(?!ar)|passw(or)?d|passphrase|credential|connectionstring|sharedaccess"
    r"|(api|access|secret|private|account|master|auth|storage|signing|encryption|license|deploy|openai|ssh)keys?$"
    r"|(?<!re)(?<!de)token$|(ssh|db|pg|my|sql|user|root|admin|smtp|mail|ftp|redis|sudo)pass$|[a-z]pwd$"
)
# What stands behind a word that tells and takes that back: TOKEN_FILE, AUTH_MODE, KEY_COLUMN, PASS_RATE.
_ABOUT = frozenset(
    """
    file files path paths dir directory folder name names mode type kind url uri endpoint host port sock socket
    column columns size length len limit count budget ttl timeout expiry expiration seconds age enabled enable
    disabled disable policy algorithm algo method provider version format region arn scope scopes rotation
    parallelism backend helper prefix rate ratio index order schema field fields heads dim usage hash template
    class style required optional
    """.split()  # noqa: SIM905 (a list of words)
)
# Keys that open nothing, by the word before: PUBLIC_KEY, PRIMARY_KEY.
_OPEN_KEYS = frozenset(
    """
    public primary foreign sort partition row join group routing hot shard num index
    """.split()  # noqa: SIM905 (a list of words)
)
_PAIRS = frozenset(
    {("webhook", "url"), ("connection", "string"), ("connection", "str"), ("conn", "str"), ("conn", "string")}
)
# The working directory, in all shells.
_NO_SECRETS = frozenset({"pwd", "oldpwd"})

_BOUNDARY = re.compile(r"[^A-Za-z0-9]+|(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=[A-Za-z])(?=[0-9])")


@functools.lru_cache(maxsize=4096)
def is_telling(name: object) -> bool:
    """Whether a value under this name is a credential, by the name."""
    text = str(name)
    if text.lower() in _NO_SECRETS:
        return False
    words = [word.lower() for word in _BOUNDARY.split(text) if word]
    for place, word in enumerate(words):
        before, rest = words[place - 1] if place else "", words[place + 1 :]
        if _tells(word, before, rest) and not _ABOUT.intersection(rest):
            return True
        if (word, *rest[:1]) in _PAIRS:
            return True
    return False


def _tells(word: str, before: str, rest: list[str]) -> bool:
    if word in _PLURALS:
        return before in _BEFORE_PLURALS
    if word == "key" and before in _OPEN_KEYS:
        return False
    if word in ("key", "token", "pass", "auth") and rest and rest[0] in ("value", "values"):
        # linear_key_value; a token's value is one all the same.
        return word == "token"
    return word in _WORDS or _RUN_TOGETHER.search(word) is not None
