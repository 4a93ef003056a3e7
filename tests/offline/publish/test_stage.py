"""A release arrives whole in store and index, once, and a killed publish is completed by the next."""

import json
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from google.protobuf import json_format
from typer.testing import CliRunner

from kar.records.v1 import records_pb2
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.knowledge.records import record_line
from kar_offline.publish import publish, publish_features
from kar_offline.publish.command import publish as publish_command
from kar_offline.work_folder import WorkFolder
from kar_sidecar.content_hash import file_sha256
from kar_sidecar.entities import ITEM, USER
from kar_sidecar.errors import InputError, IntegrityError, NotFoundError, PreconditionError, UnavailableError
from kar_sidecar.features import FeatureLayout, schema_hash
from kar_sidecar.index.faiss import FaissIndex
from kar_sidecar.index.snapshot import read_current
from kar_sidecar.releases.manifest import manifest_id, write_active
from kar_sidecar.store import FEATURES, TEXT, EntityKey, schema_meta, space_meta, vector_part
from kar_sidecar.store.open import open_store
from kar_sidecar.store.records import FULL, NEUTRAL, STALE, decode_vectors

NEIGHBOUR = records_pb2.KNOWLEDGE_LEVEL_NEIGHBOUR

pytestmark = pytest.mark.service

AFFINITY = "fffffffffffe"
ENCODED = "cccccccccccc"
NOW_MS = 1_800_000_000_000
LAST_EVENT_S = 900
ITEMS = ("heat", "alien", "ran")
COUNTS = {"users": 2, "items": 2, "lent": {"users": 0, "items": 0}}


def schema_of(history_length: int = 4) -> records_pb2.FeatureSchema:
    numeric, categorical = records_pb2.FEATURE_TYPE_NUMERIC, records_pb2.FEATURE_TYPE_CATEGORICAL
    return records_pb2.FeatureSchema(
        features=[
            records_pb2.Feature(name="age", entity=USER.number, type=numeric),
            records_pb2.Feature(name="genres", entity=ITEM.number, type=categorical, width=2),
        ],
        history_length=history_length,
    )


def make_dataset(work: WorkFolder, schema: records_pb2.FeatureSchema) -> None:
    """ann rated heat (100 s), alien (200 s), ran (300 s): two may be shown; bob rated ran (900 s)."""
    work.dataset.mkdir(exist_ok=True)
    Dataset(
        name="tiny",
        schema=schema,
        users=[Entity("ann", {"age": 30}, {}), Entity("bob", {"age": None}, {})],
        items=[Entity(item, {"genres": [item]}, {}) for item in ITEMS],
        offsets=np.array([0, 3, 4]),
        event_item=np.array([0, 1, 2, 2], np.int32),
        event_rating=np.array([5, 4, 1, 3], np.float32),
        event_time=np.array([100, 200, 300, LAST_EVENT_S]),
        cutoff=np.array([2, 1], np.int32),
        event_split=np.zeros(4, np.uint8),
        positive_above=3,
    ).save(work.dataset)


