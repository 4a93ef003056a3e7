"""Every model once more, in numpy, one candidate at a time, from the formulas of the papers."""

import math

import numpy as np
import pytest
import torch

from kar_offline.models import BACKBONES, RERANKERS, Field, InputSpec, build_backbone

pytestmark = pytest.mark.unit

USER_FIELDS, ITEM_FIELDS = (Field(4, 1), Field(5, 1)), (Field(8, 3),)
SPEC = InputSpec(40, USER_FIELDS, ITEM_FIELDS, 1, 1, user_knowledge=5, item_knowledge=4, affinity=3, vector=6)
LISTS = (3, 2, 33)
"""One list is longer than PRM has places."""


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    shifted = np.exp(x - np.max(x, initial=-np.inf))
    return shifted / shifted.sum()


def relu(x):
    return np.maximum(x, 0)


class Weights:
    """Parameters by name, in double precision."""

    def __init__(self, model):
        self.of = {name: value.detach().double().numpy() for name, value in model.state_dict().items()}
        self.categories = model.items.categories.numpy()

    def __getitem__(self, name):
        return self.of[name]

    def linear(self, name, x):
        return self.of[f"{name}.weight"] @ x + self.of.get(f"{name}.bias", 0)

    def dice(self, name, x):
        p = sigmoid((x - self.of[f"{name}.mean"]) / np.sqrt(self.of[f"{name}.variance"] + 1e-5))
        return p * x + (1 - p) * self.of[f"{name}.alpha"] * x

    def mlp(self, name, x):
        for layer in range(2):
            x = self.linear(f"{name}.{layer}.0", x)
            x = self.dice(f"{name}.{layer}.1", x) if f"{name}.{layer}.1.alpha" in self.of else relu(x)
        return x

    def gru(self, name, inputs, cell=False):
        """States after each input, from zeros, or after one step from a given state."""
        end = "" if cell else "_l0"
        wi, wh, bi, bh = (self.of[f"{name}.{part}{end}"] for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))

        def step(x, h):
            (ir, iz, i_new), (hr, hz, h_new) = np.split(wi @ x + bi, 3), np.split(wh @ h + bh, 3)
            reset, keep = sigmoid(ir + hr), sigmoid(iz + hz)
            return (1 - keep) * np.tanh(i_new + reset * h_new) + keep * h

        if cell:
            return step(*inputs)
        states, state = [], np.zeros(wh.shape[1])
        for x in inputs:
            states.append(state := step(x, state))
        return np.array(states).reshape(-1, wh.shape[1])

    def norm(self, name, x):
        scaled = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
        return scaled * self.of[f"{name}.weight"] + self.of[f"{name}.bias"]

    def attention(self, name, queries, keys, heads=2):
        keys_values = np.array([self.linear(f"{name}.key_value", key) for key in keys])
        key, value = np.split(keys_values, 2, axis=1)
        width = key.shape[1] // heads
        out = []
        for query in queries:
            q, found = self.linear(f"{name}.query", query), []
            for head in range(heads):
                at = slice(head * width, (head + 1) * width)
                found.append(softmax(key[:, at] @ q[at] / math.sqrt(width)) @ value[:, at])
            hidden = self.norm(f"{name}.norms.0", query + self.linear(f"{name}.merge", np.concatenate(found)))
            fed = self.linear(f"{name}.feed.2", relu(self.linear(f"{name}.feed.0", hidden)))
            out.append(self.norm(f"{name}.norms.1", hidden + fed))
        return np.array(out)


def embed_fields(table, fields, values):
    """One mean embedding a field."""
    out, start, at = [], 0, 0
    for field in fields:
        known = [table[start + value] for value in values[at : at + field.width] if value]
        out.append(np.mean(known, 0) if known else np.zeros(table.shape[1]))
        start, at = start + field.size, at + field.width
    return out


def item_parts(w, index, categories):
    return [w["items.id"][index], *embed_fields(w["items.fields.weight"], ITEM_FIELDS, categories)]


