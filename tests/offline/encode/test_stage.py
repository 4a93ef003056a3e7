import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from kar.records.v1 import records_pb2
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.encode import encode
from kar_offline.encode.stage import JOURNAL
from kar_offline.encode.vector_files import imputed_ids
from kar_offline.encoders.hashing import HashingEncoder
from kar_offline.encoders.text_encoder import EncodedTexts, gather
from kar_offline.knowledge.records import write_knowledge
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import ITEM, USER, EntityKind
from kar_sidecar.errors import PreconditionError

pytestmark = pytest.mark.unit

ITEM_TEXTS = {"1": "a comedy", "3": "a long war drama"}
"""Item 2 has no text: its vector is imputed. User 8 has neither text nor facts."""


class Counting(HashingEncoder):
    """Records the texts that it encodes; raises KeyboardInterrupt after `breaks_after` texts."""

    def __init__(self, dim: int = 16, breaks_after: int | None = None) -> None:
        super().__init__(dim)
        self.encoded: list[str] = []
        self.breaks_after = breaks_after

    def stream(self, texts: Sequence[str]) -> Iterator[EncodedTexts]:
        for encoded in super().stream(texts):
            if len(self.encoded) == self.breaks_after:
                raise KeyboardInterrupt
            self.encoded += [texts[row] for row in encoded.rows]
            yield encoded


def write_texts(work: WorkFolder, items: dict[str, str]) -> None:
    kinds = [(ITEM, id_, text) for id_, text in items.items()]
    kinds.append((USER, "7", "likes drama"))
    write_knowledge(
        work.knowledge, [records_pb2.KnowledgeRecord(id=i, entity=kind.number, text=t) for kind, i, t in kinds]
    )