def make_release(
    work: WorkFolder,
    schema: records_pb2.FeatureSchema,
    *,
    adapted: str = "aaaaaaaaaaaa",
    scale: float = 1,
    created_s: int = 5,
    affinity: bool = False,
    loans: tuple[str, ...] = (),
    recipe: str = "",
) -> str:
    """ann, bob, heat and alien have knowledge; heat's expires at 50 s. Vectors are multiples of `scale`.

    With `loans` alien borrows from those records, and cluster/0's expires at 40 s, cluster/1's never.
    """
    draft = work.releases / "draft"
    for name in ("vectors", "knowledge"):
        (draft / name).mkdir(parents=True)
    vectors = {"user": ["ann", "bob"], "item": ["heat", "alien"]}
    for number, (kind, ids) in enumerate(vectors.items()):
        (draft / "vectors" / f"{kind}_ids.txt").write_text("".join(f"{identity}\n" for identity in ids))
        np.save(draft / "vectors" / f"{kind}_adapted.npy", np.array([[1, 2], [3, 4 + number]], np.float32) * scale)
        np.save(draft / "vectors" / f"{kind}_encoded.npy", np.array([[1, 0, 0], [0, 1, number]], np.float32) * scale)
        with (draft / "knowledge" / f"{kind}.jsonl").open("w") as file:
            for identity in ids:
                record = records_pb2.KnowledgeRecord(id=identity, text=f"{identity} is good", template="factual/1")
                if identity == "heat":
                    record.expires_at.FromSeconds(50)
                if identity == "alien" and loans:
                    shares = [records_pb2.Loan(id=lender, weight=1 / len(loans)) for lender in loans]
                    record = records_pb2.KnowledgeRecord(id=identity, loans=shares)
                file.write(record_line(record) + "\n")
    if loans:
        (draft / "vectors" / "item_lent.txt").write_text("alien\n")
        clusters = [records_pb2.KnowledgeRecord(id=f"cluster/{number}", text="good films") for number in range(2)]
        clusters[0].expires_at.FromSeconds(40)
        lines = (record_line(cluster) + "\n" for cluster in clusters)
        (draft / "knowledge" / "item_clusters.jsonl").write_text("".join(lines))
    more: dict[str, Any] = {"models": [records_pb2.ModelEntry(arm="knowledge", recipe=recipe)]}
    if affinity:
        (draft / "vectors" / "user_adapted.npy").unlink()
        (draft / "vectors" / "affinity_ids.txt").write_text("alien\n")
        np.save(draft / "vectors" / "affinity.npy", np.array([[0.6, 0.8]], np.float32))
        space = records_pb2.VectorSpace(space_id=AFFINITY, dim=2, dtype="float32")
        more |= {"towers": [ITEM.number], "affinity": records_pb2.Affinity(space=space, events=3)}
    (draft / "item_ids.txt").write_text("".join(f"{item}\n" for item in ITEMS))
    manifest = records_pb2.Manifest(
        dataset="tiny",
        adapted_space=records_pb2.VectorSpace(space_id=adapted, dim=2, dtype="float32"),
        encoded_space=records_pb2.VectorSpace(space_id=ENCODED, dim=3, dtype="float16"),
        feature_schema=schema,
        feature_schema_hash=schema_hash(schema),
        **more,
        files=[
            records_pb2.FileEntry(
                path=path.relative_to(draft).as_posix(), sha256=file_sha256(path), bytes=path.stat().st_size
            )
            for path in sorted(draft.rglob("*"))
            if path.is_file()
        ],
    )
    manifest.created_at.FromSeconds(created_s)
    manifest.release_id = manifest_id(manifest)
    (draft / "manifest.json").write_text(json_format.MessageToJson(manifest))
    draft.rename(work.releases / manifest.release_id)
    return manifest.release_id


@dataclass(frozen=True)
class World:
    work: WorkFolder
    release: str
    url: str

    def publish(self, release: str | None = None, **options: bool) -> dict:
        result = publish(self.work, release or self.release, self.url, clock=lambda: NOW_MS, **options)
        return {**asdict(result.report), "ran": result.ran}

    def read(self, kind: int, ids: list[str], part: str) -> list[bytes | None]:
        store = open_store(self.url, readonly=True)
        records = store.read([EntityKey(kind, identity) for identity in ids], [part])
        store.close()
        return [record[0] for record in records]

    def meta(self, name: str) -> dict | None:
        store = open_store(self.url, readonly=True)
        value = store.read_meta(name)
        store.close()
        return None if value is None else json.loads(value)

    def history(self, user: str) -> tuple[tuple[str, ...], list[float], int]:
        read = FeatureLayout(schema_of(), USER).decode_user(self.read(USER, [user], FEATURES)[0])
        return read.history.item_ids, read.history.ratings.tolist(), read.written_at_ms

    def vectors(self, kind: int, ids: list[str], space: str, dim: int, dtype: str, at_ms: int = 0):
        blobs = self.read(kind, ids, vector_part(space))
        return decode_vectors(blobs, space, dim, np.zeros(dim, np.float32), dtype=dtype, at_ms=at_ms)


