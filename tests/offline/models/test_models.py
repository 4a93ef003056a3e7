import math
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from tests.support.rounding import SCORE_LIMIT

from kar_kernels import HybridExpertAdaptor
from kar_offline.models import BACKBONES, CTRModel, Encodings, Field, Identity, InputSpec, build_backbone
from kar_offline.models.backbone import LearnedAffinity
from kar_offline.models.layers import MLP, Dice, MultiFieldEmbedding
from kar_offline.models.onnx import export_onnx
from kar_sidecar.errors import InputError
from kar_sidecar.scoring import AFFINITY, KNOWLEDGE_INPUTS, VECTOR_INPUTS

pytestmark = pytest.mark.unit

SPEC = InputSpec(
    items=40,
    user_fields=(Field(4, 1), Field(9, 1)),
    item_fields=(Field(8, 3),),
    user_numbers=1,
    item_numbers=1,
    user_knowledge=5,
    item_knowledge=5,
    affinity=4,
    vector=6,
)
CONTROL = replace(SPEC, user_knowledge=0, item_knowledge=0, affinity=0, vector=0)
ITEM_ONLY = replace(SPEC, user_knowledge=0, vector=0)
BARE = InputSpec(items=40, user_fields=(), item_fields=(), user_numbers=0, item_numbers=0)


def make(name, spec=SPEC, seed=0):
    torch.manual_seed(seed)
    categories = torch.randint(0, 8 if spec.item_fields else 1, (spec.items, spec.item_columns))
    backbone = build_backbone(name, spec, categories)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for label, buffer in backbone.named_buffers():
            if label.endswith("variance"):
                buffer.uniform_(0.5, 2)
    return backbone.eval()


