"""How the clustered store handles the result codes of its client, for single records and for whole calls."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import aerospike
import pytest
from aerospike import exception
from aerospike_helpers.batch.records import BatchRecord, BatchRecords

from kar_sidecar.entities import ITEM
from kar_sidecar.errors import (
    DeadlineError,
    IncompleteError,
    InputError,
    KarError,
    PreconditionError,
    UnavailableError,
)
from kar_sidecar.settings import Settings
from kar_sidecar.store import FEATURES, TEXT, EntityKey
from kar_sidecar.store.aerospike import AerospikeStore
from kar_sidecar.store.cluster import PASSWORD, AerospikeSettings
from kar_sidecar.store.records import Header

pytestmark = pytest.mark.unit

KEYS = [EntityKey(ITEM, str(i)) for i in range(5)]
BLOB = Header(0, 7, 1_000, 0).seal(b"body")
RECORDS = [(key, BLOB) for key in KEYS]
OK, NOT_FOUND, TIMEOUT, FULL, TOO_BIG, FILTERED, OVERLOAD, BUSY = 0, 2, 9, 8, 13, 27, 18, 14
Codes = Callable[[str, int], int]
"""Gives the result code of a record from its user key and the number of the call."""


class ScriptedClient:
    """A client whose servers answer each record with a code, and each call with an exception or none."""

    def __init__(self, codes: Codes = lambda key, call: OK, raises: Callable[[int], Exception | None] = lambda _: None):
        self.codes, self.raises = codes, raises
        self.calls = 0
        self.stored: dict[str, bytes] = {}
        self.writes: Counter[str] = Counter()
        self.policies: list[dict[str, Any]] = []

    def _call(self, policy: dict[str, Any]) -> int:
        self.calls += 1
        self.policies.append(policy)
        if error := self.raises(self.calls):
            raise error
        return self.calls

    def batch_read(self, keys: list[tuple], bins: list[str], policy: dict[str, Any]) -> BatchRecords:
        call = self._call(policy)
        found = []
        for key in keys:
            record = BatchRecord(key)
            record.result = self.codes(key[2].decode(), call)
            record.record = (key, {}, dict.fromkeys(bins, BLOB)) if record.result == OK else None
            found.append(record)
        return BatchRecords(found)

    def batch_write(self, batch: BatchRecords, policy: dict[str, Any]) -> BatchRecords:
        call = self._call(policy)
        for write in batch.batch_records:
            name = write.key[2].decode()
            write.result = self.codes(name, call)
            self.writes[name] += 1
            if write.result == OK:
                self.stored[name] = write.ops[0]["val"]
        return batch

    def get(self, key: tuple, policy: dict[str, Any]) -> tuple:
        self._call(policy)
        return key, {}, {"value": self.stored[key[2].decode()]}

    def put(self, key: tuple, bins: dict[str, bytes], policy: dict[str, Any]) -> None:
        self._call(policy)
        self.stored[key[2].decode()] = bins["value"]


@pytest.fixture
def opened() -> Callable[..., tuple[AerospikeStore, list[float]]]:
    def build(client: ScriptedClient, **settings: Any) -> tuple[AerospikeStore, list[float]]:
        slept: list[float] = []
        store = AerospikeStore(
            [("a", 3000)],
            "test",
            "kar",
            AerospikeSettings(**settings),
            connect=lambda config: client,
            sleep=slept.append,
            random=Random(0),
        )
        return store, slept

    return build


def test_single_records_that_fail_are_named_and_the_others_are_read(opened) -> None:
    store, _ = opened(ScriptedClient(lambda key, call: {"2:1": TIMEOUT, "2:3": NOT_FOUND}.get(key, OK)))
    with pytest.raises(IncompleteError, match=r"1 of 5 records were not read: Aerospike a:3000 .* in time") as caught:
        store.read(KEYS, [FEATURES, TEXT])
    absent = (None, None)
    assert list(caught.value.records) == [(BLOB, BLOB), absent, (BLOB, BLOB), absent, (BLOB, BLOB)]
    assert list(caught.value.unread) == [1]


@pytest.mark.parametrize(
    ("code", "kind"), [(TIMEOUT, DeadlineError), (-15, DeadlineError), (BUSY, UnavailableError), (11, UnavailableError)]
)
def test_a_batch_that_fails_altogether_is_an_error(opened, code: int, kind: type[KarError]) -> None:
    store, _ = opened(ScriptedClient(lambda key, call: code))
    with pytest.raises(kind) as caught:
        store.read(KEYS, [FEATURES])
    assert not isinstance(caught.value, IncompleteError)


def test_a_lasting_fault_of_one_record_is_raised(opened) -> None:
    store, _ = opened(ScriptedClient(lambda key, call: {"2:0": TIMEOUT, "2:1": 20}.get(key, OK)))
    with pytest.raises(PreconditionError, match="no such namespace"):
        store.read(KEYS, [FEATURES])


@pytest.mark.parametrize("code", [OVERLOAD, TIMEOUT, -15, BUSY, 152, -8, -10, 11])
def test_only_temporarily_refused_writes_are_retried(opened, caplog, code: int) -> None:
    client = ScriptedClient(lambda key, call: code if key in ("2:1", "2:4") and call < 4 else OK)
    store, slept = opened(client)
    with caplog.at_level(logging.DEBUG):
        assert store.write(FEATURES, RECORDS) == 5
    assert client.writes == {"2:0": 1, "2:1": 4, "2:2": 1, "2:3": 1, "2:4": 4}
    assert client.stored == {f"2:{i}": BLOB for i in range(5)}
    assert [record.levelno for record in caplog.records] == [logging.DEBUG] * len(slept) == [logging.DEBUG] * 3


def test_pauses_grow_are_jittered_and_bounded(opened) -> None:
    store, slept = opened(ScriptedClient(lambda key, call: OVERLOAD if call < 12 else OK))
    assert store.write(FEATURES, RECORDS) == 5
    full = [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2, 2, 2, 2, 2]
    assert all(whole / 2 <= pause <= whole for pause, whole in zip(slept, full, strict=True))
    assert len({pause / whole for pause, whole in zip(slept, full, strict=True)}) == len(full)


def test_retries_end_when_the_patience_is_used_up(opened, caplog) -> None:
    store, slept = opened(ScriptedClient(lambda key, call: OVERLOAD), write_patience_ms=3_000)
    with pytest.raises(UnavailableError, match="is overloaded, its devices are too slow"):
        store.write(FEATURES, RECORDS)
    assert 1 < sum(slept) <= 3
    assert "trying again" in caplog.text  # by then a user hears of it


def test_a_write_succeeds_when_a_lost_server_is_back(opened) -> None:
    lost = [exception.ClientError(-10, "connection refused"), exception.ClusterError(11, "no nodes"), None, None]
    client = ScriptedClient(raises=lambda call: lost[call - 1])
    store, slept = opened(client)
    assert store.write(FEATURES, RECORDS) == 5
    assert len(slept) == 2
    client.calls = 0
    store.write_meta("x", b"value")
    assert client.stored["meta:x"] == b"value"


@pytest.mark.parametrize(
    ("code", "kind", "complaint"),
    [
        (FULL, PreconditionError, "is full"),
        (TOO_BIG, InputError, "no record of this size"),
        (20, PreconditionError, "no such namespace"),
        (21, InputError, "part name of this length"),
        (81, PreconditionError, "refuses the user"),
        (51, PreconditionError, "has no users"),
        (4, PreconditionError, "does not accept the request"),
    ],
)
def test_a_permanent_fault_is_raised_at_once(opened, code: int, kind: type[KarError], complaint: str) -> None:
    store, slept = opened(ScriptedClient(lambda key, call: {"2:1": OVERLOAD, "2:2": code}.get(key, OK)))
    with pytest.raises(kind, match=complaint):
        store.write(FEATURES, RECORDS)
    assert slept == []


def test_writes_that_the_server_filters_out_are_not_counted(opened) -> None:
    store, _ = opened(ScriptedClient(lambda key, call: FILTERED if key == "2:1" else OK))
    assert store.write(FEATURES, RECORDS, newer_only=True) == 4


def test_settings_reach_batches(opened) -> None:
    client = ScriptedClient()
    store, _ = opened(client, batch_records=2, read_attempt_timeout_ms=7, read_max_retries=3, batch_concurrent=False)
    store.write(FEATURES, RECORDS)
    assert client.calls == 3
    store.read(KEYS, [FEATURES])
    store.read(KEYS, [FEATURES], 0.0123)
    common = {"concurrent": False, "allow_inline": True, "allow_inline_ssd": False, "respond_all_keys": True}
    writes = {"total_timeout": 5_000, "socket_timeout": 1_000, "max_retries": 2}
    assert client.policies[0] == common | writes
    assert client.policies[-2] == common | {"total_timeout": 50, "socket_timeout": 7, "max_retries": 3}
    assert client.policies[-1]["total_timeout"] == 12
    store, _ = opened(client)
    store.read(KEYS, [FEATURES], 0.0161)
    assert [client.policies[-1][name] for name in ("total_timeout", "socket_timeout", "max_retries")] == [16, 8, 1]


def test_a_hung_node_delays_a_health_check_by_at_most_three_attempts_at_a_seal(opened) -> None:
    client = ScriptedClient()
    store, _ = opened(client)
    store.write_meta("x", b"value")
    assert store.read_meta("x") == b"value"
    assert client.policies[-1] == {"total_timeout": 500, "socket_timeout": 250, "max_retries": 1}
    assert Settings.model_fields["health_timeout_ms"].default > 3 * 250
    store, _ = opened(client, read_max_retries=4, read_attempt_timeout_ms=7)
    store.read_meta("x")
    assert client.policies[-1] == {"total_timeout": 500, "socket_timeout": 100, "max_retries": 4}


@pytest.fixture
def configuration() -> Callable[..., dict[str, Any]]:
    def build(password: str = "", **settings: Any) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def connect(config: dict[str, Any]) -> Any:
            seen.update(config)
            return SimpleNamespace(close=lambda: None)

        hosts = [("a", 3000), ("b", 3001)]
        AerospikeStore(hosts, "n", "s", AerospikeSettings(**settings), password=password, connect=connect)
        return seen

    return build


def test_a_plain_cluster_is_reached_without_tls_and_user(configuration) -> None:
    found = configuration(password="unused", use_services_alternate=True, connect_timeout_ms=3, max_connections=7)
    assert found["hosts"] == [("a", 3000), ("b", 3001)]
    assert not {"tls", "user", "password"} & found.keys()
    assert (found["connect_timeout"], found["max_conns_per_node"], found["use_services_alternate"]) == (3, 7, True)


@pytest.mark.parametrize(("mode", "number"), [("internal", 0), ("external", 1), ("external_insecure", 2), ("pki", 3)])
def test_a_secured_cluster_is_reached_with_tls_and_user(configuration, tmp_path: Path, mode: str, number: int) -> None:
    ca, certificate, key = files = [tmp_path / name for name in ("ca.pem", "cert.pem", "key.pem")]
    for file in files:
        file.touch()
    found = configuration(
        "secret",
        user="kar",
        auth_mode=mode,
        tls=True,
        tls_name="cluster",
        tls_ca_file=ca,
        tls_cert_file=certificate,
        tls_key_file=key,
    )
    assert found["hosts"] == [("a", 3000, "cluster"), ("b", 3001, "cluster")]
    assert found["tls"] == {"enable": True, "cafile": str(ca), "certfile": str(certificate), "keyfile": str(key)}
    assert (found["user"], found["password"], found["policies"]["auth_mode"]) == ("kar", "secret", number)
    assert configuration(tls=True)["hosts"] == [("a", 3000, "a"), ("b", 3001, "b")]


def test_the_real_client_knows_every_key_of_the_configuration(tmp_path: Path) -> None:
    """It validates them before it connects; nothing listens at the address."""
    (tmp_path / "ca.pem").touch()
    settings = AerospikeSettings(user="kar", tls=True, tls_ca_file=tmp_path / "ca.pem", connect_timeout_ms=50)
    with pytest.raises(PreconditionError, match=r"TLS \(Failed to load CAFile") as caught:
        AerospikeStore([("127.0.0.1", 1)], "n", "s", settings, password="secret")
    assert "secret" not in str(caught.value)
    with pytest.raises(UnavailableError, match="Failed to connect"):
        AerospikeStore([("127.0.0.1", 1)], "n", "s", AerospikeSettings(user="kar", connect_timeout_ms=50), password="s")
    with pytest.raises(PreconditionError, match='"typo" is an invalid client config dictionary key'):
        AerospikeStore(
            [("127.0.0.1", 1)],
            "n",
            "s",
            AerospikeSettings(),
            connect=lambda config: aerospike.client({**config, "typo": 1}),
        )


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setenv("KAR_AEROSPIKE__USER", "kar")
    monkeypatch.setenv(PASSWORD, "secret")
    return monkeypatch


def test_settings_come_from_file_and_environment_and_never_show_the_password(environment, tmp_path: Path) -> None:
    file = tmp_path / "kar.toml"
    file.write_text("[aerospike]\nread_max_retries = 4\nuser = 'other'\nbatch_records = 9\n")
    settings = Settings.read(file)
    assert (settings.aerospike.user, settings.aerospike.read_max_retries, settings.aerospike.batch_records) == (
        "kar",
        4,
        9,
    )
    assert "secret" not in settings.model_dump_json()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("password = 'x'", "password"),
        ("typo = 1", "typo"),
        ("batch_records = 0", "batch_records"),
        ("auth_mode = 'none'", "auth_mode"),
        ("tls_name = 'a'", "need tls = true"),
        ("tls = true\ntls_cert_file = '/etc/hostname'", "need each other"),
        ("tls = true\ntls_ca_file = '/no/such.pem'", "/no/such.pem is not a file"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "kar.toml"
    file.write_text(f"[aerospike]\n{text}\n")
    with pytest.raises(InputError, match=complaint):
        Settings.read(file)


def test_every_setting_has_a_description_and_a_unit() -> None:
    fields = AerospikeSettings.model_fields.items()
    assert [name for name, field in fields if not (field.description or "").endswith(".")] == []
    assert {name for name, field in fields if "milliseconds" in (field.description or "")} == {
        name for name, _ in fields if name.endswith("_ms")
    }