@pytest.fixture
def world(tmp_path: Path) -> World:
    work = WorkFolder(tmp_path)
    make_dataset(work, schema_of())
    return World(work, make_release(work, schema_of()), f"lmdb:{tmp_path / 'store'}")


def index_of(world: World, kind: str) -> FaissIndex:
    root = world.work.index / world.release / kind
    current = read_current(root)
    assert current is not None
    return FaissIndex.load(root / current.snapshot_id)


def assert_complete(world: World) -> None:
    assert world.history("ann") == (("heat", "alien"), [5, 4], 200_000)  # not the third event: it is a sample
    assert world.history("bob") == (("ran",), [3], 900_000)
    users, items = FeatureLayout(schema_of(), USER), FeatureLayout(schema_of(), ITEM)
    assert users.decode_user(world.read(USER, ["ann"], FEATURES)[0]).row["age"].tolist() == [30]
    rows = items.decode_items(world.read(ITEM, list(ITEMS), FEATURES))
    assert rows.tobytes() == b"".join(items.row({"genres": [item]}).tobytes() for item in ITEMS)
    adapted = world.vectors(ITEM, ["alien", "ran", "heat"], "aaaaaaaaaaaa", 2, "float32", at_ms=49_999)
    assert (adapted.vectors.tolist(), adapted.levels.tolist()) == ([[3, 5], [0, 0], [1, 2]], [FULL, NEUTRAL, FULL])
    expired = world.vectors(ITEM, ["alien", "heat"], "aaaaaaaaaaaa", 2, "float32", at_ms=50_000)
    assert expired.levels.tolist() == [FULL, STALE]
    encoded = world.vectors(USER, ["bob", "ann"], ENCODED, 3, "float16")
    assert (encoded.vectors.tolist(), encoded.levels.tolist()) == ([[0, 1, 0], [1, 0, 0]], [FULL, FULL])
    heat, ran = world.read(ITEM, ["heat", "ran"], TEXT)
    assert heat is not None
    assert records_pb2.KnowledgeRecord.FromString(heat).text == "heat is good"
    assert ran is None
    seal = {"release_id": world.release, **COUNTS, "published_at_ms": NOW_MS}
    names = [space_meta("aaaaaaaaaaaa"), space_meta(ENCODED), schema_meta(schema_hash(schema_of()))]
    assert [world.meta(name) for name in names] == [seal] * 3
    index = index_of(world, "item")
    assert index.search(np.array([[0, 1, 1]]), 2).ids == [["alien", "heat"]]
    index.close()
    index = index_of(world, "user")
    assert index.search(np.array([[1, 0.5, 0]]), 1).ids == [["ann"]]
    index.close()


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
def test_a_lent_vector_is_a_neighbours_until_the_first_lender_expires(
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


def test_affinity_of_a_lent_vector_is_a_neighbours(world: World) -> None:
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


KILLED = """
import os, signal, sys
from pathlib import Path
from kar_offline.dataset.dataset import Dataset
from kar_offline.publish.stage import publish_release
from kar_offline.stage_runner import folder_hash
from kar_offline.work_folder import WorkFolder
from kar_sidecar.releases.manifest import Release
from kar_sidecar.store.open import open_store

work, release_id, url, dies_at = WorkFolder(Path(sys.argv[1])), sys.argv[2], sys.argv[3], int(sys.argv[4])
store = open_store(url)
steps = 0

def step():
    global steps
    steps += 1
    if steps == dies_at:
        os.kill(os.getpid(), signal.SIGKILL)

class Dying:
    '''Each record and each meta value is a step; one of them is the last.'''
    blocking = False
    read, read_meta, remove_part, close = store.read, store.read_meta, store.remove_part, store.close

    def write(self, part, records, *, newer_only=False):
        def stream():
            for record in records:
                step()
                yield record
        written = store.write(part, stream(), newer_only=newer_only)
        step()
        return written

    def write_meta(self, name, value):
        step()
        store.write_meta(name, value)

publish_release(
    Release.load(work.releases, release_id),
    work.read(Dataset),
    Dying(),
    work.index / release_id,
    dataset_hash=folder_hash(work.dataset),
    force=sys.argv[5] == "True",
)
"""
STEPS = 1 + (5 + 2) + 3 * (4 + 2) + 4
"""Schema's claim, features, texts and two spaces of vectors, each noted; the seals, and the notes' removal."""


def killed(world: World, release: str, dies_at: int, force: bool = False) -> int:
    """Exit code of a publish that is killed at a step."""
    arguments = [str(world.work), release, world.url, str(dies_at), str(force)]
    return subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False).returncode


