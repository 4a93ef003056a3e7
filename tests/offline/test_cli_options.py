import json
from dataclasses import dataclass

import pytest

from kar_offline.cli_options import write_json

pytestmark = pytest.mark.unit


def test_reports_are_strict_json(tmp_path):
    report = {"a": [1.5, float("nan"), (float("inf"), 2)], "b": {"c": "text", "d": None, "e": True}}
    write_json(tmp_path / "report.json", report)

    def refuse(constant):
        raise ValueError(constant)

    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert read == {"a": [1.5, None, [None, 2]], "b": {"c": "text", "d": None, "e": True}}
    write_json(None, report)


@dataclass(frozen=True)
class Part:
    rows: int
    ratio: float


def test_dataclasses_become_objects(tmp_path):
    write_json(tmp_path / "report.json", {"parts": [Part(3, float("nan"))]})
    assert json.loads((tmp_path / "report.json").read_text()) == {"parts": [{"rows": 3, "ratio": None}]}
