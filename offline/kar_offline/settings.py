"""Owns the options of language models and text encoders: name, unit, default and a sentence.

They come from the command line, from the environment where a setting names a variable, or from a table of the TOML
file, which may also hold the sidecar's settings (`kar_sidecar.settings`). Strongest first: command line, environment,
file, default.

    [llm]        ProviderOptions
    [encoder]    EncoderOptions
"""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from kar_sidecar.errors import InputError

__all__ = [
    "API_KEY_VARIABLE",
    "CommandLine",
    "EncoderOptions",
    "OptionTable",
    "Pooling",
    "ProviderKind",
    "ProviderOptions",
    "Runner",
    "Runtime",
]

API_KEY_VARIABLE: Final = "KAR_LLM_API_KEY"
"""The environment variable with the key of an endpoint; files never hold it."""

ProviderKind = Literal["pack", "openai", "local"]
Runner = Literal["here", "ray"]
Runtime = Literal["onnx", "torch"]
Pooling = Literal["mean", "cls", "last", "weighted"]


class CommandLine(NamedTuple):
    """Spelling of a setting on the command line and in the environment, if its name alone does not determine it."""

    flags: tuple[str, ...] = ()
    """Option names, the first one in the help text; none: `--` and the setting's name."""
    variable: str | None = None
    """Environment variable."""


