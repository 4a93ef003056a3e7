from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.support.rounding import SCORE_LIMIT
from tests.support.text_vectors import write_text_vectors

from kar.records.v1 import records_pb2
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.dataset.splits import TEST, TRAIN, VALIDATION
from kar_offline.train.arms import ARMS, Arm
from kar_offline.train.batches import Batches
from kar_offline.train.features import encode_dataset
from kar_offline.train.knowledge_inputs import CHUNK_ROWS, KnowledgeInputs
from kar_offline.train.principal_components import principal_components
from kar_offline.train.samples import samples_before, samples_of_split
from kar_offline.train.vectors import load_text_vectors
from kar_sidecar.entities import USER
from kar_sidecar.ranking.affinity import STATISTICS

pytestmark = pytest.mark.unit

DIM = 6
SCHEMA = records_pb2.FeatureSchema(
    history_length=3,
    features=[records_pb2.Feature(name="age", entity=USER.number, type=records_pb2.FEATURE_TYPE_NUMERIC)],
)


@pytest.fixture
def work(tmp_path):
    """Twelve users with ten ratings of twenty items; item 3 and user 3 have no text."""
    rng = np.random.default_rng(1)
    user = np.repeat(np.arange(12), 10)
    dataset = Dataset.from_events(
        "tiny",
        SCHEMA,
        [Entity(f"u{i}", {"age": i}, {}) for i in range(12)],
        [Entity(f"i{i:02}", {}, {}) for i in range(20)],
        user=user,
        item=np.concatenate([rng.permutation(20)[:10] for _ in range(12)]),
        rating=rng.integers(1, 6, len(user)).astype(np.float32),
        time=np.tile(np.arange(10), 12),
        seed=0,
        positive_above=3,
    )
    dataset = replace(dataset, event_split=np.repeat([TRAIN] * 8 + [VALIDATION] * 2 + [TEST] * 2, 10).astype(np.uint8))
    write_text_vectors(tmp_path, dataset, dim=DIM, generator=rng, without=3)
    return tmp_path, encode_dataset(dataset)


def given_of(work, arm):
    folder, data = work
    return KnowledgeInputs.for_training(
        arm if isinstance(arm, Arm) else ARMS[arm], data, samples_of_split(data, TRAIN), folder, seed=0
    )


def test_principal_components_keep_similarities_and_ignore_absent_rows():
    rng = np.random.default_rng(0)
    # Points of a plane in five dimensions: two components hold all there is.
    vectors = torch.from_numpy((rng.normal(size=(40, 2)) @ rng.normal(size=(2, 5))).astype(np.float32))
    present = torch.arange(40) != 7
    vectors[7] = 1e6
    found = principal_components(vectors, present, 2)
    centred = vectors[present] - vectors[present].mean(0)
    expected = torch.nn.functional.normalize(centred)
    torch.testing.assert_close(found[present] @ found[present].T, expected @ expected.T, rtol=0, atol=1e-5)
    assert not found[7].any()
    assert principal_components(vectors, present, 9).shape == (40, 9)
    assert not principal_components(vectors, torch.zeros(40) > 0, 3).any()


def test_columns_by_hand(work):
    _, data = work
    given = given_of(work, "knowledge")
    samples = samples_of_split(data, TEST)
    columns = given.affinity_columns(samples) * given.affinity.scale + given.affinity.mean
    dataset, vectors = data.dataset, given.affinity.vectors.numpy()
    for row, event in enumerate(dataset.samples(TEST)):
        before = np.arange(dataset.offsets[dataset.event_user[event]], event)
        ratings = dataset.event_rating[before]
        weights = ratings - ratings.mean()
        known = vectors[dataset.event_item[before]].any(1)
        expected = [np.log1p(len(before)), ratings.mean(), ratings.std()]
        candidate = vectors[dataset.event_item[event]]
        if candidate.any():
            s, w = (vectors[dataset.event_item[before]] @ candidate)[known], weights[known]
            expected.append((s * w).sum() / len(s))
            expected += [(np.exp(s / t) * w).sum() / np.exp(s / t).sum() for t in (0.05, 0.1, 0.2)]
            liked = np.maximum(w, 0)
            expected += [(s * liked).sum() / liked.sum() if liked.any() else 0, s.max()]
        else:
            expected += [0] * 6
        np.testing.assert_allclose(columns[row].numpy(), expected, atol=2e-5)


