"""FAISS reaches the required recall against exact search, and only one FAISS distribution may be installed."""

import tomllib
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import pytest
from tests.support.paths import ROOT
from tests.support.rounding import float32_limit

from kar_sidecar.errors import InputError, NotFoundError, PreconditionError, UnavailableError, UnsupportedError
from kar_sidecar.index import VectorIndex, unit_rows
from kar_sidecar.index.config import FLAT_UP_TO, KINDS, IndexConfig, MeasuredRecall
from kar_sidecar.index.exact import ExactIndex
from kar_sidecar.index.faiss import FaissIndex
from kar_sidecar.index.library import import_faiss, require_one_faiss

pytestmark = pytest.mark.unit

IMPLEMENTATIONS: list[type[VectorIndex]] = [ExactIndex, FaissIndex]
IDS = ["east", "north", "north-east", "nowhere"]
VECTORS = np.array([[2, 0], [0, 0.5], [3, 3], [0, 0]], np.float32)
both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
kinds = pytest.mark.parametrize("kind", KINDS)


def clustered(count: int, dim: int = 12, seed: int = 7) -> np.ndarray:
    random = np.random.default_rng(seed)
    centres = random.normal(size=(max(count // 25, 1), dim))
    return (centres[random.integers(len(centres), size=count)] + random.normal(size=(count, dim))).astype(np.float32)


def named(count: int) -> list[str]:
    return [str(row) for row in range(count)]


@both
def test_the_nearest_come_first_whatever_their_length(implementation: type[VectorIndex]) -> None:
    index = implementation.build(IDS, VECTORS)
    found = index.search(np.array([[10, 0], [1, 2]]), 3)
    half = 0.5**0.5
    assert found.ids[0][:2] == ["east", "north-east"]
    assert found.ids[1] == ["north-east", "north", "east"]
    expected = [[1, half, 0], [3 * half / 5**0.5, 2 / 5**0.5, 1 / 5**0.5]]  # <(1,2),(1,1)> / (sqrt 5 sqrt 2) ...
    np.testing.assert_allclose(found.similarities, expected, atol=float32_limit(64))
    assert (index.dim, len(index)) == (2, 4)
    index.close()


@both
def test_all_entities_are_found_when_more_are_requested(implementation: type[VectorIndex]) -> None:
    index = implementation.build(IDS, VECTORS)
    found = index.search(np.ones((1, 2)), 10)
    assert sorted(found.ids[0]) == sorted(IDS)
    assert found.similarities.shape == (1, 4)
    assert len(index.search_like("east", 10).ids[0]) == 3
    index.close()


@both
def test_an_empty_index_finds_nothing(implementation: type[VectorIndex]) -> None:
    index = implementation.build([], np.zeros((0, 3), np.float32))
    found = index.search(np.ones((2, 3)), 5)
    assert found.ids == [[], []]
    assert found.similarities.shape == (2, 0)
    index.close()


@both
def test_an_entity_is_not_its_own_neighbour(implementation: type[VectorIndex]) -> None:
    twins = implementation.build(["b", "a", "far"], np.array([[1, 0], [2, 0], [0, 1]], np.float32))
    assert twins.search_like("a", 2).ids == [["b", "far"]]
    assert twins.search_like("b", 1).ids == [["a"]]
    np.testing.assert_allclose(twins.search_like("a", 2).similarities, [[1, 0]], atol=float32_limit(64))
    with pytest.raises(NotFoundError, match="'stranger'"):
        twins.search_like("stranger", 1)
    with pytest.raises(InputError, match="at least 1"):
        twins.search_like("a", 0)
    twins.close()


@kinds
def test_every_kind_finds_what_exact_search_finds(kind) -> None:
    vectors, queries = clustered(800), clustered(20, seed=8)
    exact = ExactIndex.build(named(800), vectors)
    index = FaissIndex.build(named(800), vectors, IndexConfig(kind, recall=1.0))
    expected, found = exact.search(queries, 10), index.search(queries, 10)
    if kind == "hnsw":  # all of 800 rows' own neighbours are found, and nearly all of others'
        assert np.mean([len(set(a) & set(b)) for a, b in zip(found.ids, expected.ids, strict=True)]) > 9
    else:
        assert found.ids == expected.ids
        np.testing.assert_allclose(found.similarities, expected.similarities, atol=float32_limit(64))
    assert all(index.search_like(str(row), 5).ids == exact.search_like(str(row), 5).ids for row in range(0, 800, 50))
    index.close()


@kinds
def test_the_reported_recall_is_the_share_of_the_exact_ten_nearest(kind) -> None:
    vectors, queries = clustered(600), clustered(80, seed=9)
    config = IndexConfig(kind, recall=0.2, probes=2, ef_search=11, links=3, ef_construction=4)
    index = FaissIndex.build(named(600), vectors, config, queries=queries)
    expected = ExactIndex.build(named(600), vectors).search(queries, 10).ids
    hits = [len(set(a) & set(b)) for a, b in zip(index.search(queries, 10).ids, expected, strict=True)]
    recall = index.description.recall
    assert recall == MeasuredRecall(at=10, value=pytest.approx(np.mean(hits) / 10, abs=1e-6), required=0.2, queries=80)
    assert (recall.value == 1) is (kind == "flat")
    index.close()


@kinds
def test_recall_is_measured_with_vectors_that_are_not_in_the_index(kind) -> None:
    vectors = clustered(300, 24)
    measured_with = []
    for config in (IndexConfig(kind, recall=0.9, sample=20), IndexConfig(kind, recall=0.9)):
        index = FaissIndex.build(named(300), vectors, config)
        measured_with.append(index.description.recall.queries)
        assert [index.search(vectors[row : row + 1], 1).ids[0] for row in range(300)] == [[id_] for id_ in named(300)]
        index.close()
    assert measured_with == [20, 30]  # a tenth at most


@pytest.mark.parametrize(("kind", "name"), [("ivf", "probes"), ("hnsw", "ef_search")])
def test_the_smallest_search_effort_that_reaches_the_recall_is_chosen(kind, name) -> None:
    vectors = clustered(1500, 24)
    base = {"links": 4, "ef_construction": 16}
    index = FaissIndex.build(named(1500), vectors, IndexConfig(kind, recall=0.9, **base))
    chosen = getattr(index.description, name)
    assert index.description.recall.value >= 0.9
    index.close()
    with pytest.raises(InputError, match=rf"{name} {chosen - 1}, and 0.9 is required: raise {name}"):
        FaissIndex.build(named(1500), vectors, IndexConfig(kind, recall=0.9, **base, **{name: chosen - 1}))


def test_a_recall_out_of_reach_says_what_was_reached_and_what_to_raise() -> None:
    vectors = np.random.default_rng(0).normal(size=(3000, 64))
    hopeless = IndexConfig("hnsw", recall=1.0, links=2, ef_construction=1)
    with pytest.raises(InputError, match=r"finds 0\.\d+ of the exact 10 nearest with ef_search 1024.*links or ef_cons"):
        FaissIndex.build(named(3000), vectors, hopeless)
    with pytest.raises(InputError, match=r"flat index in int8 .*: keep float32"):
        FaissIndex.build(named(3000), vectors, IndexConfig("flat", recall=1.0, storage="int8"))


@kinds
@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_compressed_vectors_are_searched_by_cosine_too(kind, storage) -> None:
    vectors = clustered(400)
    index = FaissIndex.build(named(400), vectors, IndexConfig(kind, storage=storage, recall=0.9))
    found, exact = index.search_like("7", 5), ExactIndex.build(named(400), vectors).search_like("7", 5)
    np.testing.assert_allclose(found.similarities, exact.similarities, atol=0.05)
    index.close()


def test_the_kind_follows_the_size_unless_it_is_named() -> None:
    assert [IndexConfig().kind_for(count) for count in (0, FLAT_UP_TO, FLAT_UP_TO + 1)] == ["flat", "flat", "hnsw"]
    assert IndexConfig("ivf").kind_for(3) == "ivf"
    assert IndexConfig("ivf").factory(10_000) == "IVF400,Flat"
    assert IndexConfig("ivf", lists=9, storage="int8").factory(4) == "IVF4,SQ8"
    assert IndexConfig("hnsw", storage="float16").factory(4) == "HNSW16,SQfp16"


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "tree"},
        {"storage": "bits"},
        {"recall": 0},
        {"recall": 1.1},
        {"links": 1},
        {"probes": 0},
        {"threads": 0},
    ],
)
def test_configurations_out_of_range_are_refused(wrong) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        IndexConfig(**wrong)