def inputs(spec, candidates, requests, events=6, seed=1, rated=5):
    g = torch.Generator().manual_seed(seed)

    def indices(high, *shape):
        return torch.randint(0, high, shape, generator=g)

    user_high = min((f.size for f in spec.user_fields), default=1)
    item_high = min((f.size for f in spec.item_fields), default=1)
    history = indices(spec.items, requests, events)
    history[:, events // 2 :] = 0
    values = {
        "history_item": history,
        "history_rating": torch.where(history > 0, indices(10, requests, events) + 1, 0),
        "user_categorical": indices(user_high, requests, spec.user_columns),
        "user_numeric": torch.randn(requests, max(spec.user_numbers, 1), generator=g),
        "item_index": indices(spec.items, candidates),
        "item_categorical": indices(item_high, candidates, spec.item_columns),
        "item_numeric": torch.randn(candidates, max(spec.item_numbers, 1), generator=g),
        "request_of_row": indices(requests, candidates),
        "user_knowledge": torch.randn(requests, spec.user_knowledge, generator=g),
        "item_knowledge": torch.randn(candidates, spec.item_knowledge, generator=g),
        "affinity": torch.randn(candidates, spec.affinity, generator=g),
        "item_vector": torch.randn(candidates, spec.vector, generator=g),
        "history_vector": torch.randn(requests, rated, spec.vector, generator=g),
        "history_weight": torch.randn(requests, rated, generator=g),
    }
    values["history_vector"][:, (rated + 1) // 2 :] = 0
    values["history_weight"][:, (rated + 1) // 2 :] = 0
    return {name: values[name] for name in spec.names}


def rows(values, at):
    """Candidates `at` of `values`, with all requests."""
    return {name: value if name.startswith(("user", "history")) else value[at] for name, value in values.items()}


@pytest.mark.parametrize("name", BACKBONES)
class TestEveryBackbone:
    def test_gives_probabilities(self, name):
        score = make(name)(inputs(SPEC, 11, 3))
        assert score.shape == (11,)
        assert score.dtype == torch.float32
        assert ((score > 0) & (score < 1)).all()
        assert score.std() > 1e-3

    def test_score_does_not_depend_on_batch_mates_or_order(self, name):
        backbone, values = make(name), inputs(SPEC, 11, 3)
        together = backbone(values)
        order = torch.randperm(11)
        torch.testing.assert_close(backbone(rows(values, order)), together[order], rtol=0, atol=SCORE_LIMIT)
        for i in range(11):
            torch.testing.assert_close(backbone(rows(values, [i])), together[[i]], rtol=0, atol=SCORE_LIMIT)

    def test_score_does_not_depend_on_other_requests(self, name):
        backbone, values = make(name), inputs(SPEC, 11, 3)
        own = torch.nonzero(values["request_of_row"] == 1).squeeze(1)
        alone = {
            label: value[1:2] if label.startswith(("user", "history")) else value
            for label, value in rows(values, own).items()
        }
        alone["request_of_row"] = torch.zeros(len(own), dtype=torch.int64)
        torch.testing.assert_close(backbone(alone), backbone(values)[own], rtol=0, atol=SCORE_LIMIT)

    def test_score_does_not_depend_on_padding(self, name):
        backbone, values = make(name), inputs(SPEC, 11, 3)
        longer = dict(values)
        for label in ("history_item", "history_rating", "history_vector", "history_weight"):
            longer[label] = torch.cat([values[label], torch.zeros_like(values[label])], 1)
        torch.testing.assert_close(backbone(longer), backbone(values), rtol=0, atol=SCORE_LIMIT)

    def test_score_depends_on_every_input(self, name):
        backbone, values = make(name), inputs(SPEC, 11, 3)
        score = backbone(values)
        for label, value in values.items():
            if value.is_floating_point():
                other = value * -1.5
            else:
                other = value.flip(0)
            assert not torch.allclose(backbone({**values, label: other}), score, atol=1e-5), label

    def test_empty_history_and_one_row(self, name):
        values = inputs(SPEC, 1, 1)
        values["history_item"] = torch.zeros(1, 6, dtype=torch.int64)
        values["history_rating"] = torch.zeros(1, 6, dtype=torch.int64)
        assert torch.isfinite(make(name)(values)).all()

    def test_training_step_with_a_batch_of_one(self, name):
        backbone = make(name).train()
        values = inputs(SPEC, 1, 1)
        backbone.logits(values).sum().backward()
        for label, parameter in backbone.named_parameters():
            assert parameter.grad is not None, label
            assert torch.isfinite(parameter.grad).all(), label

    def test_one_request_a_candidate_without_request_of_row(self, name):
        backbone, values = make(name), inputs(SPEC, 4, 4)
        values["request_of_row"] = torch.arange(4)
        expected = backbone(values)
        del values["request_of_row"]
        torch.testing.assert_close(backbone(values), expected, rtol=0, atol=0)

    def test_without_fields_numbers_and_knowledge(self, name):
        assert make(name, BARE)(inputs(BARE, 3, 2)).shape == (3,)

    def test_gradients_reach_all_knowledge(self, name):
        backbone = make(name).train()
        values = inputs(SPEC, 6, 3)
        given = [label for label in (*KNOWLEDGE_INPUTS, AFFINITY, *VECTOR_INPUTS) if label in values]
        assert len(given) == 6
        for label in given:
            values[label].requires_grad_()
        backbone.loss(backbone.logits(values), torch.tensor([1.0, 0, 1, 0, 1, 0])).backward()
        for label in given:
            assert values[label].grad.abs().sum() > 0, label

    def test_loss_falls(self, name):
        torch.manual_seed(0)
        values, labels = inputs(SPEC, 64, 16), (torch.arange(64) % 2).float()
        backbone = build_backbone(name, SPEC, torch.zeros(40, 3, dtype=torch.int64)).train()
        optimiser = torch.optim.Adam(backbone.parameters(), lr=3e-3)
        losses = []
        for _ in range(60):
            loss = backbone.loss(backbone.logits(values), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5])

    @pytest.mark.parametrize("spec", [SPEC, ITEM_ONLY, CONTROL, BARE], ids=["all", "item only", "control", "bare"])
    def test_onnx_matches_torch(self, name, spec, tmp_path):
        backbone = make(name, spec)
        export_onnx(backbone, tmp_path / "model.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
        assert [tensor.name for tensor in session.get_inputs()] == list(spec.names)
        assert [tensor.name for tensor in session.get_outputs()] == ["score"]
        for candidates, requests, events, rated in ((1, 1, 6, 3), (37, 3, 6, 5), (5, 2, 1, 1), (2, 4, 30, 100)):
            values = inputs(spec, candidates, requests, events, candidates, rated)
            (score,) = session.run(None, {label: value.numpy() for label, value in values.items()})
            np.testing.assert_allclose(score, backbone(values).detach().numpy(), rtol=0, atol=1e-5)

    def test_onnx_export_is_reproducible(self, name, tmp_path):
        for file in ("a", "b"):
            export_onnx(make(name), tmp_path / file)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_dcnv2_by_hand():
    # One cross layer on a flat input of four numbers: user 0.5, item -2, mean history (item 3, rating 5).
    spec = replace(BARE, user_numbers=1, item_numbers=1)
    backbone = BACKBONES["dcnv2"](
        spec, torch.zeros(40, 1, dtype=torch.int64), embedding=1, crosses=1, hidden=(1,)
    ).eval()
    with torch.no_grad():
        backbone.items.id.copy_(torch.arange(40.0).unsqueeze(1))
        backbone.ratings.weight.copy_(torch.arange(21.0).unsqueeze(1))
        for layer in (backbone.crosses[0], backbone.deep[0][0], backbone.output):
            layer.weight.fill_(0.1)
            layer.bias.fill_(0.2)
    values = {
        "history_item": torch.tensor([[2, 4, 0]]),
        "history_rating": torch.tensor([[4, 6, 0]]),
        "user_categorical": torch.tensor([[0]]),
        "user_numeric": torch.tensor([[0.5]]),
        "item_index": torch.tensor([7]),
        "item_categorical": torch.tensor([[0]]),
        "item_numeric": torch.tensor([[-2.0]]),
        "request_of_row": torch.tensor([0]),
    }
    flat = [0.5, 3.0, 5.0, 7.0, -2.0]
    linear = 0.1 * sum(flat) + 0.2
    crossed = [x * linear + x for x in flat]
    logit = 0.1 * (sum(crossed) + linear) + 0.2
    torch.testing.assert_close(backbone(values), torch.tensor([1 / (1 + math.exp(-logit))]))


def test_din_with_equal_weights_pools_the_sum_of_real_events():
    backbone = make("din")
    with torch.no_grad():
        backbone.attend.weight.zero_()
        backbone.attend.bias.fill_(1)
    values = inputs(SPEC, 4, 2)
    expected = []
    for request in values["request_of_row"]:
        items, ratings = values["history_item"][request], values["history_rating"][request]
        real = items != 0
        categories = backbone.items.categories[items[real]]
        of_items = backbone.items(items[real], categories).sum(0)
        expected.append(torch.cat([of_items, backbone.ratings.weight[ratings[real]].sum(0)]))
    pooled = backbone.pool(values, torch.randn(4, backbone.items.width))
    torch.testing.assert_close(pooled, torch.stack(expected), rtol=1e-5, atol=SCORE_LIMIT)


def test_multi_field_embedding_by_hand():
    layer = MultiFieldEmbedding((Field(3, 1), Field(4, 3)), 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([9.0, 1, 2, 9, 10, 20, 40]).unsqueeze(1))
    out = layer(torch.tensor([[2, 1, 3, 0], [0, 0, 0, 0]]))
    torch.testing.assert_close(out, torch.tensor([[2.0, (10 + 40) / 2], [0.0, 0.0]]))


def test_dice_by_hand():
    dice = Dice(1, momentum=0.5, eps=0.0)
    x = torch.tensor([[1.0], [3.0], [100.0]])
    real = torch.tensor([[1.0], [1.0], [0.0]])
    with torch.no_grad():
        dice.alpha.fill_(0.25)
    # Real rows have mean 2 and variance 1.
    p = [1 / (1 + math.exp(-z)) for z in (-1, 1)]
    expected = torch.tensor([[p[0] * 1 + (1 - p[0]) * 0.25], [p[1] * 3 + (1 - p[1]) * 0.25 * 3]])
    torch.testing.assert_close(dice(x, real)[:2], expected)
    torch.testing.assert_close((dice.mean, dice.variance), (torch.tensor([1.0]), torch.tensor([1.0])))
    dice.eval()
    p = 1 / (1 + math.exp(-(3 - 1)))
    torch.testing.assert_close(dice(x[1:2]), torch.tensor([[p * 3 + (1 - p) * 0.75]]))


def test_mlp_widths():
    assert MLP(7, (5, 3), lambda _: torch.nn.ReLU(), 0.1)(torch.zeros(2, 7)).shape == (2, 3)


def test_ctr_model_gathers_distinct_entities():
    torch.manual_seed(0)
    backbone, adaptor = make("dcnv2"), HybridExpertAdaptor(6, hidden=4, out=5, shared=1, dedicated=1)
    with torch.no_grad():
        adaptor.user_neutral.fill_(2)
    model = CTRModel(backbone, adaptor).eval()
    values = inputs(SPEC, 3, 2)
    user, item = torch.randn(2, 6), torch.randn(2, 6)
    encodings = {
        "user": Encodings(user, torch.tensor([True, False]), torch.tensor([1, 0])),
        "item": Encodings(item, torch.tensor([True, True]), torch.tensor([0, 1, 1])),
    }
    expected = {
        **values,
        "user_knowledge": torch.stack([torch.full((5,), 2.0), adaptor.tower(user, "user")[0]]),
        "item_knowledge": adaptor.tower(item, "item")[[0, 1, 1]],
    }
    torch.testing.assert_close(model(values, encodings), backbone.logits(expected))


def test_ctr_model_refuses_sizes_that_do_not_fit():
    for adaptor in (None, HybridExpertAdaptor(6, out=5, towers=["item"]), HybridExpertAdaptor(6, out=4)):
        with pytest.raises(ValueError, match="knowledge width"):
            CTRModel(make("dcnv2"), adaptor)


def test_identity_passes_encodings_and_learns_the_neutral_one():
    identity = Identity(2, ("item",))
    with torch.no_grad():
        identity.missing["item"].copy_(torch.tensor([7.0, 8.0]))
    found = identity.adapt({"item": (torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([True, False]))})["item"]
    assert found.tolist() == [[1, 2], [7, 8]]


def test_affinities_have_a_direct_part_and_noise_in_training_alone():
    spec = replace(BARE, affinity=4)
    backbone, values = make("dcnv2", spec), inputs(spec, 8, 2)
    plain = backbone.logits(values)
    with torch.no_grad():
        backbone.direct.weight.add_(2)
    torch.testing.assert_close(backbone.logits(values), plain + 2 * values["affinity"].sum(1))
    torch.testing.assert_close(backbone.logits(values), backbone.logits(values))
    backbone.train()
    backbone.deep.eval()
    assert not torch.allclose(backbone.logits(values), backbone.logits(values))


def test_learned_affinity_by_hand():
    layer = LearnedAffinity(2, heads=1, width=2)
    with torch.no_grad():
        layer.project.weight.copy_(torch.eye(2))
        layer.log_scale.zero_()
    item = torch.tensor([[1.0, 0.0]])
    history = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])
    found = layer(item, history, torch.tensor([[2.0, -1.0, 0.0]]))
    share = math.e / (math.e + 1)
    torch.testing.assert_close(found, torch.tensor([[2 * share - (1 - share)]]))
    assert layer(item, torch.zeros(1, 3, 2), torch.zeros(1, 3)).tolist() == [[0]]


def test_export_refuses_training_mode(tmp_path):
    with pytest.raises(ValueError, match="eval"):
        export_onnx(make("din").train(), tmp_path / "model.onnx")


def test_unknown_backbone():
    with pytest.raises(InputError, match="choose from dcn, dcnv2"):
        build_backbone("perceptron", SPEC, torch.zeros(40, 3, dtype=torch.int64))


def test_spec_survives_json():
    assert InputSpec.from_json(SPEC.to_json()) == SPEC
