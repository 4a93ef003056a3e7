from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from tests.support.rounding import SCORE_LIMIT

from kar_offline.models import RERANKERS, Field, InputSpec, build_backbone
from kar_offline.models.onnx import export_onnx
from kar_offline.models.reranker import AttentionBlock, ListView
from kar_sidecar.scoring import AFFINITY, KNOWLEDGE_INPUTS, VECTOR_INPUTS

pytestmark = pytest.mark.unit

CONTROL = InputSpec(items=30, user_fields=(Field(4, 1),), item_fields=(Field(8, 2),), user_numbers=1, item_numbers=1)
SPEC = replace(CONTROL, user_knowledge=5, item_knowledge=5, affinity=4, vector=6)
SETS = ("setrank", "mir")
"""Models to which the order of a list means nothing."""


def make(name, spec=SPEC):
    torch.manual_seed(0)
    model = build_backbone(name, spec, torch.randint(0, 8, (spec.items, 2)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def inputs(lengths, spec=SPEC, events=6, rated=5, seed=1):
    """Lists of the given lengths, one request each."""
    g = torch.Generator().manual_seed(seed)
    n, r = sum(lengths), len(lengths)
    history = torch.randint(1, spec.items, (r, events), generator=g)
    history[:, events // 2 :] = 0
    vectors = torch.randn(r, rated, spec.vector, generator=g)
    vectors[:, 2:] = 0
    weights = torch.randn(r, rated, generator=g)
    weights[:, 2:] = 0
    values = {
        "history_item": history,
        "history_rating": torch.where(history > 0, torch.randint(1, 11, (r, events), generator=g), 0),
        "user_categorical": torch.randint(0, 4, (r, 1), generator=g),
        "user_numeric": torch.randn(r, 1, generator=g),
        "item_index": torch.randint(0, spec.items, (n,), generator=g),
        "item_categorical": torch.randint(0, 8, (n, 2), generator=g),
        "item_numeric": torch.randn(n, 1, generator=g),
        "request_of_row": torch.repeat_interleave(torch.arange(r), torch.tensor(lengths)),
        "user_knowledge": torch.randn(r, spec.user_knowledge, generator=g),
        "item_knowledge": torch.randn(n, spec.item_knowledge, generator=g),
        "affinity": torch.randn(n, spec.affinity, generator=g),
        "item_vector": torch.randn(n, spec.vector, generator=g),
        "history_vector": vectors,
        "history_weight": weights,
    }
    return {name: values[name] for name in spec.names}


def take(values, rows, requests):
    """Some rows of some requests, which are numbered anew."""
    out = {
        name: value[requests] if name.startswith(("user", "history")) else value[rows] for name, value in values.items()
    }
    number = {request: new for new, request in enumerate(requests)}
    out["request_of_row"] = torch.tensor([number[int(request)] for request in out["request_of_row"]])
    return out


def test_lists_and_back():
    values = inputs([2, 3, 1])
    view = ListView.of(values)
    rows = torch.arange(6.0).unsqueeze(1) + 1
    lists = view.lists(rows)
    assert lists.squeeze(2).tolist() == [[1, 2, 0], [3, 4, 5], [6, 0, 0]]
    assert view.real.tolist() == [[True, True, False], [True] * 3, [True, False, False]]
    assert view.position.tolist() == [0, 1, 0, 1, 2, 0]
    assert torch.equal(view.rows(lists), rows)
    del values["request_of_row"]
    alone = ListView.of({**values, "history_item": values["history_item"][[0] * 6]})
    assert alone.lists(rows).squeeze(2).tolist() == [[1], [2], [3], [4], [5], [6]]


def test_attention_by_hand():
    block = AttentionBlock(2, 1, 0.0)
    with torch.no_grad():
        for layer in (block.query, block.merge, block.feed[0], block.feed[2], block.key_value):
            layer.bias.zero_()
        block.query.weight.copy_(torch.eye(2))
        block.key_value.weight.copy_(torch.cat([torch.eye(2), torch.eye(2)]))
        block.merge.weight.copy_(torch.eye(2))
        block.feed[2].weight.zero_()
    queries, keys = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]]])
    share = torch.softmax(torch.tensor([1 / 2**0.5, 0.0]), 0)
    mixed = queries[0, 0] + share[0] * keys[0, 0] + share[1] * keys[0, 1]
    norm = torch.nn.functional.layer_norm
    expected = norm(norm(mixed, (2,)), (2,))
    found = block(queries, keys, torch.tensor([[True, True, False]]))
    torch.testing.assert_close(found[0, 0], expected)


