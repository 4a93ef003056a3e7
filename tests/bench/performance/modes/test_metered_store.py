"""The metered store counts what is offered, and passes everything on."""

import pytest

from kar_bench.performance.modes.metered_store import MeteredStore
from kar_sidecar.entities import ITEM, USER
from kar_sidecar.store import EntityKey
from kar_sidecar.store.memory import MemoryStore


@pytest.mark.unit
def test_the_meter_counts_what_is_offered():
    store = MeteredStore(MemoryStore())
    store.write("a", [(EntityKey(ITEM, "1"), b"four"), (EntityKey(ITEM, "2"), b"seven..")])
    store.write("a", [(EntityKey(USER, "1"), b"one")])
    store.write("b", [])
    assert {part: (one.records, one.bytes) for part, one in store.parts.items()} == {"a": (3, 14), "b": (0, 0)}
    assert store.parts["a"].seconds > 0
    assert store.read([EntityKey(ITEM, "2")], ["a"]) == [(b"seven..",)]
    store.write_meta("seal", b"{}")
    assert store.read_meta("seal") == b"{}"
    assert store.remove_part("a") == 3