class Row:
    """What a model may know of one candidate: lists of embeddings, and numbers."""

    def __init__(self, w, values, n):
        r = int(values["request_of_row"][n])
        v = {name: value[r if name.startswith(("user", "history")) else n].numpy() for name, value in values.items()}
        self.user = embed_fields(w["user_fields.weight"], USER_FIELDS, v["user_categorical"])
        self.user_numbers, self.item_numbers = v["user_numeric"][:1], v["item_numeric"][:1]
        self.item = item_parts(w, v["item_index"], v["item_categorical"])
        self.events = [
            [*item_parts(w, item, w.categories[item]), w["ratings.weight"][rating]]
            for item, rating in zip(v["history_item"], v["history_rating"], strict=True)
            if item
        ]
        blank = [np.zeros_like(w["ratings.weight"][0])] * (len(self.item) + 1)
        self.mean_event = [sum(parts) / max(len(self.events), 1) for parts in zip(blank, *self.events, strict=True)]
        self.user_knowledge, self.item_knowledge = v["user_knowledge"], v["item_knowledge"]
        heads = []
        projection = w["learned.project.weight"].reshape(4, -1, SPEC.vector)
        known = np.abs(v["history_vector"]).sum(1) > 0
        for matrix, scale in zip(projection, np.exp(w["learned.log_scale"]), strict=True):
            similarity = v["history_vector"][known] @ matrix.T @ (matrix @ v["item_vector"])
            heads.append(softmax(scale * similarity) @ v["history_weight"][known])
        self.affinity = np.concatenate([v["affinity"], heads])

    @property
    def flat(self):
        parts = [*self.user, self.user_numbers, *self.mean_event, *self.item, self.item_numbers]
        return np.concatenate([*parts, self.user_knowledge, self.item_knowledge, self.affinity])

    def fields(self, w):
        dense = (self.user_numbers, self.item_numbers, self.user_knowledge, self.item_knowledge, self.affinity)
        projected = [w.linear(f"dense.{i}", x) for i, x in enumerate(dense)]
        return np.array([*self.user, *self.mean_event, *self.item, *projected])


def dcn(w, row):
    x = row.flat
    crossed = x
    for layer in range(3):
        crossed = x * (w[f"weights.{layer}.weight"][0] @ crossed) + w["biases"][layer] + crossed
    return w.linear("output", np.concatenate([crossed, w.mlp("deep", x)]))


def dcnv2(w, row):
    x = row.flat
    crossed = x
    for layer in range(3):
        crossed = x * w.linear(f"crosses.{layer}", crossed) + crossed
    return w.linear("output", np.concatenate([crossed, w.mlp("deep", x)]))


def deepfm(w, row):
    fields = [*row.user, *row.mean_event, *row.item]
    pairs = sum(fields[i] @ fields[j] for j in range(len(fields)) for i in range(j))
    return w.linear("first", row.flat) + pairs + w.linear("output", w.mlp("deep", row.flat))


def xdeepfm(w, row):
    fields = row.fields(w)
    x, maps, pooled = fields.ravel(), fields, []
    for layer in range(2):
        weight, bias = w[f"compress.{layer}.weight"], w[f"compress.{layer}.bias"]
        weight = weight.reshape(len(weight), len(maps), len(fields))
        maps = relu(np.einsum("hij,id,jd->hd", weight, maps, fields) + bias[:, None])
        pooled.append(maps.sum(1))
    return w.linear("first", x) + w.linear("output", np.concatenate([*pooled, w.mlp("deep", x)]))


def autoint(w, row):
    fields = row.fields(w)
    x = fields.ravel()
    for layer in range(3):
        query, key, value, residual = np.split(w[f"attention.{layer}.project.weight"], 4)
        heads = []
        for q, k, v in zip(*(np.split(matrix, 2) for matrix in (query, key, value)), strict=True):
            heads.append([softmax((fields @ k.T) @ (q @ field)) @ (fields @ v.T) for field in fields])
        fields = relu(np.concatenate(heads, 1) + fields @ residual.T)
    return w.linear("output", np.concatenate([fields.ravel(), w.mlp("deep", x)]))