@pytest.mark.parametrize("name", RERANKERS)
class TestEveryReranker:
    def test_gives_probabilities_that_depend_on_the_list(self, name):
        model, values = make(name), inputs([4, 3])
        score = model(values)
        assert ((score > 0) & (score < 1)).all()
        changed = dict(values, item_numeric=values["item_numeric"].clone())
        changed["item_numeric"][0] += 3
        other = model(changed)
        assert not torch.allclose(other[1:4], score[1:4], atol=SCORE_LIMIT)  # its list-mates
        torch.testing.assert_close(other[4:], score[4:], rtol=0, atol=SCORE_LIMIT)  # the other list

    def test_neither_other_requests_nor_padding_matter(self, name):
        model, values = make(name), inputs([3, 9, 1])
        together = model(values)
        torch.testing.assert_close(model(take(values, range(3), [0])), together[:3], rtol=0, atol=SCORE_LIMIT)
        torch.testing.assert_close(model(take(values, [12], [2])), together[12:], rtol=0, atol=SCORE_LIMIT)
        longer = dict(values)
        for label in ("history_item", "history_rating", "history_vector", "history_weight"):
            longer[label] = torch.cat([values[label], torch.zeros_like(values[label])], 1)
        torch.testing.assert_close(model(longer), together, rtol=0, atol=SCORE_LIMIT)

    def test_order(self, name):
        model, values = make(name), inputs([5])
        order = [3, 0, 4, 2, 1]
        moved = model(take(values, order, [0]))
        same = torch.allclose(moved, model(values)[order], atol=SCORE_LIMIT)
        assert same == (name in SETS)

    def test_empty_history_and_long_lists(self, name):
        values = inputs([100])
        values["history_item"].zero_()
        values["history_rating"].zero_()
        assert torch.isfinite(make(name)(values)).all()

    def test_gradients_reach_all_knowledge(self, name):
        model, values = make(name).train(), inputs([10, 10])
        for label in (given := [*KNOWLEDGE_INPUTS, AFFINITY, *VECTOR_INPUTS]):
            values[label].requires_grad_()
        model.loss(model.logits(values), (torch.arange(20) % 2).float()).backward()
        for label in given:
            assert values[label].grad.abs().sum() > 0, label
        for label, parameter in model.named_parameters():
            assert parameter.grad is not None, label

    def test_loss_falls(self, name):
        torch.manual_seed(0)
        model = build_backbone(name, SPEC, torch.zeros(30, 2, dtype=torch.int64)).train()
        values, labels = inputs([10] * 6), (torch.arange(60) % 3 == 0).float()
        optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(60):
            loss = model.loss(model.logits(values), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5])

    @pytest.mark.parametrize("spec", [SPEC, CONTROL], ids=["all", "control"])
    def test_onnx_matches_torch(self, name, spec, tmp_path):
        model = make(name, spec)
        export_onnx(model, tmp_path / "model.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
        for lengths in ([1], [100], [3, 9, 1], [10] * 4):
            values = inputs(lengths, spec)
            (score,) = session.run(None, {label: value.numpy() for label, value in values.items()})
            np.testing.assert_allclose(score, model(values).detach().numpy(), rtol=0, atol=1e-5)
