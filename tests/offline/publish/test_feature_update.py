"""Fresh features replace older ones; a wrong line is named and nothing is written."""

from pathlib import Path

import numpy as np
import pytest
from tests.support.publishable import World, feature_line, schema_of

from kar_offline.publish import publish_features
from kar_sidecar.entities import ITEM, USER
from kar_sidecar.errors import InputError, PreconditionError
from kar_sidecar.features import FeatureLayout
from kar_sidecar.store import FEATURES

pytestmark = pytest.mark.service


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World.make(tmp_path)


def test_fresh_features_replace_older_ones_and_nothing_else(world: World, tmp_path: Path) -> None:
    world.publish()
    file = tmp_path / "fresh.jsonl"
    file.write_text(
        feature_line()
        + feature_line(id="bob", as_of="1970-01-01T00:14:59+00:00")  # 899 s: the dataset knows an event at 900 s
        + feature_line(
            id="new", features={}, history=[["heat", 4], ["七人の侍", 5.0]], as_of="1970-01-01T01:00:00+01:00"
        )
        + feature_line(
            entity="item", id="ran", features={"genres": ["drama", "war"]}, history=[], as_of="1970-01-01T01:00:00Z"
        )
    )
    report = publish_features(world.work, world.release, world.url, file)
    assert (report.records, report.written, report.kept) == (4, 3, 1)
    assert world.history("ann") == (("ran",), [2.5], 600_000)
    assert world.history("bob") == (("ran",), [3], 900_000)
    assert world.history("new") == (("heat", "七人の侍"), [4, 5], 0)
    items = FeatureLayout(schema_of(), ITEM)
    (row,) = items.decode_items(world.read(ITEM, ["ran"], FEATURES))
    assert row.tobytes() == items.row({"genres": ["drama", "war"]}).tobytes()
    assert world.vectors(USER, ["ann"], "aaaaaaaaaaaa", 2, "float32").vectors.tolist() == [[1, 2]]
    assert publish_features(world.work, world.release, world.url, file).written == 0
    world.publish(force=True)
    assert world.history("ann") == (("ran",), [2.5], 600_000)  # a publish does not take back what is newer


def test_what_a_fresh_record_leaves_out_is_missing(world: World, tmp_path: Path) -> None:
    world.publish()
    (tmp_path / "fresh.jsonl").write_text('{"entity": "user", "id": "ann", "as_of": "1970-01-02T00:00:00Z"}\n')
    publish_features(world.work, world.release, world.url, tmp_path / "fresh.jsonl")
    assert world.history("ann") == ((), [], 86_400_000)
    row = FeatureLayout(schema_of(), USER).decode_user(world.read(USER, ["ann"], FEATURES)[0]).row
    assert np.isnan(row["age"]).tolist() == [True]


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ("{", "JSON"),
        ("[]\n", "object"),
        (feature_line(entity="film"), "entity"),
        (feature_line(entity="item"), "items have no history"),
        (feature_line(id=""), "id"),
        (feature_line(id=7), "id"),
        (feature_line(more=1), "more"),
        (feature_line(as_of="2026-11-01T12:00:00"), "as_of"),
        (feature_line(as_of=None), "as_of"),
        (feature_line(as_of="9998-01-01T00:00:00Z"), "future"),
        (feature_line(features={"salary": 1}), "'salary' is not in the schema"),
        (feature_line(features={"age": "24"}), "'age' is numeric"),
        (feature_line(history=[["ran"]]), "history"),
        (feature_line(history=[["ran", "4"]]), "history"),
        (feature_line(history=[["ran", float("nan")]]), "history"),
        (feature_line(history=[["ra\0n", 4]]), "NUL"),
        (feature_line(id="X").replace("X", "\\ud800"), "JSON"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(world: World, tmp_path: Path, bad: str, complaint: str) -> None:
    world.publish()
    file = tmp_path / "fresh.jsonl"
    file.write_text(feature_line() + bad)
    with pytest.raises(InputError, match=f"line 2: .*{complaint}.*nothing was written"):
        publish_features(world.work, world.release, world.url, file)
    assert world.history("ann") == (("heat", "alien"), [5, 4], 200_000)


def test_bytes_that_are_no_text_are_named(world: World, tmp_path: Path) -> None:
    world.publish()
    (tmp_path / "fresh.jsonl").write_bytes(feature_line().encode() + b'{"entity": "\xff\xfe"}\n')
    with pytest.raises(InputError, match="line 2"):
        publish_features(world.work, world.release, world.url, tmp_path / "fresh.jsonl")


def test_fresh_features_need_a_file_and_a_published_release(world: World, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a file"):
        publish_features(world.work, world.release, world.url, tmp_path / "nowhere")
    (tmp_path / "fresh.jsonl").write_text(feature_line())
    with pytest.raises(PreconditionError, match="without --features"):
        publish_features(world.work, world.release, world.url, tmp_path / "fresh.jsonl")