def fibinet(w, row):
    fields = row.fields(w)
    importance = relu(w.linear("excite.2", relu(w.linear("excite.0", fields.mean(1)))))
    crossed = []
    for name, parts in (("bilinear", fields), ("excited_bilinear", fields * importance[:, None])):
        left = parts @ w[f"{name}.weight"].T
        crossed += [left[i] * parts[j] for i in range(len(parts)) for j in range(i + 1, len(parts))]
    return w.linear("first", fields.ravel()) + w.linear("output", w.mlp("deep", np.concatenate(crossed)))


def fignn(w, row):
    start = state = row.fields(w)
    count = len(start)
    score = [
        [w["edge_from.weight"][0] @ start[i] + w["edge_to.weight"][0] @ start[j] for j in range(count)]
        for i in range(count)
    ]
    for _ in range(2):
        after = []
        for i in range(count):
            others = [j for j in range(count) if j != i]
            edge = softmax([score[i][j] if score[i][j] > 0 else 0.01 * score[i][j] for j in others])
            heard = sum(e * (w["outgoing"][j] @ state[j]) for e, j in zip(edge, others, strict=True))
            after.append(w.gru("update", (w["incoming"][i] @ heard + w["bias"], state[i]), cell=True) + start[i])
        state = np.array(after)
    weight = sigmoid(w.linear("attend", state.ravel()))
    return weight @ (state @ w["score.weight"][0])


def din(w, row):
    item = np.concatenate(row.item)
    query = w.linear("query", item)
    pooled = 0 * np.concatenate(row.mean_event)
    for event in row.events:
        key = w.linear("key_of_item", np.concatenate(event[:-1])) + w["key_of_rating.weight"] @ event[-1]
        hidden = w.linear("of_query", query) + w["of_key.weight"] @ key + w["of_product.weight"] @ (query * key)
        pooled = pooled + w.linear("attend", w.dice("dice", hidden)) * np.concatenate(event)
    parts = [*row.user, row.user_numbers, item, row.item_numbers, pooled]
    joined = np.concatenate([*parts, row.user_knowledge, row.item_knowledge, row.affinity])
    return w.linear("output", w.mlp("deep", joined))


def dien(w, row):
    interests = w.gru("interest", [np.concatenate(event) for event in row.events])
    attention = softmax(interests @ (w["match.weight"] @ np.concatenate(row.item)))
    state = np.zeros(interests.shape[1])
    for weight, interest in zip(attention, interests, strict=True):
        (u, r, new) = np.split(w.linear("gates", interest), 3)
        (from_u, from_r, from_new) = np.split(state @ w["recurrent"], 3)
        update, reset = weight * sigmoid(u + from_u), sigmoid(r + from_r)
        state = (1 - update) * state + update * np.tanh(new + reset * from_new)
    return w.linear("output", w.mlp("deep", np.concatenate([row.flat, state])))


def dlcm(w, rows):
    entered = [relu(w.linear("enter.0", row.flat)) for row in rows]
    outputs = w.gru("read", entered[::-1])
    context = np.tanh(w.linear("context", outputs[-1]))
    return [w["match.weight"][0] @ (out * context) + w.linear("own", out)[0] for out in outputs[::-1]]


def prm(w, rows):
    hidden = np.array(
        [w.linear("enter", row.flat) + w["place.weight"][min(place, 29)] for place, row in enumerate(rows)]
    )
    for block in range(2):
        hidden = w.attention(f"blocks.{block}", hidden, hidden)
    return [w.linear("output", h)[0] for h in hidden]


def setrank(w, rows):
    hidden = np.array([w.linear("enter", row.flat) for row in rows])
    for block in range(2):
        induced = w.attention(f"gather.{block}", w["points"][block], hidden)
        hidden = w.attention(f"give.{block}", hidden, induced)
    return [w.linear("output", h)[0] for h in hidden]


def mir(w, rows):
    own = np.array([w.linear("enter", row.flat) for row in rows])
    among = w.attention("among", own, own)
    past = w.gru("history", [np.concatenate(event) for event in rows[0].events])
    out = []
    for x, s in zip(own, among, strict=True):
        z = softmax(past @ (w["relate.weight"] @ s)) @ past
        out.append(w.linear("output", w.mlp("deep", np.concatenate([x, s, z, s * z])))[0])
    return out


