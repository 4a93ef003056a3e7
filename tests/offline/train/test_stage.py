import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.support.text_vectors import write_text_vectors

from kar.records.v1 import records_pb2
from kar_kernels import HybridExpertAdaptor
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.dataset.splits import TEST, TRAIN, VALIDATION
from kar_offline.train import TrainSettings, load_trained, train
from kar_offline.train.arms import ARMS
from kar_offline.train.batches import Batches
from kar_offline.train.checkpoint import build_model
from kar_offline.train.features import encode_dataset, learn_features
from kar_offline.train.fit import STATE
from kar_offline.train.knowledge_inputs import KnowledgeInputs
from kar_offline.train.predict import predict_logits
from kar_offline.train.run import Run, train_run
from kar_offline.train.samples import samples_of_split
from kar_offline.train.vectors import load_text_vectors
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import ITEM, USER
from kar_sidecar.errors import InputError, IntegrityError, PreconditionError
from kar_sidecar.features import FeatureEncoder, FeatureLayout, History

pytestmark = pytest.mark.unit

NUMERIC, CATEGORICAL = records_pb2.FEATURE_TYPE_NUMERIC, records_pb2.FEATURE_TYPE_CATEGORICAL
SCHEMA = records_pb2.FeatureSchema(
    history_length=4,
    features=[
        records_pb2.Feature(name="age", entity=USER.number, type=NUMERIC),
        records_pb2.Feature(name="job", entity=USER.number, type=CATEGORICAL, width=1),
        records_pb2.Feature(name="genres", entity=ITEM.number, type=CATEGORICAL, width=2),
    ],
)
SMALL = TrainSettings(epochs=2, batch=8, shared_experts=1, dedicated_experts=1, expert_hidden=4, knowledge_width=3)
USERS, ITEMS, DIM = 12, 9, 5
ADAPTOR = {"dim": DIM, "hidden": 4, "out": 3, "shared": 1, "dedicated": 1}


def make_dataset(seed=0):
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(USERS), 8)
    item = np.concatenate([rng.permutation(ITEMS)[:8] for _ in range(USERS)])
    dataset = Dataset.from_events(
        "tiny",
        SCHEMA,
        [Entity(f"u{i}", {"age": 20 + i, "job": "ab"[i % 2]}, {}) for i in range(USERS)],
        [Entity(f"i{i}", {"genres": ["x", "y"][: 1 + i % 2]}, {}) for i in range(ITEMS)],
        user=user,
        item=item,
        rating=rng.integers(1, 6, len(user)).astype(np.float32),
        time=rng.integers(0, 50, len(user)),
        seed=0,
        positive_above=3,
    )
    return replace(dataset, event_split=np.repeat([TRAIN] * 8 + [VALIDATION] * 2 + [TEST] * 2, 8).astype(np.uint8))


def write_work(work, seed=0, without=1):
    """Dataset and encodings below `work`; row `without` of each kind has no text."""
    dataset = make_dataset(seed)
    work.dataset.mkdir(parents=True)
    dataset.save(work.dataset)
    generator = np.random.default_rng(seed)
    write_text_vectors(work.encoding, dataset, dim=DIM, generator=generator, without=without, encoder_id="e1")
    return dataset


def nothing(*_):
    pass


def test_learned_encodings_by_hand():
    encodings = learn_features(make_dataset()).encodings
    assert [(e.entity, e.name) for e in encodings] == [
        (USER.number, "age"),
        (USER.number, "job"),
        (ITEM.number, "genres"),
    ]
    # Training users are 20 to 27 years old: mean 23.5, variance (8^2 - 1) / 12.
    assert encodings[0].mean == pytest.approx(23.5)
    assert encodings[0].scale == pytest.approx((63 / 12) ** 0.5)
    assert list(encodings[1].vocabulary) == ["a", "b"]
    assert list(encodings[2].vocabulary) == ["x", "y"]


