import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from kar.records.v1 import records_pb2
from kar_offline.dataset.samples import Dataset, Entity
from kar_offline.encode import HashingEncoder, encode
from kar_offline.encode import stage as encode_stage
from kar_offline.generate import write_knowledge
from kar_sidecar.errors import PreconditionError

pytestmark = pytest.mark.unit

ITEM_TEXTS = {"1": "a comedy", "3": "a long war drama"}
"""Item 2 has no knowledge."""


class Counting(HashingEncoder):
    """Remembers what it encoded; each text is reported so long that it fills a slice; may break off after some."""

    def __init__(self, dim: int = 16, breaks_after: int | None = None) -> None:
        super().__init__(dim)
        self.encoded: list[str] = []
        self.breaks_after = breaks_after

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [encode_stage.SLICE_TOKENS + length for length in super().count_tokens(texts)]

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        if len(self.encoded) == self.breaks_after:
            raise KeyboardInterrupt
        self.encoded += texts
        return super().encode(texts)


def write_texts(work: Path, items: dict[str, str]) -> None:
    kinds = [(records_pb2.ENTITY_KIND_ITEM, id_, text) for id_, text in items.items()]
    kinds.append((records_pb2.ENTITY_KIND_USER, "7", "likes drama"))
    write_knowledge(work / "knowledge", [records_pb2.KnowledgeRecord(id=i, entity=e, text=t) for e, i, t in kinds])


@pytest.fixture
def work(tmp_path: Path) -> Path:
    work = tmp_path / "work"
    for name in ("dataset", "prompts", "knowledge"):
        (work / name).mkdir(parents=True)
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
    ).save(work / "dataset")
    # Items 1 and 2 have the same raw text.
    raw = [("item", "1", "film one"), ("item", "2", "film one"), ("item", "3", "film three"), ("user", "7", "age 24")]
    prompts = (
        {"id": id_, "kind": "factual", "entity": entity, "template": "t/1", "prompt": "?", "prompt_sha256": "x"}
        | {"history_cutoff": 0, "raw_text": text}
        for entity, id_, text in raw
    )
    (work / "prompts" / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    write_texts(work, ITEM_TEXTS)
    return work


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_rows_follow_the_dataset_and_have_zeros_where_there_is_no_text(work: Path) -> None:
    result = encode(work, HashingEncoder())
    vectors = np.load(work / "encoding" / "knowledge_item.npy", mmap_mode="r")
    assert (vectors.shape, vectors.dtype) == ((3, 16), np.float32)
    np.testing.assert_array_equal(vectors[[0, 2]], HashingEncoder().encode(["a comedy", "a long war drama"]))
    assert not vectors[1].any()
    assert json.loads((work / "encoding" / "knowledge_item.json").read_text()) == {
        "encoder_id": "hashing/16",
        "dim": 16,
        "ids": ["1", "2", "3"],
        "text_sha256": [sha256("a comedy"), None, sha256("a long war drama")],
    }
    raw = np.load(work / "encoding" / "raw_user.npy")
    np.testing.assert_array_equal(raw, [*HashingEncoder().encode(["age 24"]), np.zeros(16)])
    assert result.report["texts"] == {"knowledge_item": 2, "raw_item": 3, "knowledge_user": 1, "raw_user": 1}
    # Seven texts, of which two are equal: 2 + 4 + 2 words of items' and 2 + 2 of users'.
    assert (result.report["encoded"], result.report["tokens"]) == (6, 14)
    assert sorted(path.name for path in (work / "encoding").iterdir()) == sorted(
        [f"{s}_{k}.{e}" for s in ("knowledge", "raw") for k in ("item", "user") for e in ("npy", "json")]
        + ["stage.json"]
    )


def test_a_second_run_encodes_nothing_and_a_changed_text_only_itself(work: Path) -> None:
    encoder = Counting()
    encode(work, encoder)
    assert not encode(work, encoder).ran
    assert len(encoder.encoded) == 6
    write_texts(work, ITEM_TEXTS | {"2": "a new thriller", "1": "a long war drama"})
    changed = Counting()
    report = encode(work, changed).report
    assert changed.encoded == ["a new thriller"]
    assert (report["encoded"], report["reused"]) == (1, 5)
    vectors = np.load(work / "encoding" / "knowledge_item.npy")
    expected = HashingEncoder().encode(["a long war drama", "a new thriller", "a long war drama"])
    np.testing.assert_array_equal(vectors, expected)


def test_texts_can_be_cut(work: Path) -> None:
    encode(work, HashingEncoder(), folder="encoding_2_words", words=2)
    vectors = np.load(work / "encoding_2_words" / "knowledge_item.npy")
    np.testing.assert_array_equal(vectors[[0, 2]], HashingEncoder().encode(["a comedy", "a long"]))
    assert encode(work, HashingEncoder(), folder="encoding_2_words", words=1).ran


def test_another_encoder_takes_over_nothing(work: Path) -> None:
    encode(work, HashingEncoder(16))
    other = Counting(8)
    encode(work, other)
    assert len(other.encoded) == 6
    assert np.load(work / "encoding" / "raw_item.npy").shape == (3, 8)


def test_an_interrupted_run_resumes(work: Path) -> None:
    first = Counting(breaks_after=4)
    with pytest.raises(KeyboardInterrupt):
        encode(work, first)
    assert not (work / "encoding").exists()
    # A kill may leave half an entry.
    with (work / ".encoding.draft" / encode_stage.JOURNAL).open("ab") as journal:
        journal.write(b"half an entry")
    second = Counting()
    report = encode(work, second).report
    assert len(first.encoded) == 4
    assert len(second.encoded) == 2
    assert not set(first.encoded) & set(second.encoded)
    assert (report["encoded"], report["resumed"]) == (2, 4)
    np.testing.assert_array_equal(
        np.load(work / "encoding" / "raw_item.npy"), HashingEncoder().encode(["film one", "film one", "film three"])
    )


def test_the_longest_texts_come_first(work: Path) -> None:
    encoder = Counting()
    encode(work, encoder)
    assert encoder.encoded[0] == "a long war drama"


def test_knowledge_about_others_is_refused(work: Path) -> None:
    write_texts(work, {"99": "a film of another dataset"})
    with pytest.raises(PreconditionError, match="knowledge texts are about '99'"):
        encode(work, HashingEncoder())


def test_earlier_stages_are_needed(work: Path) -> None:
    (work / "knowledge").rename(work / "elsewhere")
    with pytest.raises(PreconditionError, match="run `kar generate` first"):
        encode(work, HashingEncoder())