def kill(world: World, release: str, dies_at: int, force: bool = False) -> None:
    assert killed(world, release, dies_at, force) == -signal.SIGKILL


@pytest.mark.parametrize("dies_at", [1, 4, 7, 8, 12, 14, 15, 20, 26, 27, 28, 29, STEPS])
def test_a_publish_killed_anywhere_is_seen_and_completed(world: World, dies_at: int) -> None:
    kill(world, world.release, dies_at)
    assert world.meta(space_meta("aaaaaaaaaaaa")) is None  # the last seal: readers see that it is not published
    features = world.read(USER, ["ann"], FEATURES)[0]
    assert FeatureLayout(schema_of(), USER).decode_user(features).history.item_ids in {(), ("heat", "alien")}
    assert world.publish()["ran"]
    assert_complete(world)
    assert not world.publish()["ran"]


@pytest.mark.parametrize("claimed_back", [False, True])
def test_what_a_killed_publish_noted_does_not_outlive_features_of_another_schema(
    world: World, claimed_back: bool
) -> None:
    ours, theirs = schema_of(), schema_of(history_length=9)
    kill(world, world.release, dies_at=9, force=True)  # with the first text: features are noted
    make_dataset(world.work, theirs)
    world.publish(make_release(world.work, theirs, adapted="bbbbbbbbbbbb"), force=True)
    make_dataset(world.work, ours)
    if claimed_back:
        # Another release of our schema, which writes no more than its claim.
        kill(world, make_release(world.work, ours, adapted="dddddddddddd"), dies_at=4, force=True)
    assert world.publish(force=True)["written"]["features"] == 5
    assert_complete(world)


def test_the_last_step_of_the_kill_test_is_the_last_step_of_publishing(world: World) -> None:
    assert killed(world, world.release, STEPS + 1) == 0


def line(**changes: object) -> str:
    record = {"entity": "user", "id": "ann", "features": {"age": 31}, "history": [["ran", 2.5]]}
    return json.dumps({**record, "as_of": "1970-01-01T00:10:00Z", **changes}) + "\n"


