"""Credentials that must not be seen, and plain text that must stay."""

from __future__ import annotations

import copy
import json
import traceback

import pytest

from raydata_llm.redaction import (
    MASK,
    hide_environment,
    is_telling,
    mask_environment,
    mask_error,
    redact,
    redact_tree,
    secret_values,
)

CANARY = "canary-Secret-7731"


@pytest.mark.parametrize(
    "text",
    [
        f"s3://AKIAEXAMPLE:{CANARY}@bucket/model",
        f"https://acc.blob.core.windows.net/c/x?sv=2024&sig={CANARY}",
        f"Cannot parse URI: 's3://AKIAEXAMPLE:wJalr/{CANARY}/K7@bucket/model' due to syntax error",
        f"s3://bucket/x?access_key={CANARY}&region=eu-west-1",
        f"https://bucket.s3.amazonaws.com/x?X-Amz-Signature={CANARY}",
        f"gs://b?X-Goog-Credential={CANARY}",
        f"refused by 'https://user:{CANARY}@proxy:8080/' (403)",
    ],
)
def test_addresses_lose_their_secrets(text: str) -> None:
    assert CANARY not in redact(text) and MASK in redact(text)


def test_values_of_telling_variables_are_masked_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AZURE_STORAGE_ACCOUNT_KEY", "MY_PASSWORD", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, f"{CANARY}-{name}")
        assert redact(f"signature with {CANARY}-{name} failed") == f"signature with {MASK} failed"
    given = secret_values({"DB_PASSWD": "hunter2hunter2", "MODE": "login"})
    assert redact("login hunter2hunter2", given) == f"login {MASK}"
    assert redact("login hunter2hunter2") == "login hunter2hunter2"


@pytest.mark.parametrize(
    "text",
    [
        "ValueError: the prompt has 300 tokens and max_model_len=200 leaves no room",
        "s3://bucket/folder?region=eu-west-1&endpoint_override=127.0.0.1:9000",
        "hf://org/model@main",
        "http://localhost:9000/bucket/model@main",
        "s3://bucket/a:b/c@d",
        "mail me@example.org",
    ],
)
def test_plain_text_stays(text: str) -> None:
    assert redact(text) == text


def test_short_values_are_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("USE_TOKEN", "1")
    assert redact("1 of 1 is false") == "1 of 1 is false"


def test_nested_values_are_masked_by_name_and_by_content() -> None:
    given = {"headers": {"api_key": CANARY}, "max_tokens": 5, "list": [f"s3://k:{CANARY}@b"], "flag": True}
    assert redact_tree(given) == {
        "headers": {"api_key": MASK},
        "max_tokens": 5,
        "list": [f"s3://{MASK}@b"],
        "flag": True,
    }


def test_what_lies_below_a_telling_name_is_masked_whole() -> None:
    given = {"credentials": {"user": "me", "keys": [CANARY, 3]}, "api_key": CANARY.encode(), "stop_token_ids": [1, 2]}
    shown = {"credentials": {"user": MASK, "keys": [MASK, 3]}, "api_key": MASK, "stop_token_ids": [1, 2]}
    assert redact_tree(given) == shown


def test_a_runtime_env_shows_names_alone() -> None:
    shown = mask_environment({"env_vars": {"AWS_SECRET_ACCESS_KEY": CANARY, "MODE": "x"}, "pip": ["a"]})
    assert shown == {"env_vars": {"AWS_SECRET_ACCESS_KEY": MASK, "MODE": MASK}, "pip": ["a"]}
    assert mask_environment(None) is None


def test_a_runtime_env_can_be_used_and_not_read_in_a_log() -> None:
    given = hide_environment({"pip": ["x"], "env_vars": {"MY_PASSWORD": CANARY}})
    for shown in (repr(given), str(given), f"{given}", repr(copy.deepcopy(given))):
        assert CANARY not in shown and "MY_PASSWORD" in shown and "pip" in shown
    assert json.loads(json.dumps(given)) == {"pip": ["x"], "env_vars": {"MY_PASSWORD": CANARY}}
    assert hide_environment({"pip": ["x"]}) == {"pip": ["x"]}


@pytest.mark.parametrize(
    ("name", "telling"),
    [
        *((name, True) for name in ("HF_TOKEN", "AWS_SESSION_TOKEN", "AZURE_STORAGE_SAS", "DB_PWD", "api_key")),
        *((name, False) for name in ("PWD", "OLDPWD", "TOKENIZERS_PARALLELISM", "MAX_TOKENS", "RAY_SASH", "HOME")),
    ],
)
def test_names_tell_what_is_a_credential(name: str, telling: bool) -> None:
    assert is_telling(name) is telling


def test_paths_in_the_working_directory_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWD", "/work/project")
    assert redact("/work/project/.demo/model.gguf") == "/work/project/.demo/model.gguf"


def test_half_characters_leave_as_escapes_that_have_bytes() -> None:
    error = ValueError("bad \ud800 text")
    error.__cause__ = RuntimeError("é \udfff")
    left = mask_error(error)
    assert isinstance(left, ValueError) and str(left) == r"bad \ud800 text"
    # Ray's workers encode this, and die where they cannot.
    assert rb"\udfff" in "".join(traceback.format_exception(left)).encode()