def test_many_threads_share_one_index() -> None:
    vectors = np.random.default_rng(8).normal(size=(200, 8))
    index = FaissIndex.build(named(200), vectors)
    with ThreadPoolExecutor(8) as callers:
        answers = list(callers.map(lambda row: index.search(vectors[row : row + 1], 1).ids[0][0], range(200)))
    assert answers == named(200)
    index.close()


def test_waiting_searches_share_one_call_and_get_the_answers_of_single_searches() -> None:
    vectors = clustered(300)
    index, exact = FaissIndex.build(named(300), vectors), ExactIndex.build(named(300), vectors)
    calls: list[tuple[int, int]] = []
    busy, free, inner = Event(), Event(), index._index

    class Slow:
        def search(self, queries, k):
            calls.append((len(queries), k))
            busy.set()
            assert free.wait(30)
            return inner.search(queries, k)

    index._index = Slow()
    first = index.submit(vectors[:1], 3)
    assert busy.wait(30)
    waiting = [index.submit(vectors[row : row + 2], 3) for row in range(5)]
    like, unknown, other = index.submit_like("9", 2), index.submit_like("?", 2), index.submit(vectors[:1], 7)
    cancelled = index.submit(vectors, 3)
    assert cancelled.cancel()
    free.set()
    for row, future in enumerate(waiting):
        assert future.result().ids == exact.search(vectors[row : row + 2], 3).ids
    assert first.result().ids == exact.search(vectors[:1], 3).ids
    assert like.result().ids == exact.search_like("9", 2).ids
    assert other.result().ids == exact.search(vectors[:1], 7).ids
    assert isinstance(unknown.exception(), NotFoundError)
    assert calls == [(1, 3), (11, 3), (1, 7)]
    index.close()


