"""A snapshot is named by its content, checked when it is read, and kept for as long as somebody reads it."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from tests.support.open_files import no_file_left

from kar_sidecar.errors import IntegrityError, KarError, PreconditionError, UnavailableError
from kar_sidecar.index.config import KINDS, IndexConfig
from kar_sidecar.index.faiss import FaissIndex
from kar_sidecar.index.ids import Ids
from kar_sidecar.index.library import import_faiss
from kar_sidecar.index.snapshot import make_current, read_current

pytestmark = pytest.mark.unit

IDS = ["a\nb", "é", "", "nul\0", "\ud800", "ééé"]
QUERIES = np.random.default_rng(1).normal(size=(6, 8))
kinds = pytest.mark.parametrize("kind", KINDS)


def build(kind="flat", count=300, seed=0) -> FaissIndex:
    vectors = np.random.default_rng(seed).normal(size=(count, 8)).astype(np.float32)
    ids = [*IDS, *(f"i{row}" for row in range(count - len(IDS)))]
    return FaissIndex.build(ids, vectors, IndexConfig(kind, recall=0.9))


def publish(root: Path, at_ms: int = 1, **choices) -> str:
    index = build(**choices)
    snapshot_id = index.save(root)
    index.close()
    make_current(root, snapshot_id, at_ms)
    return snapshot_id


def snapshots(root: Path) -> set[str]:
    return {path.name for path in root.iterdir() if path.is_dir()}


def test_ids_are_found_by_row_and_rows_by_id_in_memory_and_mapped(tmp_path: Path) -> None:
    in_memory = Ids.of(IDS)
    in_memory.save(tmp_path)
    for ids in (in_memory, Ids.load(tmp_path), Ids.load(tmp_path, mapped=False)):
        assert len(ids) == 6
        assert ids.at(np.array([5, 0, 3, 2, 4, 0])) == ["ééé", "a\nb", "nul\0", "", "\ud800", "a\nb"]
        assert [ids.row(id_) for id_ in IDS] == list(range(6))
        assert ids.row("a") is None
        assert ids.row("éé") is None


def test_an_empty_id_table_can_be_read_back(tmp_path: Path) -> None:
    Ids.of([]).save(tmp_path)
    for mapped in (True, False):
        ids = Ids.load(tmp_path, mapped=mapped)
        assert (len(ids), ids.at(np.zeros(0, np.int64)), ids.row("")) == (0, [], None)


@kinds
@pytest.mark.parametrize("mapped", [True, False])
def test_a_snapshot_finds_the_same_neighbours_as_its_index(kind, mapped, tmp_path: Path) -> None:
    index = build(kind)
    loaded = FaissIndex.load(tmp_path / index.save(tmp_path), mapped=mapped)
    assert (loaded.dim, len(loaded)) == (8, 300)
    before, after = index.search(QUERIES, 9), loaded.search(QUERIES, 9)
    assert after.ids == before.ids
    np.testing.assert_array_equal(after.similarities, before.similarities)
    for id_ in IDS:
        assert loaded.search_like(id_, 3).ids == index.search_like(id_, 3).ids
    assert loaded.description == index.description
    index.close()
    loaded.close()


@kinds
def test_the_same_vectors_give_the_same_bytes(kind, tmp_path: Path) -> None:
    names = [publish(tmp_path / at, kind=kind) for at in ("one", "other")]
    assert names[0] == names[1]
    one, other = (
        {path.name: path.read_bytes() for path in (tmp_path / at / names[0]).iterdir()} for at in ("one", "other")
    )
    assert one == other
    assert publish(tmp_path / "one", kind=kind, seed=1) != names[0]


@kinds
def test_a_mapped_index_is_not_read_into_memory(kind, tmp_path: Path) -> None:
    def anonymous_kib() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Anonymous:")).split()[1])

    folder = tmp_path / publish(tmp_path, kind=kind, count=20_000)
    payload_kib = (folder / "index.faiss").stat().st_size / 1024
    assert payload_kib > 600
    FaissIndex.load(folder).close()  # what the first load allocates once
    before = anonymous_kib()
    index = FaissIndex.load(folder)
    assert anonymous_kib() - before < payload_kib / 2
    index.close()


def test_the_record_describes_its_snapshot(tmp_path: Path) -> None:
    index = build("ivf")
    folder = tmp_path / index.save(tmp_path, space_id="eeee")
    record = json.loads((folder / "snapshot.json").read_text())
    hashes = record.pop("sha256")
    assert record.pop("recall") == asdict(index.description.recall)
    assert record == {
        "format": 2,
        "space_id": "eeee",
        "kind": "ivf",
        "storage": "float32",
        "dim": 8,
        "count": 300,
        "lists": 68,  # 4 x 17, the root of 300 rounded down
        "probes": index.description.probes,
    }
    assert set(hashes) | {"snapshot.json"} == {path.name for path in folder.iterdir()}
    index.close()


def test_publishing_points_to_the_newest_and_keeps_the_one_before(tmp_path: Path) -> None:
    assert read_current(tmp_path) is None
    names = [publish(tmp_path, at_ms, seed=at_ms) for at_ms in (1, 2, 3)]
    assert read_current(tmp_path) == (names[2], 3)
    assert snapshots(tmp_path) == {*names[1:]}
    assert publish(tmp_path, 4, seed=2) == names[1]  # back to the former content
    assert read_current(tmp_path) == (names[1], 4)
    assert snapshots(tmp_path) == {*names[1:]}
    assert publish(tmp_path, 5, seed=2) == names[1]
    assert read_current(tmp_path) == (names[1], 5)


def test_a_snapshot_in_use_is_not_deleted(tmp_path: Path) -> None:
    first = publish(tmp_path, 1, seed=1)
    reader = FaissIndex.load(tmp_path / first)
    others = [publish(tmp_path, at_ms, seed=at_ms) for at_ms in (2, 3)]
    assert snapshots(tmp_path) == {first, *others}
    reader.close()
    last = publish(tmp_path, 4, seed=4)
    assert snapshots(tmp_path) == {others[1], last}


def test_the_draft_of_a_killed_publish_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".draft").mkdir()
    (tmp_path / ".draft" / "index.faiss").write_text("[")
    name = publish(tmp_path)
    FaissIndex.load(tmp_path / name).close()
    assert snapshots(tmp_path) == {name}


@pytest.mark.parametrize("file", ["index.faiss", "ids.utf8", "id_ends.npy", "id_order.npy", "snapshot.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_file_is_named_and_mended_by_publishing_again(file, damage, tmp_path: Path) -> None:
    folder = tmp_path / publish(tmp_path)
    path = folder / file
    content = path.read_bytes()
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(content[:-1] + (b"?" if damage == "flip" else b""))
    missing = file == "snapshot.json" and damage == "delete"
    with pytest.raises(PreconditionError if missing else IntegrityError, match="publish" if missing else file):
        FaissIndex.load(folder)
    assert publish(tmp_path) == folder.name
    assert path.read_bytes() == content
    FaissIndex.load(folder).close()


def test_a_snapshot_that_cannot_be_read_now_is_unavailable_not_missing_or_corrupt(tmp_path: Path) -> None:
    folder = tmp_path / publish(tmp_path)
    FaissIndex.load(folder).close()
    with no_file_left():
        with pytest.raises(UnavailableError, match=r"current cannot be read now .*Too many open files"):
            read_current(tmp_path)
        with pytest.raises(UnavailableError, match=rf"{folder.name} cannot be read now .*Too many open files"):
            FaissIndex.load(folder)
    FaissIndex.load(folder).close()


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (RuntimeError("could not open index.faiss for reading: Too many open files"), UnavailableError),
        (RuntimeError("could not mmap(): Cannot allocate memory"), UnavailableError),
        (MemoryError(), UnavailableError),
        (RuntimeError("Index type 0x3f3f3f3f not recognized"), IntegrityError),
    ],
)
def test_faults_of_faiss_become_different_errors(
    fault: Exception, kind: type[KarError], tmp_path: Path, monkeypatch
) -> None:
    folder = tmp_path / publish(tmp_path)

    def read_index(path: str, flags: int) -> None:
        raise fault

    monkeypatch.setattr(import_faiss(), "read_index", read_index)
    with pytest.raises(kind) as caught:
        FaissIndex.load(folder)
    assert type(caught.value) is kind


def test_a_snapshot_under_another_name_or_of_another_format_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / publish(tmp_path)
    folder.rename(tmp_path / "0123456789ab")
    with pytest.raises(IntegrityError, match=r"snapshot\.json was changed"):
        FaissIndex.load(tmp_path / "0123456789ab")
    with pytest.raises(PreconditionError, match="kar publish"):
        FaissIndex.load(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"snapshot_id": "a"}', '{"snapshot_id": "a", "published_at_ms": "x"}']
)
def test_a_damaged_pointer_is_named_and_mended_by_publishing(text, tmp_path: Path) -> None:
    (tmp_path / "current").write_text(text)
    with pytest.raises(IntegrityError, match="current does not name a snapshot"):
        read_current(tmp_path)
    name = publish(tmp_path, 3)
    assert read_current(tmp_path) == (name, 3)
