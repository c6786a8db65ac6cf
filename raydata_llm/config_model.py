"""What all our configs are: frozen, without unknown fields, and wrong in one line.

Owns the wording of mistakes (field, value, remedy) and what of a config may be shown. Knows no field.
Invariant: no message, repr or JSON holds a credential. `model_dump()` and pickles hold what the user gave, as a config
is made again of them; the variables of a `runtime_env` do not show their values there.
"""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Annotated, Any, NoReturn, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from raydata_llm.engine.known_names import nearest
from raydata_llm.redaction import MASK, hide_environment, redact, redact_entry, redact_tree, shown

_ERROR_TYPE = "config_error"


def _no_flag(value: Any) -> Any:
    """A number, or text that says one, as YAML reads 1e9; True is 1 in Python, and none here."""
    if isinstance(value, bool):
        raise ValueError(f"{value} is given where a number is asked for: give a number")
    return value


# Far above what any job needs: what is above is a slip of the finger. Seconds: 30 years; bytes: of the largest store.
_LONGEST_VALUE = 120
MOST_COUNT, MOST_SECONDS, MOST_AMOUNT = 1_000_000, 1e9, 2.0**60
_Number = Annotated[float, BeforeValidator(_no_flag), Field(allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(strict=True, ge=1, le=MOST_COUNT)]
PositiveNumber = Annotated[_Number, Field(gt=0, le=MOST_AMOUNT)]
Seconds = Annotated[_Number, Field(gt=0, le=MOST_SECONDS)]
Share = Annotated[_Number, Field(ge=0, le=MOST_AMOUNT)]
Fraction = Annotated[_Number, Field(ge=0, le=1)]
Flag = Annotated[bool, Field(strict=True)]


if TYPE_CHECKING:

    class ConfigError(ValueError):
        """A mistake in a config, in one line; where pydantic lets it, a `pydantic.ValidationError` too."""

        told: str
else:
    try:

        class ConfigError(ValidationError):
            """A mistake in a config, in one line; a `ValueError`, and a `pydantic.ValidationError` as Ray's."""

            told = ""

            def __str__(self) -> str:
                return self.told

            def __repr__(self) -> str:
                return f"ConfigError({self.told!r})"

            def __reduce__(self) -> Any:
                return config_error, (self.title, self.told)

    except TypeError:  # an older pydantic, whose errors none can be derived from

        class ConfigError(ValueError):
            """A mistake in a config, in one line."""


def config_error(config: type[BaseModel] | str, told: str) -> ValueError:
    """The error of a config's mistakes, which are told in one line.

    Args:
        config: The config's class, or its name.
    """
    if not issubclass(ConfigError, ValidationError):
        return ConfigError(told)
    title = config if isinstance(config, str) else config.__name__
    wrong = InitErrorDetails(type=PydanticCustomError(_ERROR_TYPE, "{told}", {"told": told}), loc=(), input=None)
    kind: Any = ConfigError
    error = kind.from_exception_data(title, [wrong], hide_input=True)
    error.told = told
    made: ValueError = error
    return made


class ConfigModel(BaseModel):
    """A frozen model without unknown fields, whose mistakes are plain one-line `ValueError`s (`ConfigError`s)."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), hide_input_in_errors=True
    )

    if not TYPE_CHECKING:  # type checkers keep the signatures that pydantic derives from the fields

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise config_error(type(self), _describe(type(self), error)) from None

        def __setattr__(self, name: str, value: Any) -> NoReturn:
            raise ValueError(
                f"{type(self).__name__} cannot be changed: make another one, with {name}={shown(name, value)} "
                "among its arguments"
            )

    @classmethod
    def parse_yaml(cls, file: IO[str] | IO[bytes] | str | bytes, **kwargs: Any) -> Self:
        """The config in a YAML text or open file.

        Args:
            file: What `yaml.load` reads.
            kwargs: Of `yaml.load`; the loader is the safe one.
        """
        import yaml

        values = yaml.load(file, **{"Loader": yaml.SafeLoader, **kwargs})
        if not isinstance(values, dict):
            raise ValueError(
                f"{cls.__name__}: the YAML is a {type(values).__name__}: give a mapping of fields to values"
            )
        return cls(**values)

    @classmethod
    def from_file(cls, path: str, **kwargs: Any) -> Self:
        """The config in a local YAML file."""
        with open(path) as file:
            return cls.parse_yaml(file, **kwargs)

    @field_validator("runtime_env", mode="after", check_fields=False)
    @classmethod
    def _hide_environment(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is None:
            return None
        variables = value.get("env_vars")
        for name, given in variables.items() if isinstance(variables, dict) else ():
            if given == MASK:
                raise ValueError(
                    f"runtime_env: env_vars[{name!r}]={MASK!r} is a masked value, as JSON of a config has it: give the "
                    "value itself, or set the variable where the nodes start"
                )
        return hide_environment(value)

    @model_serializer(mode="wrap")
    def _serialize(self, serialize: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        values: dict[str, Any] = serialize(self)
        return dict(redact_tree(values)) if info.mode == "json" else values

    def model_dump(self, **options: Any) -> dict[str, Any]:
        """The fields, to make a config of again: variables of a `runtime_env` are there, and do not show their values.

        `mode="json"`, as `model_dump_json()`, masks credentials.
        """
        values = super().model_dump(**options)
        return values if options.get("mode") == "json" else _with_hidden(values)

    def __repr_args__(self) -> Any:
        for name, value in super().__repr_args__():
            yield name, redact_entry(str(name), value)


def _with_hidden(values: dict[str, Any]) -> dict[str, Any]:
    """Fields of a config, and of those in it, with hidden environments: pydantic makes plain dicts of them."""
    for name, value in values.items():
        if isinstance(value, dict):
            values[name] = hide_environment(value) if name == "runtime_env" else value
            if name.endswith("_stage"):
                _with_hidden(value)
    return values


def _brief(field: str, value: Any) -> str:
    # A number may have thousands of digits.
    text = shown(field, value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _describe(config: type[BaseModel], error: ValidationError) -> str:
    return redact("; ".join(_describe_one(config, detail) for detail in error.errors()))


def _describe_one(config: type[BaseModel], detail: Any) -> str:
    field = ".".join(str(part) for part in detail["loc"][:1])
    if detail["type"] == _ERROR_TYPE:  # a config's within this one
        return f"{config.__name__}: {detail['msg']}"
    if detail["type"] == "value_error":
        told = str(detail["ctx"]["error"])
        return f"{config.__name__}: {told if '=' in told else f'{field}: {told}'}"
    if detail["type"] == "missing":
        return f"{config.__name__}: {field} is missing: give {field}=..."
    if detail["type"] == "extra_forbidden":
        hint = nearest(field, config.model_fields)
        return f"{config.__name__}: {field}={shown(field, detail['input'])} is not a setting: {hint}"
    remedy = str(detail["msg"])
    return f"{config.__name__}: {field}={_brief(field, detail['input'])} is not valid: {remedy[:1].lower()}{remedy[1:]}"