def test_fresh_features_replace_older_ones_and_nothing_else(world: World, tmp_path: Path) -> None:
    world.publish()
    file = tmp_path / "fresh.jsonl"
    file.write_text(
        line()
        + line(id="bob", as_of="1970-01-01T00:14:59+00:00")  # 899 s: the dataset knows an event at 900 s
        + line(id="new", features={}, history=[["heat", 4], ["七人の侍", 5.0]], as_of="1970-01-01T01:00:00+01:00")
        + line(entity="item", id="ran", features={"genres": ["drama", "war"]}, history=[], as_of="1970-01-01T01:00:00Z")
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
        (line(entity="film"), "entity"),
        (line(entity="item"), "items have no history"),
        (line(id=""), "id"),
        (line(id=7), "id"),
        (line(more=1), "more"),
        (line(as_of="2026-11-01T12:00:00"), "as_of"),
        (line(as_of=None), "as_of"),
        (line(as_of="9998-01-01T00:00:00Z"), "future"),
        (line(features={"salary": 1}), "'salary' is not in the schema"),
        (line(features={"age": "24"}), "'age' is numeric"),
        (line(history=[["ran"]]), "history"),
        (line(history=[["ran", "4"]]), "history"),
        (line(history=[["ran", float("nan")]]), "history"),
        (line(history=[["ra\0n", 4]]), "NUL"),
        (line(id="X").replace("X", "\\ud800"), "JSON"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(world: World, tmp_path: Path, bad: str, complaint: str) -> None:
    world.publish()
    file = tmp_path / "fresh.jsonl"
    file.write_text(line() + bad)
    with pytest.raises(InputError, match=f"line 2: .*{complaint}.*nothing was written"):
        publish_features(world.work, world.release, world.url, file)
    assert world.history("ann") == (("heat", "alien"), [5, 4], 200_000)


def test_bytes_that_are_no_text_are_named(world: World, tmp_path: Path) -> None:
    world.publish()
    (tmp_path / "fresh.jsonl").write_bytes(line().encode() + b'{"entity": "\xff\xfe"}\n')
    with pytest.raises(InputError, match="line 2"):
        publish_features(world.work, world.release, world.url, tmp_path / "fresh.jsonl")


def test_fresh_features_need_a_file_and_a_published_release(world: World, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a file"):
        publish_features(world.work, world.release, world.url, tmp_path / "nowhere")
    (tmp_path / "fresh.jsonl").write_text(line())
    with pytest.raises(PreconditionError, match="without --features"):
        publish_features(world.work, world.release, world.url, tmp_path / "fresh.jsonl")


def test_the_command_reads_store_and_cluster_from_settings(world: World, app: typer.Typer, tmp_path: Path) -> None:
    write_active(world.work.releases, world.release)
    config = tmp_path / "kar.toml"
    config.write_text(f"work = '{world.work}'\nstore = 'lmdb:{tmp_path / 'elsewhere'}'\n")
    done = CliRunner().invoke(app, ["--config", str(config), "--max-rate", "1000"], catch_exceptions=False)
    assert done.exit_code == 0
    assert (tmp_path / "elsewhere" / "data.mdb").is_file()
    config.write_text(f"work = '{world.work}'\n[aerospike]\ntls_name = 'a'\n")
    with pytest.raises(InputError, match="need tls = true"):
        CliRunner().invoke(app, ["--config", str(config)], catch_exceptions=False)
    config.write_text(f"work = '{world.work}'\n[aerospike]\nconnect_timeout_ms = 50\n")
    arguments = ["--config", str(config), "--store", "aerospike:127.0.0.1:1,127.0.0.1:2/test/kar"]
    with pytest.raises(UnavailableError, match=r"Aerospike 127\.0\.0\.1:1, 127\.0\.0\.1:2"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command()(publish_command)
    return app


def test_the_command_publishes_the_active_release_into_the_work_folder(world: World, app: typer.Typer) -> None:
    write_active(world.work.releases, world.release)
    report = world.work.root / "report.json"
    done = CliRunner().invoke(app, ["--work", str(world.work), "--json", str(report)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "2 users and 2 items" in done.output
    assert json.loads(report.read_text())["written"] == {"features": 5, "texts": 4, "adapted": 4, "encoded": 4}
    again = CliRunner().invoke(app, ["--work", str(world.work), "--json", str(report)], catch_exceptions=False)
    assert "nothing done" in again.output
    lent = ["--work", str(world.work), "--release", make_release(world.work, schema_of(), loans=("heat",))]
    told = CliRunner().invoke(app, lent, catch_exceptions=False, env={"COLUMNS": "200"})
    assert "2 users and 2 items (1 with imputed knowledge)" in told.output
    assert json.loads(report.read_text())["ran"] is False
    (world.work.root / "fresh.jsonl").write_text(line())
    fresh = ["--work", str(world.work), "--features", str(world.work.root / "fresh.jsonl"), "--json", str(report)]
    assert "1 of 1 records" in CliRunner().invoke(app, fresh, catch_exceptions=False).output
    assert json.loads(report.read_text())["written"] == 1
