"""Canaries that no way out may show: names, spellings, short values, forms, and each exit without Ray."""

from __future__ import annotations

import base64
import copy
import html
import io
import json
import logging
import os
import pickle
import time
import traceback
import urllib.parse
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from raydata_llm import EngineProcessorConfig, ResumeConfig
from raydata_llm.dispatch_plan import ReplicaPlan
from raydata_llm.engine.request import Request
from raydata_llm.engine.sampling_params import SamplingParams
from raydata_llm.finish import FinishPlan
from raydata_llm.job_report import JobReport, JobSettings
from raydata_llm.job_stats import ErrorKind, Snapshot, Totals
from raydata_llm.job_timeline import Timeline
from raydata_llm.prepare_plan import PreparePlan
from raydata_llm.redaction import MASK, is_telling, mask_error, masked_errors, masked_logger, redact, secret_values
from raydata_llm.row_payload import abbreviate, describe_failure, row_error

PLAIN = "Quokka-Secret-7731Zq"
ODD = "ca p@s/s\"w'ö&<\\%+nary,7731 x€"

TELLING = """
    HF_TOKEN AWS_SESSION_TOKEN AZURE_STORAGE_SAS DB_PWD api_key OPENAI_KEY DB_PASS GITHUB_PAT OPENAI_API_KEY
    AWS_SECRET_ACCESS_KEY AWS_ACCESS_KEY_ID AZURE_STORAGE_ACCOUNT_KEY AZURE_STORAGE_CONNECTION_STRING
    MY_PASSWORD DB_PASSWD PGPASSWORD MYSQL_PWD SSHPASS REDISCLI_AUTH PROXY_AUTH SESSION_COOKIE X-Amz-Signature
    X-Amz-Credential sig sas_token accessKey secretKey authToken apiKey Authorization x-api-key API_KEYS
    AUTH_TOKENS KEY TOKEN PASS SECRET PAT AccountKey SharedAccessSignature SENTRY_DSN SLACK_WEBHOOK_URL
    CLIENT_SECRET_1 GOOGLE_APPLICATION_CREDENTIALS WANDB_API_KEY HFTOKEN PRIVATE_KEY_PEM TOKEN_2 KEY2 password
    PASSPHRASE BASIC_AUTH ANTHROPIC_KEY DJANGO_SECRET_KEY JWT_SIGNING_KEY dbpass connectionString CONN_STR
    NPM_AUTH_TOKEN DOCKER_AUTH_CONFIG
""".split()  # noqa: SIM905
PLAIN_NAMES = """
    PWD OLDPWD TOKENIZERS_PARALLELISM MAX_TOKENS RAY_SASH HOME PATH PYTHONPATH KEYBOARD MONKEY num_input_tokens
    PASSED max_tokens RAY_AUTH_MODE SSH_AUTH_SOCK key_column TOKEN_FILE AWS_WEB_IDENTITY_TOKEN_FILE COMPASS
    BYPASS HOTKEY PATTERN SIGTERM KEYRING_BACKEND XAUTHORITY AUTHOR tokenize tokenizer tokenize_stage detokenize
    tokens keys PRIMARY_KEY PUBLIC_KEY pass_rate generated_tokens num_key_value_heads max_num_batched_tokens
    PASSIVE OMP_WAIT_POLICY SECRETARY signature_version skip_special_tokens skip_tokenizer_init sigma
    include_stop_str_in_output
""".split()  # noqa: SIM905


@pytest.mark.parametrize("name", TELLING)
def test_names_that_tell(name: str) -> None:
    assert is_telling(name)


@pytest.mark.parametrize("name", PLAIN_NAMES)
def test_names_that_do_not_tell(name: str) -> None:
    assert not is_telling(name)


def escapes(value: str, form: str) -> str:
    return "".join(form.format(ord(character)) for character in value)