def test_item_vocabulary_has_the_items_of_training_users_only():
    dataset = make_dataset()
    item = dataset.event_item.copy()
    item[item == 3] = 4
    item[dataset.offsets[10]] = 3  # a test user's
    order = np.lexsort((item, dataset.event_time, dataset.event_user))
    dataset = replace(dataset, event_item=item[order], event_rating=dataset.event_rating[order])
    assert "i3" not in learn_features(dataset).item_ids
    assert len(learn_features(dataset).item_ids) == ITEMS - 1


def test_a_constant_or_absent_number_has_scale_one():
    dataset = make_dataset()
    for ages, mean in (([30.0] * USERS, 30.0), ([None] * USERS, 0.0)):
        users = [Entity(u.id, {**u.features, "age": age}, {}) for u, age in zip(dataset.users, ages, strict=True)]
        encoding = learn_features(replace(dataset, users=users)).encodings[0]
        assert (encoding.mean, encoding.scale) == (mean, 1.0)


def test_arrays_equal_what_serving_encodes():
    dataset = make_dataset()
    data = encode_dataset(dataset)
    samples = samples_of_split(data, VALIDATION)
    encoder = FeatureEncoder(SCHEMA, data.features.encodings, data.features.item_ids)
    values = Batches(data, samples, KnowledgeInputs(ARMS["control"], dataset)).inputs(torch.arange(len(samples)))
    for row, event in enumerate(dataset.samples(VALIDATION)):
        seen = dataset.history(event, 4)
        history = History(tuple(dataset.items[i].id for i in dataset.event_item[seen]), dataset.event_rating[seen])
        items, ratings = encoder.history(history)
        user, item = dataset.users[dataset.event_user[event]], dataset.items[dataset.event_item[event]]
        categories, numbers, _ = encoder.rows(
            FeatureLayout(SCHEMA, USER), FeatureLayout(SCHEMA, USER).row(user.features)
        )
        expected = {
            "history_item": items,
            "history_rating": ratings,
            "user_categorical": categories[0],
            "user_numeric": numbers[0],
            "item_index": encoder.items([item.id])[0],
        }
        for name, value in expected.items():
            np.testing.assert_array_equal(values[name][row].numpy(), value, err_msg=name)
        assert samples.label[row] == float(dataset.event_rating[event] > 3)
    known = data.columns["item_index"] >= 2
    torch.testing.assert_close(
        data.categories[data.columns["item_index"][known]], data.columns["item_categorical"][known]
    )
    assert (data.categories[:2] == 0).all()


def run_fit(folder, settings, epochs=nothing, arm="paper"):
    """Train din on the tiny dataset, with vectors that are written beside `folder`."""
    work = WorkFolder(folder / "inputs")
    if not work.root.exists():
        write_work(work, without=None)
    data = encode_dataset(make_dataset())
    return train_run(data, work.encoding, Run("din", arm), settings, folder=folder, on_epoch=epochs).fitted


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_same(a, b):
    assert a.epochs == b.epochs
    assert a.weights.keys() == b.weights.keys()
    for name, value in a.weights.items():
        assert torch.equal(value, b.weights[name]), name


@pytest.mark.usefixtures("one_thread")
def test_training_repeats_bit_for_bit_and_leaves_the_callers_random_state(tmp_path):
    settings = replace(SMALL, epochs=3, patience=9)
    state = torch.get_rng_state()
    first = run_fit(tmp_path, settings)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(77)
    (tmp_path / "again").mkdir()
    assert_same(first, run_fit(tmp_path / "again", settings))
    (tmp_path / "other").mkdir()
    other = run_fit(tmp_path / "other", replace(settings, seed=1))
    assert other.epochs != first.epochs


class Interrupted(Exception):
    pass


@pytest.mark.usefixtures("one_thread")
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path):
    settings = replace(SMALL, epochs=4, patience=9)
    (tmp_path / "whole").mkdir()
    whole = run_fit(tmp_path / "whole", settings)

    def interrupt(epoch):
        if epoch.number == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        run_fit(tmp_path, settings, interrupt)
    seen = []
    resumed = run_fit(tmp_path, settings, seen.append)
    assert_same(resumed, whole)
    assert [epoch.number for epoch in seen] == [1, 2, 3, 4]