def test_columns_are_standardised_on_training_rows(work):
    given = given_of(work, "knowledge")
    columns = given.affinity_columns(samples_of_split(work[1], TRAIN))
    torch.testing.assert_close(columns.mean(0), torch.zeros(columns.shape[1]), rtol=0, atol=1e-4)
    torch.testing.assert_close(columns.std(0), torch.ones(columns.shape[1]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_gives_what_its_model_reads(work, arm):
    _, data = work
    given = given_of(work, arm)
    spec = given.spec(data.spec, 3)
    feed = Batches(data, samples_of_split(data, TRAIN), given)
    batch = feed.batch(torch.arange(7), 0.3)
    adapted = {f"{tower}_knowledge" for tower in batch.encodings}
    assert set(batch.inputs) | adapted == set(spec.names) - {"request_of_row"}
    assert all(torch.isfinite(x).all() for x in batch.inputs.values() if x.is_floating_point())
    if spec.affinity:
        assert batch.inputs["affinity"].shape == (7, spec.affinity)
    if spec.vector:
        assert batch.inputs["item_vector"].shape == (7, spec.vector)


def test_dropout_of_everything_is_what_the_neutral_rung_sees(work):
    _, data = work
    given = given_of(work, "cf_knowledge")
    rows, at = samples_of_split(data, TEST), torch.arange(5)
    dropped = Batches(data, rows, given).batch(at, 1.0)
    neutral = Batches(data, rows, given.without_knowledge_of(("user", "item"))).batch(at, 0.0)
    torch.testing.assert_close(dropped.inputs["affinity"], neutral.inputs["affinity"])
    statistics = Batches(data, rows, given).affinity[at, : len(STATISTICS)]
    torch.testing.assert_close(dropped.inputs["affinity"][:, : len(STATISTICS)], statistics)
    for batch in (dropped, neutral):
        item = batch.encodings["item"]
        assert not item.present[item.row].any()


def test_both_texts_are_side_by_side(work):
    _, data = work
    samples = samples_of_split(data, TEST)
    texts = [given_of(work, arm).affinity_columns(samples) for arm in ("knowledge", "raw_text", "cf")]
    own = slice(len(STATISTICS), None)
    both, all_three = (given_of(work, arm).affinity_columns(samples) for arm in ("both_texts", "cf_both_texts"))
    torch.testing.assert_close(both, torch.cat([texts[0], texts[1][:, own]], 1), rtol=0, atol=SCORE_LIMIT)
    torch.testing.assert_close(all_three, torch.cat([both, texts[2][:, own]], 1), rtol=0, atol=SCORE_LIMIT)


def test_texts_of_the_other_arms(work):
    folder, data = work
    knowledge, raw, shuffled, noise = (
        load_text_vectors(folder, texts, data.dataset, seed=0) for texts in ("knowledge", "raw", "shuffled", "random")
    )
    assert not torch.equal(raw.item, knowledge.item)
    assert not torch.equal(shuffled.item, knowledge.item)
    assert sorted(map(tuple, shuffled.item.tolist())) == sorted(map(tuple, knowledge.item.tolist()))
    assert not shuffled.item[3].any()
    torch.testing.assert_close(noise.item.norm(dim=1), torch.ones(20))
    assert torch.equal(load_text_vectors(folder, "shuffled", data.dataset, seed=0).item, shuffled.item)


def test_learned_affinity_reads_vectors_of_the_history(work):
    _, data = work
    given = given_of(work, "learned_affinity")
    samples = samples_of_split(data, TEST)
    found = given.affinity_vectors(samples, torch.tensor([2]))
    event = int(samples.event[2])
    before = np.arange(data.dataset.offsets[data.dataset.event_user[event]], event)
    ratings = data.dataset.event_rating[before]
    table = given.affinity.vectors
    torch.testing.assert_close(found["history_vector"][0, : len(before)], table[data.dataset.event_item[before]])
    np.testing.assert_allclose(found["history_weight"][0, : len(before)], ratings - ratings.mean(), atol=SCORE_LIMIT)
    assert not found["history_vector"][0, len(before) :].any()
    assert not found["history_weight"][0, len(before) :].any()
    torch.testing.assert_close(found["item_vector"][0], table[samples.item[2]])


def test_lists_share_one_request(work):
    _, data = work
    dataset = data.dataset
    events = dataset.samples(TEST)[[1, 1, 6, 6]]
    lists = samples_before(data, events, np.array([4, 5, 6, 7]), np.zeros(4, np.float32), list_length=2)
    single = samples_before(data, events, np.array([4, 5, 6, 7]), np.zeros(4, np.float32))
    given = given_of(work, "cf_knowledge")
    ours, theirs = Batches(data, lists, given), Batches(data, single, given)
    torch.testing.assert_close(ours.affinity, theirs.affinity)
    inputs = ours.inputs(torch.tensor([2, 3, 0, 1]))
    assert inputs["request_of_row"].tolist() == [0, 0, 1, 1]
    assert inputs["history_item"].tolist() == single.history_item[[2, 0]].tolist()
    assert inputs["item_index"].tolist() == theirs.inputs(torch.tensor([2, 3, 0, 1]))["item_index"].tolist()
    for at in ours.in_random_order(2, torch.Generator().manual_seed(0)):
        assert at.tolist() in ([0, 1], [2, 3])


def test_a_list_longer_than_a_chunk_has_the_columns_of_its_rows(work):
    _, data = work
    event = data.dataset.samples(TEST)[:1]
    items = np.random.default_rng(0).integers(0, 20, CHUNK_ROWS + 7)
    events, labels = np.repeat(event, len(items)), np.zeros(len(items), np.float32)
    given = given_of(work, "knowledge")
    whole = given.affinity_columns(samples_before(data, events, items, labels, list_length=len(items)))
    torch.testing.assert_close(whole, given.affinity_columns(samples_before(data, events, items, labels)))


def test_an_arm_without_texts_is_refused():
    with pytest.raises(ValueError, match="which texts"):
        Arm(towers=("item",))


@pytest.mark.parametrize("arm", ["control", "knowledge", "cf_knowledge"])
def test_training_users_are_served_from_the_table_of_everybody(work, arm):
    folder, data = work
    given = given_of(work, arm)
    samples = samples_of_split(data, TRAIN)
    served = KnowledgeInputs.for_serving(ARMS[arm], data.dataset, given.affinity, folder, seed=0).affinity_columns(
        samples
    )
    torch.testing.assert_close(given.as_served().affinity_columns(samples), served, rtol=0, atol=0)
    assert torch.equal(given.affinity_columns(samples), served) == (arm != "cf_knowledge")
