"""FAISS finds what exact search finds, snapshots are checked, and only one FAISS may be installed."""

import json
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kar_sidecar.errors import InputError, IntegrityError, PreconditionError, UnsupportedError
from kar_sidecar.index import VectorIndex, unit_rows
from kar_sidecar.index.exact import ExactIndex
from kar_sidecar.index.faiss import FaissIndex, require_one_faiss

pytestmark = pytest.mark.unit

IMPLEMENTATIONS: list[type[VectorIndex]] = [ExactIndex, FaissIndex]
IDS = ["east", "north", "north-east", "nowhere"]
VECTORS = np.array([[2, 0], [0, 0.5], [3, 3], [0, 0]], np.float32)
both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@both
def test_the_nearest_come_first_whatever_their_length(implementation: type[VectorIndex]) -> None:
    index = implementation.build(IDS, VECTORS)
    found = index.search(np.array([[10, 0], [1, 2]]), 3)
    half = 0.5**0.5
    assert found.ids[0][:2] == ["east", "north-east"]
    assert found.ids[1] == ["north-east", "north", "east"]
    expected = [[1, half, 0], [3 * half / 5**0.5, 2 / 5**0.5, 1 / 5**0.5]]  # <(1,2),(1,1)> / (sqrt 5 sqrt 2) ...
    np.testing.assert_allclose(found.similarities, expected, atol=1e-6)
    assert index.dim == 2
    index.close()


@both
def test_fewer_entities_than_asked_for_are_all_found(implementation: type[VectorIndex]) -> None:
    index = implementation.build(IDS, VECTORS)
    found = index.search(VECTORS[:1], 10)
    assert sorted(found.ids[0]) == sorted(IDS)
    assert found.similarities.shape == (1, 4)
    assert index.search(np.zeros((0, 2)), 2).similarities.shape == (0, 2)
    index.close()


@both
def test_an_empty_index_finds_nothing(implementation: type[VectorIndex]) -> None:
    index = implementation.build([], np.zeros((0, 2)))
    found = index.search(np.ones((2, 2)), 3)
    assert (found.ids, found.similarities.shape) == ([[], []], (2, 0))
    index.close()


def test_faiss_agrees_with_exact_search() -> None:
    random = np.random.default_rng(7)
    vectors = random.normal(size=(500, 24))
    queries = random.normal(size=(40, 24))
    ids = [f"i{row}" for row in range(500)]
    exact, approximate = ExactIndex.build(ids, vectors), FaissIndex.build(ids, vectors)
    expected, found = exact.search(queries, 10), approximate.search(queries, 10)
    assert found.ids == expected.ids
    np.testing.assert_allclose(found.similarities, expected.similarities, atol=1e-6)
    approximate.close()


def test_many_threads_share_one_index() -> None:
    random = np.random.default_rng(8)
    vectors = random.normal(size=(200, 8))
    ids = [str(row) for row in range(200)]
    index = FaissIndex.build(ids, vectors)
    with ThreadPoolExecutor(8) as callers:
        answers = list(callers.map(lambda row: index.search(vectors[row : row + 1], 1).ids[0][0], range(200)))
    assert answers == ids
    index.close()


@both
def test_a_snapshot_finds_the_same(implementation: type[VectorIndex], tmp_path: Path) -> None:
    ids = ["a\nb", "é", "", "nul\0"]
    index = implementation.build(ids, VECTORS)
    index.save(tmp_path / "index" / "item")
    loaded = implementation.load(tmp_path / "index" / "item")
    assert loaded.dim == 2
    queries = np.array([[1, 0.1], [0.2, 1]])
    assert loaded.search(queries, 2).ids == index.search(queries, 2).ids == [["a\nb", ""], ["é", ""]]
    assert [path.name for path in (tmp_path / "index").iterdir()] == ["item"]  # no draft is left
    index.close()
    loaded.close()


@both
def test_snapshots_are_immutable(implementation: type[VectorIndex], tmp_path: Path) -> None:
    index = implementation.build(IDS, VECTORS)
    index.save(tmp_path / "index")
    with pytest.raises(PreconditionError, match="immutable"):
        index.save(tmp_path / "index")
    index.close()