def test_early_stopping_keeps_the_best_epoch(tmp_path):
    # A learning rate this high makes validation worse after few epochs.
    settings = replace(SMALL, epochs=50, learning_rate=0.1)
    fitted = run_fit(tmp_path, settings, arm="control")
    assert len(fitted.epochs) == fitted.best.number + settings.patience < 50
    assert fitted.best.validation_loss == min(epoch.validation_loss for epoch in fitted.epochs)
    data = encode_dataset(make_dataset())
    model = build_model("din", data.spec, data.categories, None)
    model.load_state_dict(fitted.weights)
    validation = samples_of_split(data, VALIDATION)
    feed = Batches(data, validation, KnowledgeInputs(ARMS["control"], data.dataset))
    loss = torch.nn.functional.binary_cross_entropy_with_logits(predict_logits(model, feed), validation.label)
    assert loss.item() == pytest.approx(fitted.best.validation_loss, abs=1e-6)


def test_clipping_clips(tmp_path):
    free = run_fit(tmp_path, replace(SMALL, clip_norm=1e9))
    (tmp_path / "clipped").mkdir()
    clipped = run_fit(tmp_path / "clipped", replace(SMALL, clip_norm=1e-9))
    assert [epoch.clipped_ratio for epoch in free.epochs] == [0, 0]
    assert [epoch.clipped_ratio for epoch in clipped.epochs] == [1, 1]
    assert free.epochs != clipped.epochs


def test_knowledge_dropout_trains_the_neutral_vectors(tmp_path):
    dropped = run_fit(tmp_path, replace(SMALL, knowledge_dropout=0.5, weight_decay=0))
    (tmp_path / "kept").mkdir()
    kept = run_fit(tmp_path / "kept", replace(SMALL, knowledge_dropout=0.0, weight_decay=0))
    assert not kept.weights["adaptor.user_neutral"].any()
    assert not kept.weights["adaptor.item_neutral"].any()
    assert dropped.weights["adaptor.user_neutral"].all()
    assert dropped.weights["adaptor.item_neutral"].all()


def test_predictions_equal_one_sample_at_a_time(tmp_path):
    dataset = write_work(WorkFolder(tmp_path))
    data = encode_dataset(dataset)
    samples = samples_of_split(data, TEST)
    given = KnowledgeInputs.for_training(
        ARMS["paper"], data, samples_of_split(data, TRAIN), tmp_path / "encoding", seed=0
    )
    torch.manual_seed(0)
    model = build_model("dcnv2", given.spec(data.spec, 3), data.categories, {**ADAPTOR, "towers": ("user", "item")})
    torch.nn.init.normal_(model.adaptor.user_neutral)
    texts, expected = given.texts, []
    batches = Batches(data, samples, given)
    for i in range(len(samples)):
        at = torch.tensor([i])
        user, item = samples.user[i], samples.item[i]
        own = {
            "user_knowledge": model.adaptor.tower(texts.user[user : user + 1], "user"),
            "item_knowledge": model.adaptor.tower(texts.item[item : item + 1], "item"),
        }
        if not texts.user_present[user]:
            own["user_knowledge"] = model.adaptor.user_neutral[None]
        if not texts.item_present[item]:
            own["item_knowledge"] = model.adaptor.item_neutral[None]
        expected.append(model.eval()({**batches.inputs(at), **own}))
    found = predict_logits(model, batches)
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-6)