SPELLINGS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "JSON": json.dumps,
    "JSON in JSON": lambda value: json.dumps(json.dumps(value)),
    "JSON with its letters": lambda value: json.dumps(value, ensure_ascii=False),
    "repr": repr,
    "repr of a repr": lambda value: repr(repr(value)),
    "ascii": ascii,
    "repr of bytes": lambda value: repr(value.encode()),
    "quote": urllib.parse.quote,
    "quote, slashes too": lambda value: urllib.parse.quote(value, safe=""),
    "quote_plus": urllib.parse.quote_plus,
    "quoted twice": lambda value: urllib.parse.quote(urllib.parse.quote(value)),
    "HTML": html.escape,
    "HTML of JSON": lambda value: html.escape(json.dumps(value)),
    "HTML by numbers": lambda value: escapes(value, "&#{};"),
    "hex": lambda value: value.encode().hex(),
    "HEX": lambda value: value.encode().hex().upper(),
    "hex by bytes": lambda value: value.encode().hex(" "),
    "unicode escapes": lambda value: escapes(value, "\\u{:04x}"),
    "percent escapes": lambda value: "".join(f"%{byte:02x}" for byte in value.encode()),
    "two lines": lambda value: f"{value[:7]}\n    {value[7:]}",
    "two lines, in repr": lambda value: repr(f"{value[:7]}\n{value[7:]}"),
    "base64": lambda value: base64.b64encode(value.encode()).decode(),
    "base64 for addresses": lambda value: base64.urlsafe_b64encode(value.encode()).decode(),
    "base64 without padding": lambda value: base64.b64encode(value.encode()).decode().rstrip("="),
    "base64, quoted": lambda value: urllib.parse.quote(base64.b64encode(value.encode()).decode(), safe=""),
    "base64 at the second place": lambda value: base64.b64encode(b"u" + value.encode() + b"xyz").decode(),
    "base64 at the third place": lambda value: base64.b64encode(b"u:" + value.encode() + b"xy").decode(),
    "base64 in lines, in repr": lambda value: repr(base64.encodebytes(value.encode() * 3)),
    "cut": lambda value: f"{value[:-3]}...",
    "cut in the middle": lambda value: f"{value[:9]}...{value[-8:]}",
}


def gives_away(text: str, value: str) -> bool:
    """Whether six characters of a value, in a row, are in a text, plain or in base64."""
    code = base64.b64encode(value.encode()).decode()
    return any(one[at : at + 6] in text for one in (value, code) for at in range(len(one) - 5))