SINGLE = {f.__name__: f for f in (dcn, dcnv2, deepfm, xdeepfm, autoint, fibinet, fignn, din, dien)}
LISTWISE = {f.__name__: f for f in (dlcm, prm, setrank, mir)}


def make(name):
    torch.manual_seed(0)
    model = build_backbone(name, SPEC, torch.randint(0, 8, (SPEC.items, 3)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        for label, buffer in model.named_buffers():
            if label.endswith(("mean", "variance")):
                buffer.uniform_(0.5, 1.5)
    return model.eval()


def known(requests, places, lengths):
    """Which places of histories are not padding; one history has none, one has all."""
    return torch.arange(places) < torch.tensor(lengths)[torch.arange(requests) % len(lengths), None]


def inputs(lists=LISTS, seed=1):
    g = torch.Generator().manual_seed(seed)
    n, r = sum(lists), len(lists)

    def indices(high, *shape):
        return torch.randint(0, high, shape, generator=g)

    history = indices(SPEC.items - 1, r, 6) + 1
    history[~known(r, 6, (4, 0, 6))] = 0
    values = {
        "history_item": history,
        "history_rating": torch.where(history > 0, indices(10, r, 6) + 1, 0),
        "user_categorical": torch.cat([indices(4, r, 1), indices(5, r, 1)], 1),
        "user_numeric": torch.randn(r, 1, generator=g),
        "item_index": indices(SPEC.items, n),
        "item_categorical": indices(8, n, 3),
        "item_numeric": torch.randn(n, 1, generator=g),
        "request_of_row": torch.repeat_interleave(torch.arange(r), torch.tensor(lists)),
        "user_knowledge": torch.randn(r, SPEC.user_knowledge, generator=g),
        "item_knowledge": torch.randn(n, SPEC.item_knowledge, generator=g),
        "affinity": torch.randn(n, SPEC.affinity, generator=g),
        "item_vector": torch.randn(n, SPEC.vector, generator=g),
        "history_vector": torch.randn(r, 5, SPEC.vector, generator=g),
        "history_weight": torch.randn(r, 5, generator=g),
    }
    for label in ("history_vector", "history_weight"):
        values[label][~known(r, 5, (0, 5, 3))] = 0
    return values


def expected(name, model, values):
    w = Weights(model)
    rows = [Row(w, values, n) for n in range(len(values["item_index"]))]
    direct = np.array([w["direct.weight"][0] @ row.affinity for row in rows])
    if name in SINGLE:
        return np.array([float(np.squeeze(SINGLE[name](w, row))) for row in rows]) + direct
    request = values["request_of_row"].tolist()
    lists = [[row for row, own in zip(rows, request, strict=True) if own == r] for r in sorted(set(request))]
    return np.concatenate([LISTWISE[name](w, rows_of_list) for rows_of_list in lists]) + direct


def test_every_model_has_a_second_implementation():
    assert [*SINGLE, *LISTWISE] == [*BACKBONES, *RERANKERS]


@pytest.mark.parametrize("name", [*SINGLE, *LISTWISE])
def test_the_model_is_its_formula(name):
    model = make(name).double()
    values = {label: value.double() if value.is_floating_point() else value for label, value in inputs().items()}
    logits = model.logits(values).detach().numpy()
    found = expected(name, model, values)
    assert logits.std() > 0.05
    np.testing.assert_allclose(logits, found, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", [*SINGLE, *LISTWISE])
def test_a_few_steps_lower_the_loss(name):
    torch.manual_seed(0)
    model, values = build_backbone(name, SPEC, torch.randint(0, 8, (SPEC.items, 3))), inputs((4,) * 32)
    labels = (values["item_knowledge"][:, 0] + values["affinity"][:, 0] > 0).float()
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)

    @torch.no_grad()
    def loss():
        return model.eval().loss(model.logits(values), labels).item()

    before = loss()
    for _ in range(30):
        optimiser.zero_grad()
        model.train().loss(model.logits(values), labels).backward()
        optimiser.step()
    assert before > 0.6
    assert loss() < 0.75 * before