def test_train_load_and_second_run(tmp_path):
    dataset = write_work(WorkFolder(tmp_path))
    seen = []
    arms = ["control", "knowledge"]
    result = train(
        WorkFolder(tmp_path), ["dcnv2"], arms, SMALL, workers=0, on_epoch=lambda run, _: seen.append(run.name)
    )
    assert result.ran
    assert sorted(seen) == ["dcnv2_control"] * 2 + ["dcnv2_knowledge"] * 2
    folder = tmp_path / "training" / "dcnv2_knowledge"
    assert {path.name for path in folder.iterdir()} >= {"model.safetensors", "config.json", "metrics.json"}
    assert not (folder / STATE).exists()
    trained = load_trained(WorkFolder(tmp_path), "dcnv2", "knowledge")
    assert not trained.backbone.training
    assert not trained.adaptor.training
    assert isinstance(trained.adaptor, HybridExpertAdaptor)
    assert trained.encoder_id == "e1"
    assert list(trained.item_ids) == learn_features(dataset).item_ids
    assert list(trained.encodings) == learn_features(dataset).encodings
    data = encode_dataset(dataset)
    given = KnowledgeInputs.for_training(
        ARMS["knowledge"], data, samples_of_split(data, TRAIN), tmp_path / "encoding", seed=0
    )
    torch.testing.assert_close(trained.affinity.vectors, given.affinity.vectors)
    assert trained.affinity.segments == given.affinity.segments == (("text", 64),)
    logits = predict_logits(trained.model, Batches(data, samples_of_split(data, VALIDATION), given))
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, samples_of_split(data, VALIDATION).label)
    assert loss.item() == pytest.approx(trained.metrics["validation_loss"], abs=1e-6)
    control = load_trained(WorkFolder(tmp_path), "dcnv2", "control")
    assert (control.adaptor, control.affinity, control.encoder_id) == (None, None, "")
    assert (folder / "curves.png").stat().st_size > 1000

    again = train(WorkFolder(tmp_path), ["dcnv2"], arms, SMALL, workers=0)
    assert not again.ran
    assert again.report == result.report
    assert train(WorkFolder(tmp_path), ["dcnv2"], ["control"], replace(SMALL, seed=5), workers=0).ran


def test_an_interrupted_stage_resumes(tmp_path):
    write_work(WorkFolder(tmp_path))

    def interrupt(_, epoch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(WorkFolder(tmp_path), ["din"], ["raw_text"], SMALL, workers=0, on_epoch=interrupt)
    with pytest.raises(PreconditionError, match="kar train"):
        load_trained(WorkFolder(tmp_path), "din", "raw_text")
    seen = []
    train(
        WorkFolder(tmp_path),
        ["din"],
        ["raw_text"],
        SMALL,
        workers=0,
        on_epoch=lambda _, epoch: seen.append(epoch.number),
    )
    assert seen == [1, 2]
    assert load_trained(WorkFolder(tmp_path), "din", "raw_text").metrics["best_epoch"] in (1, 2)


def test_refusals(tmp_path):
    with pytest.raises(InputError, match="choose from"):
        train(WorkFolder(tmp_path), ["perceptron"], workers=0)
    with pytest.raises(InputError, match="control, raw_text, knowledge, "):
        train(WorkFolder(tmp_path), ["din"], ["llm"], workers=0)
    with pytest.raises(PreconditionError, match="kar train"):
        load_trained(WorkFolder(tmp_path), "din", "control")


def test_corrupt_models_are_named(tmp_path):
    write_work(WorkFolder(tmp_path))
    train(WorkFolder(tmp_path), ["dcnv2"], ["control"], SMALL, workers=0)
    model = tmp_path / "training" / "dcnv2_control" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-9])
    with pytest.raises(IntegrityError, match="dcnv2_control"):
        load_trained(WorkFolder(tmp_path), "dcnv2", "control")


def test_vectors_are_checked_against_the_dataset(tmp_path):
    dataset = write_work(WorkFolder(tmp_path))
    vectors = load_text_vectors(tmp_path / "encoding", "raw", dataset)
    assert vectors.dim == DIM
    assert vectors.user_present.tolist() == [True, False] + [True] * (USERS - 2)
    header = tmp_path / "encoding" / "raw_item.json"
    values = json.loads(header.read_text())
    header.write_text(json.dumps({**values, "ids": values["ids"][::-1]}))
    with pytest.raises(IntegrityError, match="raw_item"):
        load_text_vectors(tmp_path / "encoding", "raw", dataset)
    header.write_text(json.dumps({**values, "encoder_id": "e2"}))
    with pytest.raises(IntegrityError, match="two encoders"):
        load_text_vectors(tmp_path / "encoding", "raw", dataset)
    header.unlink()
    with pytest.raises(PreconditionError, match="kar encode"):
        load_text_vectors(tmp_path / "encoding", "raw", dataset)
