"""Owns the settings of an Aerospike store: connection, time limits, batch sizes.

Hosts, namespace and set are part of the store's URL. The password comes from the environment only, so that no file and
no report contains it.
"""

from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["PASSWORD", "AerospikeSettings"]

PASSWORD: Final = "KAR_AEROSPIKE_PASSWORD"
"""Environment variable with the password of `AerospikeSettings.user`."""

Milliseconds = Annotated[int, Field(gt=0)]


class AerospikeSettings(BaseModel):
    """Settings of the table `[aerospike]`, or of variables `KAR_AEROSPIKE__*` of the environment."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    user: str = Field(default="", description=f"User to log in as, with the password in {PASSWORD}; empty: no login.")
    auth_mode: Literal["internal", "external", "external_insecure", "pki"] = Field(
        default="internal", description="Who checks the user: the cluster, LDAP, LDAP without TLS, or the certificate."
    )
    tls: bool = Field(default=False, description="Whether connections are encrypted.")
    tls_name: str = Field(default="", description="Name on the nodes' certificates; empty: the host's name.")
    tls_ca_file: Path | None = Field(
        default=None, description="PEM file of the trusted authorities; unset: the system's."
    )
    tls_cert_file: Path | None = Field(default=None, description="PEM file of the client's own certificate.")
    tls_key_file: Path | None = Field(default=None, description="PEM file of the client certificate's private key.")
    use_services_alternate: bool = Field(
        default=False,
        description="Whether to connect to the nodes' alternate addresses, for clients in another network.",
    )
    connect_timeout_ms: Milliseconds = Field(default=2_000, description="Longest wait to connect, in milliseconds.")
    login_timeout_ms: Milliseconds = Field(default=5_000, description="Longest wait to log in, in milliseconds.")
    max_connections: int = Field(
        default=100, ge=1, description="Largest number of connections of a process to each node."
    )
    read_attempt_timeout_ms: int = Field(
        default=0,
        ge=0,
        description="Longest wait for one attempt to read, in milliseconds; 0: an equal part of the whole limit.",
    )
    read_timeout_ms: Milliseconds = Field(
        default=50, description="Longest wait for a read whose caller sets no limit, in milliseconds."
    )
    read_max_retries: int = Field(
        default=1, ge=0, description="Number of further attempts to read, from another replica if there is one."
    )
    write_attempt_timeout_ms: int = Field(
        default=1_000, ge=0, description="Longest wait for one attempt to write, in milliseconds; 0: write_timeout_ms."
    )
    write_timeout_ms: Milliseconds = Field(
        default=5_000, description="Longest wait to write one batch or a meta value, in milliseconds."
    )
    write_max_retries: int = Field(
        default=2, ge=0, description="Number of further attempts to write within write_timeout_ms."
    )
    write_patience_ms: int = Field(
        default=60_000,
        ge=0,
        description="Longest time to repeat a batch that an overloaded or lost cluster refuses, in milliseconds.",
    )
    batch_records: int = Field(
        default=500, ge=1, le=5_000, description="Largest number of records in one batch of writes."
    )
    batch_concurrent: bool = Field(
        default=True, description="Whether a batch is sent to all nodes at once instead of one after the other."
    )
    batch_allow_inline: bool = Field(
        default=True, description="Whether a node answers batches from memory in the thread that received them."
    )
    batch_allow_inline_ssd: bool = Field(
        default=False, description="Whether a node answers batches from devices in the thread that received them."
    )
    respond_all_keys: bool = Field(
        default=True, description="Whether a node continues a batch after a record in it failed."
    )
    commit_level: Literal["all", "master"] = Field(
        default="all", description="Whether a write waits for all replicas or only for the master."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        files = (self.tls_ca_file, self.tls_cert_file, self.tls_key_file)
        if not self.tls and (self.tls_name or any(files)):
            raise ValueError("tls_name and the tls files need tls = true")
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_cert_file and tls_key_file need each other: set both or none")
        if missing := next((file for file in files if file and not file.is_file()), None):
            raise ValueError(f"{missing} is not a file")
        return self