@pytest.fixture
def work(tmp_path: Path) -> WorkFolder:
    work = WorkFolder(tmp_path / "work")
    for name in ("dataset", "prompts", "knowledge"):
        (work.root / name).mkdir(parents=True)
    Dataset.from_events(
        "made",
        records_pb2.FeatureSchema(history_length=3),
        [Entity("7", {}, {}), Entity("8", {}, {})],
        [Entity(str(i), {}, {"title": f"Film {i}"}) for i in (1, 2, 3)],
        user=np.array([0, 0]),
        item=np.array([0, 1]),
        rating=np.array([3.0, 4.0], dtype=np.float32),
        time=np.array([10, 20]),
        seed=1,
        positive_above=3.0,
    ).save(work.dataset)
    # Items 1 and 2 have the same raw text.
    raw = [("item", "1", "film one"), ("item", "2", "film one"), ("item", "3", "film three"), ("user", "7", "age 24")]
    prompts = (
        {"id": id_, "kind": "factual", "entity": entity, "template": "t/1", "prompt": "?", "prompt_sha256": "x"}
        | {"history_cutoff": 0, "raw_text": text}
        | {"title": "", "context": {}, "expires_after_days": None, "expires_on": None}
        for entity, id_, text in raw
    )
    (work.prompts / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    write_texts(work, ITEM_TEXTS)
    return work


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_rows_follow_the_dataset_and_have_zeros_where_there_is_no_text(work: WorkFolder) -> None:
    result = encode(work, HashingEncoder())
    vectors = np.load(work.encoding / "knowledge_item.npy", mmap_mode="r")
    assert (vectors.shape, vectors.dtype) == ((3, 16), np.float32)
    np.testing.assert_array_equal(vectors[[0, 2]], HashingEncoder().encode(["a comedy", "a long war drama"]))
    assert json.loads((work.encoding / "knowledge_item.json").read_text()) == {
        "encoder_id": "hashing/16",
        "dim": 16,
        "ids": ["1", "2", "3"],
        "text_sha256": [
            sha256("a comedy"),
            hashlib.sha256(vectors[1].tobytes()).hexdigest(),
            sha256("a long war drama"),
        ],
        "lent": ["2"],
    }
    users = np.load(work.encoding / "knowledge_user.npy")
    np.testing.assert_array_equal(users, [*HashingEncoder().encode(["likes drama"]), np.zeros(16)])
    about = json.loads((work.encoding / "knowledge_user.json").read_text())
    assert (about["text_sha256"], about["lent"]) == ([sha256("likes drama"), None], [])
    raw = np.load(work.encoding / "raw_user.npy")
    np.testing.assert_array_equal(raw, [*HashingEncoder().encode(["age 24"]), np.zeros(16)])
    assert result.report.texts == {"knowledge_item": 2, "raw_item": 3, "knowledge_user": 1, "raw_user": 1}
    # Seven texts, of which two are equal: 2 + 4 + 2 words of items' and 2 + 2 of users'.
    assert (result.report.encoded, result.report.tokens) == (6, 14)
    assert sorted(path.name for path in (work.encoding).iterdir()) == sorted(
        [f"{s}_{k}.{e}" for s in ("knowledge", "raw") for k in ("item", "user") for e in ("npy", "json")]
        + ["stage.json"]
    )


def test_a_second_run_encodes_nothing_and_a_changed_text_only_itself(work: WorkFolder) -> None:
    encoder = Counting()
    encode(work, encoder)
    assert not encode(work, encoder).ran
    assert len(encoder.encoded) == 6
    write_texts(work, ITEM_TEXTS | {"2": "a new thriller", "1": "a long war drama"})
    changed = Counting()
    report = encode(work, changed).report
    assert changed.encoded == ["a new thriller"]
    assert (report.encoded, report.reused) == (1, 5)
    vectors = np.load(work.encoding / "knowledge_item.npy")
    expected = HashingEncoder().encode(["a long war drama", "a new thriller", "a long war drama"])
    np.testing.assert_array_equal(vectors, expected)


def test_long_texts_can_be_shortened_to_their_first_words(work: WorkFolder) -> None:
    encode(work, HashingEncoder(), folder="encoding_2_words", words=2)
    vectors = np.load(work.root / "encoding_2_words" / "knowledge_item.npy")
    np.testing.assert_array_equal(vectors[[0, 2]], HashingEncoder().encode(["a comedy", "a long"]))
    assert encode(work, HashingEncoder(), folder="encoding_2_words", words=1).ran


def test_another_encoder_reuses_no_vectors(work: WorkFolder) -> None:
    encode(work, HashingEncoder(16))
    other = Counting(8)
    encode(work, other)
    assert len(other.encoded) == 6
    assert np.load(work.encoding / "raw_item.npy").shape == (3, 8)


def test_an_interrupted_run_resumes(work: WorkFolder) -> None:
    first = Counting(breaks_after=4)
    with pytest.raises(KeyboardInterrupt):
        encode(work, first)
    assert not (work.encoding).exists()
    # A kill may leave half an entry.
    with (work.root / ".encoding.draft" / JOURNAL).open("ab") as journal:
        journal.write(b"half an entry")
    second = Counting()
    report = encode(work, second).report
    assert len(first.encoded) == 4
    assert len(second.encoded) == 2
    assert not set(first.encoded) & set(second.encoded)
    assert (report.encoded, report.resumed) == (2, 4)
    np.testing.assert_array_equal(
        np.load(work.encoding / "raw_item.npy"), HashingEncoder().encode(["film one", "film one", "film three"])
    )


def test_knowledge_about_others_is_refused(work: WorkFolder) -> None:
    write_texts(work, {"99": "a film of another dataset"})
    with pytest.raises(PreconditionError, match="knowledge texts are about '99'"):
        encode(work, HashingEncoder())


def test_earlier_stages_are_needed(work: WorkFolder) -> None:
    (work.knowledge).rename(work.root / "elsewhere")
    with pytest.raises(PreconditionError, match="run `kar generate` first"):
        encode(work, HashingEncoder())


DIRECTIONS = {"east": [1, 0], "north": [0, 1], "film one": [1, 0], "film three": [1, 0], "age 24": [1, 0]}


class Compass:
    """Encodes the texts of `DIRECTIONS`."""

    encoder_id = "compass"
    dim = 2

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def stream(self, texts: Sequence[str]) -> Iterator[EncodedTexts]:
        self.encoded += texts
        vectors = np.array([DIRECTIONS[text] for text in texts], np.float32).reshape(-1, 2)
        yield EncodedTexts(range(len(texts)), vectors, len(texts))

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        return gather(self, texts)


def record(kind: EntityKind, identity: str, text: str = "", **weights: float) -> records_pb2.KnowledgeRecord:
    """`weights` are those of neighbours, named without the slash: cluster0 is cluster/0, item1 is item 1."""
    ids = {name: name.replace("cluster", "cluster/").removeprefix("item").removeprefix("user") for name in weights}
    loans = [records_pb2.Loan(id=ids[name], weight=weight) for name, weight in weights.items()]
    return records_pb2.KnowledgeRecord(id=identity, entity=kind.number, text=text, loans=loans)


def header(work: WorkFolder, name: str = "knowledge_item") -> dict:
    return json.loads((work.encoding / f"{name}.json").read_text())


def test_an_imputed_vector_is_the_weighted_mean_of_its_neighbours(work: WorkFolder) -> None:
    own = [
        record(ITEM, "1", "north"),
        record(ITEM, "2", item1=4 / 7, cluster0=3 / 7),
        record(ITEM, "3", cluster0=1),
    ]
    write_knowledge(work.knowledge, [*own, record(USER, "7", cluster0=1)], [record(ITEM, "cluster/0", "east")])
    report = encode(work, Compass()).report
    vectors = np.load(work.encoding / "knowledge_item.npy")
    # (3, 4) / 7 has the direction (0.6, 0.8).
    np.testing.assert_allclose(vectors, [[0, 1], [0.6, 0.8], [1, 0]], atol=1e-6)
    assert header(work)["lent"] == ["2", "3"]
    assert imputed_ids(work.encoding, "knowledge", "item") == {"2", "3"}
    assert imputed_ids(work.encoding, "raw", "item") == set()
    assert header(work)["text_sha256"][0] == sha256("north")
    # Clusters of items are no neighbours of users, and no user has a text.
    assert header(work, "knowledge_user")["text_sha256"] == [None, None]
    assert not np.load(work.encoding / "knowledge_user.npy").any()
    assert np.load(work.encoding / "knowledge_item_clusters.npy").tolist() == [[1, 0]]
    assert header(work, "knowledge_item_clusters")["ids"] == ["cluster/0"]
    assert report.lent == {"knowledge_item": 2}
    assert report.texts["knowledge_item"] == report.texts["knowledge_item_clusters"] == 1


def test_a_neighbour_without_a_text_does_not_count(work: WorkFolder) -> None:
    # Cluster 9 was quarantined, item 3 has an imputed vector, cluster 1 has an empty text.
    own = [
        record(ITEM, "1", cluster0=0.2, cluster9=0.5, item3=0.3),
        record(ITEM, "2", cluster9=0.5, cluster1=0.5),
        record(ITEM, "3", cluster0=1),
    ]
    write_knowledge(work.knowledge, own, [record(ITEM, "cluster/0", "north"), record(ITEM, "cluster/1")])
    encode(work, Compass())
    assert np.load(work.encoding / "knowledge_item.npy").tolist() == [[0, 1], [0, 0], [0, 1]]
    assert header(work)["lent"] == ["1", "3"]
    assert header(work)["text_sha256"][1] is None
    assert header(work, "knowledge_item_clusters")["text_sha256"] == [sha256("north"), None]


def test_an_own_text_goes_before_neighbours(work: WorkFolder) -> None:
    own = [record(ITEM, "1", "north", cluster0=1)]
    write_knowledge(work.knowledge, own, [record(ITEM, "cluster/0", "east")])
    encode(work, Compass())
    assert np.load(work.encoding / "knowledge_item.npy")[0].tolist() == [0, 1]
    assert "1" not in header(work)["lent"]


def test_without_text_and_record_a_vector_is_imputed_from_the_most_similar_facts(work: WorkFolder) -> None:
    # Item 2 has an imputed vector, so it is no neighbour, though its facts are those of item 3.
    own = [record(ITEM, "1", "north"), record(ITEM, "2", cluster0=1)]
    write_knowledge(work.knowledge, own, [record(ITEM, "cluster/0", "east")])
    report = encode(work, Compass()).report
    assert np.load(work.encoding / "knowledge_item.npy").tolist() == [[0, 1], [1, 0], [0, 1]]
    assert header(work)["lent"] == ["2", "3"]
    assert report.lent == {"knowledge_item": 2}
    # An own text replaces the imputed vector; item 1's is now imputed.
    write_knowledge(work.knowledge, [record(ITEM, "3", "east")])
    encode(work, Compass())
    assert np.load(work.encoding / "knowledge_item.npy").tolist() == [[1, 0], [1, 0], [1, 0]]
    assert header(work)["lent"] == ["1", "2"]


def test_a_changed_weight_changes_the_hash_and_encodes_nothing(work: WorkFolder) -> None:
    clusters = [record(ITEM, "cluster/0", "east"), record(ITEM, "cluster/1", "north")]
    hashes = []
    for weight in (0.5, 0.25, 0.25):
        own = [record(ITEM, "1", "north"), record(ITEM, "2", cluster0=weight, cluster1=1 - weight)]
        write_knowledge(work.knowledge, own, clusters)
        encoder = Compass()
        encode(work, encoder)
        hashes.append(header(work)["text_sha256"][1])
        # The text that a cluster and an item have in common is encoded once.
        assert sorted(encoder.encoded) == ([] if len(hashes) > 1 else sorted(DIRECTIONS))
    assert hashes[0] != hashes[1] == hashes[2]
    write_knowledge(work.knowledge, own, [clusters[0], record(ITEM, "cluster/1", "east")])
    encode(work, Compass())
    assert header(work)["text_sha256"][1] not in hashes


def test_headers_of_older_releases_name_no_imputed_rows(work: WorkFolder) -> None:
    (work.encoding).mkdir()
    (work.encoding / "knowledge_item.json").write_text(
        '{"encoder_id": "e", "dim": 1, "ids": ["1"], "text_sha256": ["00"]}'
    )
    assert imputed_ids(work.encoding, "knowledge", "item") == set()


def test_texts_of_clusters_are_shortened_too(work: WorkFolder) -> None:
    write_knowledge(work.knowledge, [record(ITEM, "1", cluster0=1)], [record(ITEM, "cluster/0", "a long tale")])
    encode(work, HashingEncoder(), words=2)
    vectors = np.load(work.encoding / "knowledge_item.npy")
    np.testing.assert_allclose(vectors[0], HashingEncoder().encode(["a long"])[0], atol=1e-6)


def test_records_of_unknown_entities_are_refused(work: WorkFolder) -> None:
    write_knowledge(work.knowledge, [record(ITEM, "99", item1=1)])
    with pytest.raises(PreconditionError, match="knowledge texts are about '99'"):
        encode(work, HashingEncoder())