@pytest.mark.parametrize("value", [PLAIN, ODD], ids=["plain", "odd"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_values_are_masked_however_they_are_written(value: str, spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"it said: {SPELLINGS[spelling](value)} and no more"
    assert redact(text) == text, "without the variable this is plain text"
    monkeypatch.setenv("DB_PASS", value)
    masked = redact(text)
    assert masked.startswith("it said: ") and masked.endswith(" and no more")
    assert MASK in masked and not gives_away(masked, value)


def test_a_value_is_masked_where_the_text_ends_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_PAT", PLAIN)
    assert redact(f"refused {PLAIN[:11]}") == f"refused {MASK}"
    assert redact(f"{PLAIN[-8:]} refused") == f"{MASK} refused"


@pytest.mark.parametrize("value", ["s3cr", "aB3$", "hunter2", "qwzx", "4711", "rösl"])
def test_short_values_are_masked_as_words(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASS", value)
    for text in ("{} refused", "login with {}", "'{}'", "user:{}.", '{{"p": "{}"}}'):
        assert value not in redact(text.format(value))
    if len(value) < 6:
        assert redact(f"x{value}y") == f"x{value}y", "part of another word"


@pytest.mark.parametrize("value", ["1", "true", "True", "none", "", "no", "disabled", "abc", "***"])
def test_values_that_say_nothing_mask_nothing(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_TOKEN", value)
    text = "1 of 1 is true, True, none, no, disabled, abc or '***'"
    assert redact(text) == text
    assert redact("password=abc and pin") == f"password={MASK} and pin", "behind a name that tells, any value is one"


def test_parts_of_a_value_are_masked_too() -> None:
    pem = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0B\nAQEFAASCBKcwggSjAgEAAoIB\n-----END PRIVATE KEY-----"
    found = secret_values(
        {
            "SERVICE_CREDENTIALS": json.dumps({"type": "service", "private_key": pem, "id": "not-this-one"}),
            "API_AUTH": "Bearer canary-token-1",
            "API_KEYS": "canary-key-number-1,canary-key-number-2",
            "STORAGE_CONNECTION_STRING": "AccountName=me;AccountKey=canaryAccount==;EndpointSuffix=core",
            "DATABASE_URL": "postgres://user:canary%40address@db:5432/x",
            "HOMEPAGE": "https://example.org/a",
        }
    )
    assert {"canary-token-1", "canary-key-number-1", "canary-key-number-2", "canaryAccount=="} <= set(found)
    assert {"canary%40address", "canary@address", "MIIEvQIBADANBgkqhkiG9w0B"} <= set(found)
    assert "not-this-one" not in found and "https://example.org/a" not in found


ADDRESSES = [
    "http://user:p@{}@host",
    "http://user:a/{}@host/path",
    "http://user:p#{}@host",
    "http://user:p?{}@host:80/x",
    "http://user:pa'{}@host",
    "http://{}@host",
    "http://user:{}@[::1]:80/x",
    "postgres://u:a%40{}@h/db",
    "http:\\/\\/user:{}@host",
    "x?url=http%3A%2F%2Fuser%3A{}%40host&b=1",
    "https://h/x?X-Amz-Signature={}&y=2",
    "https://h/?sig={}",
    "https://h/?token={}",
    "https://h/cb#access_token={}&x=1",
    "x%3Fsig%3D{}",
    "DefaultEndpointsProtocol=https;AccountName=a;AccountKey={}==;EndpointSuffix=x",
]
FORMS = [
    "Authorization: Bearer {}",
    "Authorization: Digest username=me, realm={}",
    "Cookie: a=b; session={}",
    "x-api-key: {}",
    "{{'Authorization': 'Bearer {}'}}",
    '{{"api_key": "{}"}}',
    '{{\\"api_key\\": \\"{}\\"}}',
    "password={}",
    "DB_PASSWORD: {}",
    "--api-key={}",
    "--password {}",
    "PGPASSWORD='{}' psql",
]


@pytest.mark.parametrize("form", [*ADDRESSES, *FORMS])
def test_what_stands_where_secrets_stand_is_masked(form: str) -> None:
    masked = redact(f"it said {form.format('S3CR-zq')}")
    assert "S3CR" not in masked and "zq" not in masked and MASK in masked


@pytest.mark.parametrize(
    "token",
    [
        "AKIAIOSFODNN7EXAMPLE",
        "ghp_16C7e42F292c6912E7710c838347Ae178B4a",
        "github_pat_11ABCDEFG0123456789_abcdefghij",
        "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH",
        "sk-proj-abc123def456ghi789jkl",
        "xoxb-123456789012-abcdefghij",
        "AIzaSyA1234567890abcdefghijklmnopqrstuv",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N",
        "glpat-abcdefghij0123456789",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA\nabc\n-----END RSA PRIVATE KEY-----",
        "-----BEGIN PRIVATE KEY-----\nMIIEpAIBAAKCAQEA (cut",
    ],
)
def test_tokens_of_well_known_form_are_masked(token: str) -> None:
    assert redact(f"it said {token}") == f"it said {MASK}"


@pytest.mark.parametrize(
    "text",
    [
        "http://localhost:9000/bucket/model@main",
        "hf://org/model@main",
        "s3://bucket/a:b/c@d",
        "http://[::1]:9000/x@main",
        "mail me@example.org",
        "ValueError: key_column='id' is not valid: give a name",
        "KeyError: 'prompt'; the row has id, key, token",
        "max_tokens=5 stop_token_ids=[1,2] key=3 skip_tokenizer_init=True api_key=None",
        "check the credentials (for S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY; for Google: x)",
        "task-1234567890abcdefghij sk-learn hf_overrides={'a': 1} sorted(rows, key=len)",
        "a Bearer of bad news; basic authentication is off",
        "ValueError: the prompt has 300 tokens and max_model_len=200 leaves no room (engine)",
        "password=***",
    ],
)
def test_plain_text_stays(text: str) -> None:
    assert redact(text) == text


def test_masking_a_long_text_takes_no_long_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(10):
        monkeypatch.setenv(f"SERVICE_{number}_KEY", f"{PLAIN}-{number}")
    for text in ("a" * 20_000, "://" * 7_000, "=" * 20_000, "x=%41\\" * 4_000, "'a': '" * 3_000, "AB_C: " * 3_000):
        redact(text)
        began = time.process_time()
        redact(text)
        assert time.process_time() - began < 3.0, text[:10]


# Exits


@pytest.fixture
def canary(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("OPENAI_KEY", PLAIN)
    return PLAIN


def failing(canary: str) -> Exception:
    """An error with a canary in its causes, its attributes and its text."""
    try:
        try:
            raise OSError(13, f"refused {canary}", f"/tmp/{canary}")
        except OSError as error:
            error.add_note(f"noted {canary}")
            raise KeyError(f"no {canary}") from error
    except KeyError as error:
        return error


def test_a_rows_error_and_its_exception(canary: str) -> None:
    cause = describe_failure(failing(canary), "preprocess", ("id",))
    assert cause.startswith("KeyError: ") and cause.endswith("(preprocess)") and not gives_away(cause, canary)
    long = describe_failure(ValueError("x" * 50_000 + canary + "y" * 50_000), "postprocess")
    assert len(long) < 25_000 and not gives_away(long, canary)
    stopped = str(row_error({"prompt": f"{'x' * 40}{canary}{'y' * 90}", "n": 3, "a": [f"{canary}"]}, f"E: {canary}"))
    assert not gives_away(stopped, canary) and "'n': 3" in stopped


@pytest.mark.parametrize("before", range(30, 64))
def test_a_value_that_is_cut_shows_no_half(before: int, canary: str) -> None:
    class Shown:
        def __repr__(self) -> str:
            return f"Shown({'x' * before}{canary}{'y' * 90})"

    text = abbreviate({"a": f"{'x' * before}{canary}{'y' * 90}", "b": Shown(), "c": f"{'x' * before}{canary}".encode()})
    assert not gives_away(text, canary)


def test_exceptions_lose_them_in_causes_and_tracebacks_and_keep_their_kind(canary: str) -> None:
    with pytest.raises(KeyError) as caught, masked_errors():
        raise failing(canary)
    text = "".join(traceback.format_exception(caught.value))
    assert not gives_away(text, canary) and "PermissionError" in text and "Errno 13" in text
    plain = ValueError("nothing here")
    assert mask_error(plain) is plain


def test_exceptions_that_cannot_be_changed_are_replaced(canary: str) -> None:
    class Fixed(ValueError):
        def __str__(self) -> str:
            return f"fixed {canary}"

    with pytest.raises(ValueError, match="Fixed: fixed ") as caught, masked_errors():
        raise Fixed
    assert not gives_away("".join(traceback.format_exception(caught.value)), canary)


def test_log_lines(canary: str) -> None:
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    logger = masked_logger("raydata_llm.tests.secrets")
    logger.addHandler(handler)
    logger.warning("refused %s by %d", canary, 3)
    try:
        raise failing(canary)
    except KeyError:
        logger.exception("it failed")
    assert "by 3" in out.getvalue() and "KeyError" in out.getvalue() and not gives_away(out.getvalue(), canary)


def test_all_loggers_of_ours_mask_their_lines() -> None:
    import raydata_llm.dispatcher
    import raydata_llm.finish
    import raydata_llm.job_run
    import raydata_llm.sink_writer  # noqa: F401

    ours = [name for name in logging.root.manager.loggerDict if name.startswith("raydata_llm.")]
    found = [name for name in ours if isinstance(logging.root.manager.loggerDict[name], logging.Logger)]
    assert "raydata_llm.finish" in found
    assert [name for name in found if not logging.getLogger(name).filters and name != "raydata_llm.phase"] == []


def test_the_report_in_all_its_forms(canary: str) -> None:
    worker = "worker-Secret-9917Xv"
    code = base64.b64encode(worker.encode()).decode()
    snapshot = Snapshot(
        seconds=1.0,
        totals=Totals(),
        errors={"ValueError (engine)": ErrorKind(2, f"ValueError: {canary} {worker} {code} {json.dumps(ODD)}")},
        replicas={},
        timeline=Timeline(),
        first_row_seconds=None,
        last_row_seconds=None,
    )
    settings = JobSettings(
        model=f"s3://k:{canary}@b", shown={"engine_kwargs": {"x": canary, "api_key": "q"}}, secrets=[worker, ODD]
    )
    report = JobReport.of(
        settings, snapshot, job_id="j", status="failed", error=f"RowError: {worker}", started_at=0.0, ended_at=1.0
    )
    for shown in (report.to_json(), report.to_html(), str(report), repr(report), repr(settings)):
        for value in (canary, worker, ODD):
            assert not gives_away(shown.replace(repr(settings), ""), value)


def test_a_config_shows_no_value_of_its_environment_and_keeps_them() -> None:
    given: dict[str, Any] = {
        "model_source": f"s3://id:{PLAIN}@bucket/model",
        "runtime_env": {"env_vars": {"MODE": f"{PLAIN}-mode", "HF_TOKEN": PLAIN}, "pip": ["x"]},
        "chat_template_stage": {"runtime_env": {"env_vars": {"A": PLAIN}}},
        "resume": ResumeConfig(f"s3://id:{PLAIN}@bucket/out"),
    }
    config = EngineProcessorConfig(**given)
    dumped = config.model_dump()
    shown = [repr(config), str(config), config.model_dump_json(), json.dumps(config.model_dump(mode="json"))]
    shown += [repr(dumped["runtime_env"]), repr(dumped["chat_template_stage"]), repr(config.runtime_env)]
    for text in shown:
        assert not gives_away(text, PLAIN)
    assert '"HF_TOKEN":"***"' in config.model_dump_json()
    # What a user does with a config still works: make it again, copy it, send it to a worker.
    again = EngineProcessorConfig(**{name: value for name, value in dumped.items() if value is not None})
    for same in (again, copy.deepcopy(config), config.model_copy(), pickle.loads(pickle.dumps(config))):
        assert same.runtime_env == given["runtime_env"] and same == config
    with pytest.raises(ValueError, match=r"env_vars\['MODE'\]='\*\*\*' is a masked value"):
        EngineProcessorConfig(model_source="m", runtime_env=json.loads(config.model_dump_json())["runtime_env"])


@pytest.mark.parametrize("make", [EngineProcessorConfig, EngineProcessorConfig.model_validate])
def test_a_wrong_config_shows_no_value(make: Any, canary: str) -> None:
    wrong: dict[str, Any] = {
        "model_source": "m",
        "runtime_env": canary,
        "api_key": "unknown-to-us",
        "concurrency": canary,
    }
    with pytest.raises(ValueError) as caught:
        make(**wrong) if make is EngineProcessorConfig else make(wrong)
    assert not gives_away(str(caught.value), canary) and "unknown-to-us" not in str(caught.value)


def test_plans_that_ray_prints_show_nothing() -> None:
    bound: Mapping[str, Any] = {"token": PLAIN}
    plans = [
        PreparePlan(model_source="m", chat_template_kwargs=bound),
        FinishPlan(model_source="m"),
        ReplicaPlan(
            model_source="m",
            engine_kwargs=bound,
            actor_options={"runtime_env": {"env_vars": {"A": PLAIN}}},
            max_pending_rows=None,
            hang_timeout_s=1.0,
            engine_factory=lambda source, kwargs: (None, {}),  # type: ignore[arg-type, return-value]
        ),
    ]
    assert not any(gives_away(repr(plan), PLAIN) for plan in plans)


def test_errors_of_the_engine(canary: str) -> None:
    request = Request(request_id="0", prompt_token_ids=[1], sampling_params=SamplingParams(), key=0)
    assert not gives_away(str(request.refused(f"ValueError: {canary}").error), canary)


def test_what_is_masked_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_PAT", "first-Value-1")
    assert redact("first-Value-1 second-Value-2") == f"{MASK} second-Value-2"
    monkeypatch.setenv("SOME_PAT", "second-Value-2")
    assert redact("first-Value-1 second-Value-2") == f"first-Value-1 {MASK}"
    os.environ.pop("SOME_PAT")
    assert redact("first-Value-1 second-Value-2") == "first-Value-1 second-Value-2"


def test_warnings_of_ours_go_through_the_log() -> None:
    """`warnings.warn` would print its text as it is: nothing of ours calls it."""
    import raydata_llm

    folder = os.path.dirname(raydata_llm.__file__)
    found = []
    for room in ("", "engine", "cluster", "kernels"):
        for entry in os.scandir(os.path.join(folder, room)):
            if entry.name.endswith(".py"):
                with open(entry.path) as file:
                    found += [entry.path] if "warnings.warn(" in file.read() else []
    assert found == [] and warnings is not None
