"""What all our configs are: frozen, without unknown fields, and wrong in one line.

Owns the wording of mistakes (field, value, remedy) and what of a config may be shown. Knows no field.
Invariant: neither a message nor a repr holds a credential.
"""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Annotated, Any, NoReturn, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from raydata_llm.engine.known_names import nearest
from raydata_llm.redaction import mask_environment, redact, redact_tree, shown


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


class ConfigModel(BaseModel):
    """A frozen model without unknown fields, whose mistakes are plain one-line `ValueError`s."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())

    if not TYPE_CHECKING:  # type checkers keep the signatures that pydantic derives from the fields

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise ValueError(_describe(type(self), error)) from None

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

    def __repr_args__(self) -> Any:
        for name, value in super().__repr_args__():
            yield name, mask_environment(value) if name == "runtime_env" else redact_tree(value)


def _brief(field: str, value: Any) -> str:
    # A number may have thousands of digits.
    text = shown(field, value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _describe(config: type[BaseModel], error: ValidationError) -> str:
    return redact("; ".join(_describe_one(config, detail) for detail in error.errors()))


def _describe_one(config: type[BaseModel], detail: Any) -> str:
    field = ".".join(str(part) for part in detail["loc"][:1])
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
