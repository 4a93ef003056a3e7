"""docs/store.md says what the code does: settings, header, limits, and sums that follow from its measurements."""

import re

import pytest
from tests.support.paths import DOCS

from kar_sidecar.store.cluster import PASSWORD, AerospikeSettings
from kar_sidecar.store.lmdb import BATCH, BATCH_BYTES, LONGEST_ID_BYTES
from kar_sidecar.store.records import HEADER

pytestmark = pytest.mark.unit

DOC = (DOCS / "store.md").read_text(encoding="utf-8")


def table(after: str) -> list[list[str]]:
    """Cells of the table that follows a line."""
    body = re.search(rf"{re.escape(after)}[^|]*?\n((?:\|.*\n)+)", DOC)
    assert body
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body[1].splitlines()[2:]]


def told(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:,}" if isinstance(value, int) else str(value or ("unset" if value is None else "empty"))


def test_every_setting_is_told_with_its_default_and_unit() -> None:
    expected = [
        [f"`{name}`", told(field.default), field.description] for name, field in AerospikeSettings.model_fields.items()
    ]
    assert table("<!-- settings -->") == expected
    assert PASSWORD in DOC


def test_the_header_is_told_byte_by_byte() -> None:
    fields = {}
    for span, name, _ in table("Every part but `text`"):
        first, _, last = span.partition("-")
        fields[name] = (int(first), int(last or first) + 1 if last or "-" not in span else None)
    assert fields.pop("payload") == (HEADER.itemsize, None)
    assert HEADER.fields is not None
    assert fields == {name: (at, at + kind.itemsize) for name, (kind, at, *_) in HEADER.fields.items()}


def test_limits_are_those_of_the_code() -> None:
    assert f"at most {BATCH:,} records and ends with the record that reaches {BATCH_BYTES >> 20} MiB" in DOC
    assert f"ids beyond {LONGEST_ID_BYTES} bytes" in DOC


def test_totals_follow_from_the_measured_bytes() -> None:
    measured = {name: int(aerospike.replace(",", "")) for name, _, aerospike, _ in table("<!-- sizes -->")}
    computed = table("From these")
    assert [name for name, *_ in computed] == list(measured)
    for name, *cells in computed:
        for cell, (entities, copies) in zip(cells, [(0.01, 1), (0.01, 2), (1, 1), (1, 2)], strict=True):
            data, index = (float(number.replace(",", "")) for number in cell.split(" + "))
            places = 1 if entities < 1 else 0
            assert (data, index) == (
                pytest.approx(measured[name] * entities * copies, abs=0.51 * 10**-places),
                pytest.approx(64 * entities * copies, abs=0.51 * 10**-places),
            )
