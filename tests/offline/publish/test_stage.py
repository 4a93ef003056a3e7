"""A release arrives whole in store and index, once, beside others."""

from pathlib import Path

import pytest
from tests.support.publishable import (
    AFFINITY,
    COUNTS,
    ENCODED,
    ITEMS,
    NOW_MS,
    World,
    assert_complete,
    make_dataset,
    make_release,
    schema_of,
)

from kar.records.v1 import records_pb2
from kar_sidecar.entities import ITEM, USER
from kar_sidecar.errors import IntegrityError, NotFoundError, PreconditionError
from kar_sidecar.features import FeatureLayout, schema_hash
from kar_sidecar.store import FEATURES, TEXT, schema_meta, space_meta
from kar_sidecar.store.records import FULL, NEUTRAL, STALE

pytestmark = pytest.mark.service

NEIGHBOUR = records_pb2.KNOWLEDGE_LEVEL_NEIGHBOUR


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World.make(tmp_path)


def test_everything_of_a_release_arrives(world: World) -> None:
    report = world.publish()
    assert report == {
        "release_id": world.release,
        **COUNTS,
        "published_at_ms": NOW_MS,
        "store": world.url,
        "written": {"features": 5, "texts": 4, "adapted": 4, "encoded": 4},
        "ran": True,
    }
    assert_complete(world)


def test_the_second_run_does_nothing_unless_forced(world: World) -> None:
    first = world.publish()
    assert world.publish() == {**first, "ran": False, "written": {}}
    forced = world.publish(force=True)
    assert forced["ran"]
    assert forced["written"] == {"features": 0, "texts": 0, "adapted": 0, "encoded": 0}  # the very bytes are there
    assert_complete(world)


def test_a_lost_index_is_built_again(world: World) -> None:
    world.publish()
    (world.work.index).rename(world.work.root / "elsewhere")
    assert world.publish()["written"] == {"features": 0, "texts": 0, "adapted": 0, "encoded": 0}
    assert_complete(world)


def test_releases_that_share_encoder_and_schema_live_side_by_side(world: World) -> None:
    world.publish()
    other = make_release(world.work, schema_of(), adapted="bbbbbbbbbbbb", scale=2, created_s=6)
    assert world.publish(other)["written"] == {"features": 0, "texts": 0, "adapted": 4, "encoded": 4}
    assert world.vectors(USER, ["ann"], "aaaaaaaaaaaa", 2, "float32").vectors.tolist() == [[1, 2]]
    assert world.vectors(USER, ["ann"], "bbbbbbbbbbbb", 2, "float32").vectors.tolist() == [[2, 4]]
    assert not world.publish()["ran"]
    assert not world.publish(other)["ran"]


def test_one_tower_and_affinity_vectors(world: World) -> None:
    release = make_release(world.work, schema_of(), adapted="dddddddddddd", affinity=True)
    report = world.publish(release)
    assert report["written"]["adapted"] == 2
    assert report["written"]["affinity"] == 1
    assert world.vectors(USER, ["ann"], "dddddddddddd", 2, "float32").levels.tolist() == [NEUTRAL]
    assert world.vectors(ITEM, ["heat"], "dddddddddddd", 2, "float32").levels.tolist() == [FULL]
    found = world.vectors(ITEM, ["alien", "heat"], AFFINITY, 2, "float32")
    assert found.vectors.tolist() == [pytest.approx([0.6, 0.8]), [0, 0]]
    assert world.meta(space_meta(AFFINITY))["release_id"] == release
    assert not world.publish(release)["ran"]


def levels_of(world: World, at_ms: int, space: str = "aaaaaaaaaaaa", dim: int = 2, dtype: str = "float32") -> list[int]:
    """Of heat, alien and ran."""
    return world.vectors(ITEM, list(ITEMS), space, dim, dtype, at_ms=at_ms).levels.tolist()


@pytest.mark.parametrize(
    ("loans", "stale_at_ms"),
    [
        (("heat", "cluster/0"), 40_000),
        (("cluster/1", "heat"), 50_000),
        (("cluster/1",), None),
        (("cluster/1", "cluster/2"), None),  # cluster/2 has no text
    ],
)
def test_an_imputed_vector_is_a_neighbours_until_the_first_neighbour_expires(
    world: World, loans: tuple[str, ...], stale_at_ms: int | None
) -> None:
    report = world.publish(make_release(world.work, schema_of(), loans=loans))
    assert report["lent"] == {"users": 0, "items": 1}
    assert report["items"] == 2
    for of in (("aaaaaaaaaaaa", 2, "float32"), (ENCODED, 3, "float16")):
        late = stale_at_ms or 50_000
        assert levels_of(world, late - 1, *of) == [FULL, NEIGHBOUR, NEUTRAL]
        stale = [STALE if late == 50_000 else FULL, STALE if stale_at_ms else NEIGHBOUR, NEUTRAL]
        assert levels_of(world, late, *of) == stale
    assert world.vectors(ITEM, ["alien"], "aaaaaaaaaaaa", 2, "float32").vectors.tolist() == [[3, 5]]
    (blob,) = world.read(ITEM, ["alien"], TEXT)
    assert tuple(loan.id for loan in records_pb2.KnowledgeRecord.FromString(blob).loans) == loans


def test_the_affinity_vector_of_an_imputed_vector_is_a_neighbours(world: World) -> None:
    world.publish(make_release(world.work, schema_of(), adapted="dddddddddddd", affinity=True, loans=("heat",)))
    assert levels_of(world, 0, AFFINITY) == [NEUTRAL, NEIGHBOUR, NEUTRAL]


def test_vectors_of_raw_texts_do_not_expire_with_the_language_models(world: World) -> None:
    world.publish(make_release(world.work, schema_of(), recipe="raw_text"))
    assert levels_of(world, 60_000) == [FULL, FULL, NEUTRAL]


def test_an_older_release_does_not_take_back_newer_vectors_of_a_shared_space(world: World) -> None:
    newer = make_release(world.work, schema_of(), scale=2, created_s=6)
    world.publish(newer)
    assert world.publish()["written"]["adapted"] == 0
    assert world.vectors(USER, ["ann"], "aaaaaaaaaaaa", 2, "float32").vectors.tolist() == [[2, 4]]


def test_features_of_another_schema_are_not_overwritten_unasked(world: World) -> None:
    world.publish()
    make_dataset(world.work, schema_of(history_length=9))
    other = make_release(world.work, schema_of(history_length=9), adapted="bbbbbbbbbbbb")
    with pytest.raises(PreconditionError, match="another --store, or use --force"):
        world.publish(other)
    assert world.history("ann") == (("heat", "alien"), [5, 4], 200_000)
    assert world.publish(other, force=True)["written"]["features"] == 5
    assert world.meta(schema_meta(schema_hash(schema_of()))) is None
    layout = FeatureLayout(schema_of(history_length=9), USER)
    assert layout.decode_user(world.read(USER, ["ann"], FEATURES)[0]).history.item_ids == ("heat", "alien")


def test_a_dataset_of_another_schema_is_refused(world: World) -> None:
    make_dataset(world.work, schema_of(history_length=9))
    with pytest.raises(PreconditionError, match="another feature schema"):
        world.publish()


def test_a_release_that_is_missing_or_corrupt_is_named(world: World) -> None:
    with pytest.raises(NotFoundError, match=world.release):
        world.publish("0123456789ab")
    (world.work.releases / world.release / "vectors" / "item_adapted.npy").write_bytes(b"?")
    with pytest.raises(IntegrityError, match=r"item_adapted\.npy"):
        world.publish()