def test_a_request_that_fails_fails_alone_and_the_next_is_answered() -> None:
    index = FaissIndex.build(IDS, VECTORS)
    entries, ids, inner, busy, free = index._cpu_index, index._ids, index._index, Event(), Event()

    class Broken:
        """Fails for the first row, and lets requests gather before it searches."""

        def reconstruct(self, row):
            if row == 0:
                raise MemoryError
            return entries.reconstruct(row)

        def search(self, queries, k):
            busy.set()
            assert free.wait(30)
            return inner.search(queries, k)

        def row(self, id_):
            return ids.row(id_)

        def at(self, rows):
            if 0 in rows:
                raise IndexError("beyond its end")
            return ids.at(rows)

        def __len__(self):
            return len(ids)

    index._cpu_index = index._ids = index._index = Broken()
    first = index.submit(unit_rows(VECTORS[1:2]), 1)
    assert busy.wait(30)
    unread, unnamed, other = index.submit_like("east", 1), index.submit(VECTORS[:1], 1), index.submit(VECTORS[1:2], 1)
    free.set()
    assert isinstance(unread.exception(30), MemoryError)
    assert isinstance(unnamed.exception(30), IndexError)
    assert other.result(30).ids == first.result(30).ids == [["north"]]
    index.close()


def test_closing_answers_earlier_requests() -> None:
    vectors = clustered(100)
    index = FaissIndex.build(named(100), vectors)
    futures = [index.submit(vectors[row : row + 1], 1) for row in range(100)]
    index.close()
    assert [future.result().ids for future in futures] == [[[str(row)]] for row in range(100)]
    with pytest.raises(UnavailableError, match="closed"):
        index.submit(vectors, 1)
    index.close()  # again


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
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    sets = {"": project["dependencies"], **project["optional-dependencies"]}
    brings = {
        name: {kind for kind in ("cpu", "gpu") if any(line.startswith(f"faiss-{kind}") for line in lines)}
        for name, lines in sets.items()
    }
    assert {name: kinds for name, kinds in brings.items() if kinds} == {"cpu": {"cpu"}, "gpu": {"gpu"}}
    assert not [line for lines in sets.values() for line in lines if line.startswith("kar-sidecar[")]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_a_gpu_finds_what_exact_search_finds(kind) -> None:
    if not import_faiss().get_num_gpus():
        pytest.skip("FAISS finds no GPU here")
    vectors = clustered(800)
    index, exact = FaissIndex.build(named(800), vectors, IndexConfig(kind)), ExactIndex.build(named(800), vectors)
    assert type(index._index).__name__.startswith("GpuIndex")
    for row in range(0, 800, 50):
        assert index.search_like(str(row), 1).ids == exact.search_like(str(row), 1).ids
    index.close()
