"""Owns DIN: the candidate decides the weight of every history event in the pooled history.

    a_j    = v^T Dice(W [c, e_j, c * e_j] + b)     c, e_j: candidate and history event, projected to one width
    pooled = sum over real events of a_j e_j       the weights are not normalised, as in the paper
    logit  = w^T MLP_Dice([user, candidate, pooled, knowledge, affinity]) + b

The paper also feeds c - e_j, which adds nothing to a linear layer that reads c and e_j. The parts of W that read c or
e_j alone run once per candidate or event; only the part that reads c * e_j runs for every pair. Knowledge and affinity
enter the final MLP, not the attention.

Source: Zhou et al., "Deep Interest Network for Click-Through Rate Prediction" (KDD 2018, arXiv 1706.06978).
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
    """Deep interest network; final MLP as in the KAR paper.

    Args:
        spec: Sizes of the inputs.
        item_categories: (items, Ic) int64, the categories of every item index.
        embedding: Embedding dimension d.
        attention: Units of the attention's hidden layer.
        hidden: Units of the MLP's layers.
        dropout: Probability that a unit of the MLP is dropped.

    Example:
        >>> from kar_offline.models import example_inputs
        >>> spec = InputSpec(items=10, user_fields=(), item_fields=(), user_numbers=1, item_numbers=1)
        >>> model = DIN(spec, torch.zeros(10, 1, dtype=torch.int64)).eval()
        >>> model(example_inputs(spec, candidates=5, requests=2)).shape
        torch.Size([5])
    """

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
        """Sum the history events, weighted by their relevance for each candidate.

        Args:
            inputs: Inputs of the model.
            candidates: (N, item width) embedded candidates.

        Returns:
            (N, event_width).
        """
        history_item, history_rating = inputs["history_item"], inputs["history_rating"]  # (R, L) each
        items, ratings = self.items.table(), self.ratings.table()  # (items, item width), (buckets, d)
        # Keys are projected once per known item and once per rating bucket, not once per event.
        item_keys, rating_keys = self.key_of_item(items), self.key_of_rating(ratings)  # (items, d), (buckets, d)
        key = F.embedding(history_item, item_keys) + F.embedding(history_rating, rating_keys)  # (R, L, d)
        key_part = self.of_key(key)  # (R, L, attention)
        real = (history_item != PADDING).to(key.dtype).unsqueeze(2)  # (R, L, 1)
        key, key_part, real = (self.spread(inputs, tensor) for tensor in (key, key_part, real))  # (N, L, ...)
        query = self.query(candidates)  # (N, d)
        product_part = self.of_product(query.unsqueeze(1) * key)  # (N, L, attention)
        pairs = product_part + key_part + self.of_query(query).unsqueeze(1)  # (N, L, attention)
        # Padded events have a weight, too, but their embeddings are zeros.
        weights = self.attend(self.dice(pairs, real)).transpose(1, 2)  # (N, 1, L)
        events = (F.embedding(history_item, items), F.embedding(history_rating, ratings))  # (R, L, ...) each
        return torch.cat([(weights @ self.spread(inputs, part)).squeeze(1) for part in events], 1)

    def network(self, inputs: Inputs) -> Tensor:
        """Log-odds (N,)."""
        candidates = self.embed_candidate(inputs)  # (N, candidate_width)
        pooled = self.pool(inputs, candidates[:, : self.items.width])  # (N, event_width)
        user = self.spread(inputs, self.embed_user(inputs))  # (N, user_width)
        parts = [user, candidates, pooled, self.knowledge(inputs), self.affinity(inputs)]
        return self.output(self.deep(torch.cat(parts, 1))).squeeze(1)  # (N,)
