"""Owns the settings of the sidecar: for each its name, unit, default and one sentence; read once at start-up.

Strongest first: command line, environment (`KAR_GRPC_PORT`, `KAR_EXPERIMENT__COVERAGE`), TOML file, default.
"""

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from kar_sidecar.errors import InputError
from kar_sidecar.experiments.assignment import ARMS, Experiment
from kar_sidecar.releases.serving_view import Mode
from kar_sidecar.store.cluster import PASSWORD, AerospikeSettings

__all__ = ["ExperimentSettings", "Settings"]

PREFIX: Final = "KAR_"
VARIABLES_OF_OTHERS: Final = frozenset({PASSWORD, "KAR_CACHE", "KAR_LLM_API_KEY", "KAR_LLM_BASE_URL", "KAR_LLM_MODEL"})
"""Variables with our prefix that other parts of the product read."""
OFFLINE_TABLES: Final = frozenset({"llm", "encoder"})
"""Tables of the TOML file that the offline commands read."""

Milliseconds = Annotated[float, Field(gt=0)]
Port = Annotated[int, Field(ge=0, le=65535)]


class ExperimentSettings(BaseModel):
    """The experiment that assigns users to the model with or without knowledge."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str = Field(
        default="knowledge", min_length=1, description="Name of the experiment; a request that forces an arm sends it."
    )
    seed: str = Field(default="knowledge", description="Seed of the hash; a new seed assigns all users anew.")
    coverage: float = Field(
        default=1.0, ge=0, le=1, description="Share of users in the experiment; all others get the first arm."
    )
    weights: tuple[float, ...] | None = Field(
        default=None, description="Share of each arm, summing to 1; unset: equal."
    )
    arms: tuple[str, ...] = Field(
        default=ARMS, description="Arms, the default arm first: control and knowledge, or one of them."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.arms or len(set(self.arms)) != len(self.arms) or not set(self.arms) <= set(ARMS):
            raise ValueError(f"arms must be one or both of {', '.join(ARMS)}")
        if self.weights is not None and (
            len(self.weights) != len(self.arms) or min(self.weights) < 0 or not 0.99 <= sum(self.weights) <= 1.01
        ):
            raise ValueError("weights must be one non-negative share per arm and sum to 1")
        return self

    def build(self) -> Experiment:
        """The experiment with these settings."""
        return Experiment(self.key, self.seed, self.coverage, self.weights, self.arms)


class _SidecarTables(TomlConfigSettingsSource):
    """The TOML file without the tables of the offline commands."""

    def __call__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__call__().items() if name not in OFFLINE_TABLES}


class Settings(BaseSettings):
    """All settings of one sidecar process. Construct with `Settings.read`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True)

    host: str = Field(default="127.0.0.1", description="Address to listen on, without TLS: keep it private.")
    grpc_port: Port = Field(default=8500, description="Port of the gRPC services; 0: any free one.")
    metrics_port: Port = Field(default=8502, description="Port of the Prometheus metrics; 0: any free one.")
    work: Path = Field(
        default=Path("var/demo"), description="Work folder; by default it contains `releases`, `store` and `index`."
    )
    releases: Path = Field(
        default_factory=lambda values: values.get("work", Path()) / "releases",
        description="Folder that contains the releases.",
    )
    store: str = Field(
        default_factory=lambda values: f"lmdb:{values.get('work', Path()) / 'store'}",
        description="Store: `lmdb:PATH` or `aerospike:HOST:PORT[,HOST:PORT]/NAMESPACE/SET`.",
    )
    aerospike: AerospikeSettings = Field(
        default=AerospikeSettings(), description="Connection and limits of an Aerospike store."
    )
    index: Path = Field(
        default_factory=lambda values: values.get("work", Path()) / "index",
        description="Folder that contains the index snapshots.",
    )
    triton_address: str = Field(default="127.0.0.1:8001", description="gRPC address of the Triton Inference Server.")
    mode: Mode = Field(
        default="prestored",
        description="`prestored`: read adapted vectors; `encoded`: read encoded vectors, run the adaptor in Triton.",
    )
    max_candidates: int = Field(
        default=1000, ge=1, description="Largest number of candidates in one request, and of ids in one read."
    )
    max_similar: int = Field(default=100, ge=1, description="Largest number of neighbours in one search.")
    store_timeout_ms: Milliseconds = Field(default=20.0, description="Longest wait for the store, in milliseconds.")
    score_timeout_ms: Milliseconds = Field(
        default=100.0, description="Longest wait for one scoring model, in milliseconds."
    )
    deadline_margin_ms: float = Field(
        default=2.0,
        ge=0,
        description="Time of the caller's deadline reserved for sending the response, in milliseconds.",
    )
    warm_timeout_ms: Milliseconds = Field(
        default=60_000.0, description="Longest wait for a newly loaded model's first score, in milliseconds."
    )
    health_interval_ms: Milliseconds = Field(
        default=500.0, description="Time between two health checks, in milliseconds."
    )
    health_timeout_ms: Milliseconds = Field(
        default=1_000.0, description="Longest wait for one health check, in milliseconds."
    )
    grace_s: float = Field(
        default=5.0, ge=0, description="Time that open requests have to finish at shutdown, in seconds."
    )
    experiment: ExperimentSettings = Field(
        default=ExperimentSettings(), description="The experiment that assigns users to arms."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Command line, then environment, then TOML file."""
        return init_settings, env_settings, _SidecarTables(settings_cls)

    @classmethod
    def read(cls, file: Path | None = None, **arguments: Any) -> "Settings":
        """Settings from arguments (None: not set), the environment and a TOML file.

        Raises:
            InputError: a key or variable is unknown, a value is out of range, or the file does not exist.
        """
        variables = {f"{PREFIX}{name.upper()}" for name in cls.model_fields} | VARIABLES_OF_OTHERS
        for name in sorted(os.environ):
            if name.startswith(PREFIX) and name.split("__")[0] not in variables:
                raise InputError(f"the environment variable {name} is not a setting: remove it or correct its name")
        if file is not None and not file.is_file():
            raise InputError(f"the settings file {file} does not exist: create it or name another")
        source = type(
            cls.__name__, (cls,), {"model_config": SettingsConfigDict(toml_file=file), "__doc__": cls.__doc__}
        )
        try:
            return source(**{name: value for name, value in arguments.items() if value is not None})
        except ValidationError as error:
            faults = (
                f"{'.'.join(map(str, fault['loc'])) or 'settings'}: {fault['msg']}"
                for fault in error.errors()
                if fault["type"] != "default_factory_not_called"
            )
            raise InputError(f"wrong settings ({'; '.join(faults)}): correct them") from error
        except (SettingsError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"the settings cannot be read ({error}): correct them") from error