@both
def test_the_draft_of_a_killed_save_is_replaced(implementation: type[VectorIndex], tmp_path: Path) -> None:
    (tmp_path / ".index.draft").mkdir()
    (tmp_path / ".index.draft" / "ids.json").write_text("[")
    index = implementation.build(IDS, VECTORS)
    index.save(tmp_path / "index")
    implementation.load(tmp_path / "index").close()
    index.close()


@both
@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "foreign ids"])
def test_a_damaged_file_is_named(implementation: type[VectorIndex], damage: str, tmp_path: Path) -> None:
    index = implementation.build(IDS, VECTORS)
    index.save(tmp_path / "index")
    index.close()
    payload = next(path for path in (tmp_path / "index").iterdir() if path.suffix != ".json")
    if damage == "flip":
        payload.write_bytes(payload.read_bytes()[:-1] + b"?")
    elif damage == "cut":
        payload.write_bytes(payload.read_bytes()[:-4])
    elif damage == "delete":
        payload.unlink()
    else:
        payload = tmp_path / "index" / "ids.json"
        payload.write_text(json.dumps(["other", *IDS[1:]]))
    with pytest.raises(IntegrityError, match=payload.name):
        implementation.load(tmp_path / "index")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "exact"}', '{"format": "exact", "dim": "x"}'])
def test_a_damaged_record_is_named(text: str, tmp_path: Path) -> None:
    ExactIndex.build(IDS, VECTORS).save(tmp_path / "index")
    (tmp_path / "index" / "snapshot.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"snapshot\.json"):
        ExactIndex.load(tmp_path / "index")


@both
def test_no_snapshot_is_a_precondition(implementation: type[VectorIndex], tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match="kar publish"):
        implementation.load(tmp_path)


def test_a_snapshot_of_another_implementation_is_refused(tmp_path: Path) -> None:
    ExactIndex.build(IDS, VECTORS).save(tmp_path / "index")
    with pytest.raises(IntegrityError, match="'exact'"):
        FaissIndex.load(tmp_path / "index")


@both
def test_entries_that_do_not_fit_are_refused(implementation: type[VectorIndex]) -> None:
    for ids, vectors in [
        (IDS[:3], VECTORS),
        (["same"] * 4, VECTORS),
        (IDS, VECTORS * np.nan),
        (IDS, VECTORS[0]),
    ]:
        with pytest.raises(InputError):
            implementation.build(ids, vectors)


@both
def test_queries_that_do_not_fit_are_refused(implementation: type[VectorIndex]) -> None:
    index = implementation.build(IDS, VECTORS)
    for queries, k in [(np.ones((1, 3)), 1), (np.ones((1, 2)), 0), (np.full((1, 2), np.inf), 1), (np.ones(2), 1)]:
        with pytest.raises(InputError):
            index.search(queries, k)
    index.close()


def test_unit_rows_of_very_long_and_very_short_vectors() -> None:
    rows = unit_rows(np.array([[3e38, 0], [0, 1e-38], [3e30, 4e30]], np.float32))
    np.testing.assert_allclose(rows, [[1, 0], [0, 1], [0.6, 0.8]], rtol=1e-6)


def test_exactly_one_faiss_may_be_installed() -> None:
    require_one_faiss(["faiss-cpu"])
    require_one_faiss(["faiss-gpu"])
    with pytest.raises(UnsupportedError, match="extra `cpu` or `gpu`"):
        require_one_faiss([])
    with pytest.raises(PreconditionError, match="faiss-cpu and faiss-gpu are both installed"):
        require_one_faiss(["faiss-gpu", "faiss-cpu"])


def test_no_extra_brings_both_faiss_distributions() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    sets = {"": project["dependencies"], **project["optional-dependencies"]}
    brings = {
        name: {kind for kind in ("cpu", "gpu") if any(line.startswith(f"faiss-{kind}") for line in lines)}
        for name, lines in sets.items()
    }
    assert {name: kinds for name, kinds in brings.items() if kinds} == {"cpu": {"cpu"}, "gpu": {"gpu"}}
    assert not [line for lines in sets.values() for line in lines if line.startswith("kar-sidecar[")]
