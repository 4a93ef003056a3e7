"""Owns DIN: the history is pooled with weights that depend on the candidate.

    a_j    = v^T Dice(W [c, e_j, c * e_j] + b)     c, e_j: candidate and history event, projected to one width
    pooled = sum over real events of a_j e_j       weights are not normalised, as in the paper
    logit  = w^T MLP_Dice([user, candidate, pooled, knowledge, affinity]) + b

(The paper's c - e_j adds nothing to a linear layer that reads c and e_j.) The parts of W that read c and e_j alone are
computed once a candidate and once an event; only c * e_j is computed for every pair. Knowledge and affinity join
before the final MLP, not in the attention. Source: Zhou et al., "Deep Interest Network for Click-Through Rate
Prediction" (KDD 2018, arXiv 1706.06978).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kar_offline.models.backbone import Backbone
from kar_offline.models.inputs import Inputs, InputSpec
from kar_offline.models.layers import MLP, Dice
from kar_sidecar.features import PADDING

__all__ = ["DIN"]


class DIN(Backbone):
    """Deep interest network; arguments as in `Backbone`, final MLP as in the KAR paper."""

    def __init__(
        self,
        spec: InputSpec,
        item_categories: Tensor,
        *,
        embedding: int = 32,
        attention: int = 36,
        hidden: tuple[int, ...] = (200, 80),
        dropout: float = 0.2,
    ) -> None:
        super().__init__(spec, item_categories, embedding=embedding)
        self.query = nn.Linear(self.items.width, embedding)
        self.key_of_item = nn.Linear(self.items.width, embedding)
        self.key_of_rating = nn.Linear(embedding, embedding, bias=False)
        self.of_query = nn.Linear(embedding, attention)
        self.of_key = nn.Linear(embedding, attention, bias=False)
        self.of_product = nn.Linear(embedding, attention, bias=False)
        self.dice = Dice(attention)
        self.attend = nn.Linear(attention, 1)
        self.deep = MLP(self.flat_width, hidden, Dice, dropout)
        self.output = nn.Linear(hidden[-1], 1)

    def pool(self, inputs: Inputs, candidates: Tensor) -> Tensor:
        """History events [N, event_width] summed with the weights that `candidates` [N, item width] give them."""
        item, rating = inputs["history_item"], inputs["history_rating"]
        items, ratings = self.items.table(), self.ratings.table()
        # Keys are projected once a known item and once a rating bucket, not once an event.
        key_of_item, key_of_rating = self.key_of_item(items), self.key_of_rating(ratings)
        key = F.embedding(item, key_of_item) + F.embedding(rating, key_of_rating)  # [R, L, d]
        part = self.of_key(key)  # [R, L, attention]
        real = (item != PADDING).to(key.dtype).unsqueeze(2)  # [R, L, 1]
        key, part, real = (self.spread(inputs, x) for x in (key, part, real))  # [N, L, ...]
        query = self.query(candidates)  # [N, d]
        pairs = self.of_product(query.unsqueeze(1) * key) + part + self.of_query(query).unsqueeze(1)
        weights = self.attend(self.dice(pairs, real)).transpose(1, 2)  # [N, 1, L]; padding's events are zeros
        events = (F.embedding(item, items), F.embedding(rating, ratings))
        return torch.cat([(weights @ self.spread(inputs, x)).squeeze(1) for x in events], 1)

    def network(self, inputs: Inputs) -> Tensor:
        """Log-odds [N]."""
        candidates = self.embed_candidate(inputs)
        pooled = self.pool(inputs, candidates[:, : self.items.width])
        user = self.spread(inputs, self.embed_user(inputs))
        parts = [user, candidates, pooled, self.knowledge(inputs), self.affinity(inputs)]
        return self.output(self.deep(torch.cat(parts, 1))).squeeze(1)