class OptionTable(BaseModel):
    """Settings that belong together: one table of the TOML file, one frozen object in the code."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    TABLE: ClassVar[str]
    """Name of the table in the TOML file."""

    @classmethod
    def read(cls, file: Path | None = None, **arguments: Any) -> Self:
        """Settings from arguments (None: not given) and from this class's table of a TOML file.

        Other tables and keys of the file are left alone.

        Raises:
            InputError: an unknown key, a value out of range, or no such file.
        """
        in_file = cls._read_table(file) if file is not None else {}
        given = {name: value for name, value in arguments.items() if value is not None}
        try:
            return cls(**{**in_file, **given})
        except ValidationError as error:
            raise InputError(f"wrong options ({cls._faults(error, file)}): correct them") from error

    @classmethod
    def _read_table(cls, file: Path) -> Mapping[str, Any]:
        if not file.is_file():
            raise InputError(f"the settings file {file} does not exist: create it or name another")
        try:
            table = tomllib.loads(file.read_text()).get(cls.TABLE, {})
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"the settings cannot be read ({error}): correct them") from error
        if not isinstance(table, dict):
            raise InputError(f"{cls.TABLE} in {file} is not a table: write [{cls.TABLE}] above its settings")
        if "api_key" in table:
            raise InputError(f"{file} must not hold a key: remove `api_key` and set ${API_KEY_VARIABLE} instead")
        if unknown := sorted(table.keys() - cls.model_fields.keys()):
            raise InputError(
                f"{unknown[0]!r} in [{cls.TABLE}] of {file} is not a setting: remove it or correct its name "
                f"(settings: {', '.join(cls.model_fields)})"
            )
        return table

    @classmethod
    def _faults(cls, error: ValidationError, file: Path | None) -> str:
        """What is wrong with each setting; never the value itself, which may be secret."""
        source = f" in {file}, [{cls.TABLE}], or on the command line" if file else ""
        return "; ".join(f"{'.'.join(map(str, fault['loc']))}{source}: {fault['msg']}" for fault in error.errors())


class ProviderOptions(OptionTable):
    """Chooses and limits the language model, or the pack of released texts, that answers prompts."""

    TABLE = "llm"

    provider: Annotated[ProviderKind, CommandLine(("--llm",))] = Field(
        default="pack",
        description="Source of answers. pack: released texts; openai: any OpenAI-compatible endpoint, key in "
        "$KAR_LLM_API_KEY; local: SmolLM2 in this process, a demonstration (extra local-llm).",
    )
    pack: str = Field(default="ml-100k", description="pack: name or folder of the pack.")
    base_url: Annotated[str | None, CommandLine(variable="KAR_LLM_BASE_URL")] = Field(
        default=None, description="openai: address, such as http://127.0.0.1:8000/v1."
    )
    model: Annotated[str | None, CommandLine(variable="KAR_LLM_MODEL")] = Field(
        default=None, description="openai: the model's name at the endpoint."
    )
    gguf: Path | None = Field(default=None, description="local: a model file in GGUF format; unset: SmolLM2.")
    batch: Annotated[bool, CommandLine(("--batch/--no-batch",))] = Field(
        default=False, description="openai: send batch files (cheaper, slower) instead of single requests."
    )
    parameters: dict[str, Any] | None = Field(
        default=None,
        description="Request parameters, on the command line as JSON; unset: temperature 0, and as many tokens as "
        "the scenario allows.",
    )
    concurrency: int | None = Field(
        default=None, ge=1, description="Number of requests under way at once; unset: 8 for openai, 4 for local."
    )
    timeout_s: float = Field(default=120.0, ge=0.1, description="openai: longest time of one attempt, in seconds.")
    price: tuple[float, float] | None = Field(
        default=None, description="openai: US dollars for a million tokens read, and for a million written."
    )
    budget_usd: float | None = Field(
        default=None,
        ge=0,
        description="Stop before a request that could bring the cost of this run above this many US dollars; unset: "
        "no limit.",
    )
    retries: int | None = Field(
        default=None,
        ge=0,
        description="How often to ask again after an answer fails a check; unset: as the scenario says.",
    )
    runner: Runner = Field(default="here", description="Where requests are made: here, or by Ray actors (extra ray).")
    workers: int = Field(default=2, ge=1, description="ray: number of actors, which share the concurrency.")
    ray_address: str | None = Field(
        default=None, description="ray: address of a running cluster, such as auto; unset: a cluster on this machine."
    )

    @field_validator("parameters", mode="before")
    @classmethod
    def _parse_parameters(cls, value: Any) -> Any:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise ValueError(f"it is not JSON ({error}): give an object in single quotes") from error
        if not (value is None or isinstance(value, dict)):
            raise ValueError("it is not a JSON object: give one such as '{\"temperature\": 0}'")
        return value


class EncoderOptions(OptionTable):
    """Chooses the text encoder and says how it runs."""

    TABLE = "encoder"

    name: Annotated[str, CommandLine(("--encoder",))] = Field(
        default="minilm",
        description="minilm (fast); mpnet (better, a 400 MB download); openai: any OpenAI-compatible embeddings "
        "endpoint, key in $KAR_LLM_API_KEY; or an encoder's folder or hub name.",
    )
    base_url: Annotated[str | None, CommandLine(("--encoder-url", "--base-url"))] = Field(
        default=None, description="openai: address, such as http://127.0.0.1:8000/v1."
    )
    model: Annotated[str | None, CommandLine(("--encoder-model", "--model"))] = Field(
        default=None, description="openai: the model's name at the endpoint."
    )
    chunk_chars: int | None = Field(
        default=None,
        ge=1,
        description="openai: characters that the model takes at once; longer texts are cut and their vectors averaged; "
        "unset: 1500.",
    )
    concurrency: int | None = Field(
        default=None, ge=1, description="openai: number of requests under way at once; unset: 8."
    )
    runtime: Runtime = Field(
        default="onnx",
        description="Not openai: what runs the model; vectors are the same. torch runs some models that onnx cannot.",
    )
    pooling: Pooling | None = Field(
        default=None,
        description="Not openai: how token vectors are combined into one; unset: as the encoder was trained.",
    )
    threads: int | None = Field(
        default=None, ge=1, description="Not openai: cores to use; unset: all cores, or one on Ray."
    )
    runner: Runner = Field(default="here", description="Where texts are encoded: here, or by Ray Data (extra ray).")
    workers: int = Field(default=2, ge=1, description="ray: number of actors.")
    ray_address: str | None = Field(
        default=None, description="ray: address of a running cluster, such as auto; unset: a cluster on this machine."
    )
