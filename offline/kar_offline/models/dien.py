"""Owns DIEN: a GRU reads interests out of the history, a second one, driven by attention, how they evolve.

    h_t    = GRU(e_t)                                   e_t: item and rating of event t
    a_t    = softmax over real events of h_t^T W c      c: the candidate
    u_t    = a_t sigmoid(W_u i_t + U_u s_{t-1} + b_u)   AUGRU: attention scales the update gate
    r_t    = sigmoid(W_r i_t + U_r s_{t-1} + b_r)
    s_t    = (1 - u_t) s_{t-1} + u_t tanh(W_s i_t + r_t * (U_s s_{t-1}) + b_s),   i_t = h_t
    logit  = w^T MLP_Dice([user, candidate, s_L, mean event, knowledge, affinity]) + b

Padding lies at the end and has a_t = 0, so the state passes it unchanged; an empty history leaves s = 0. Knowledge and
affinity join before the final MLP, not in the attention. The paper's auxiliary loss, which needs clicks and
non-clicks in the history, is left out: rated histories have no sampled negatives, and KAR's comparison trains one
loss. Source: Zhou et al., "Deep Interest Evolution Network for Click-Through Rate Prediction" (AAAI 2019, arXiv
1809.03672).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kar_offline.models.backbone import Backbone
from kar_offline.models.inputs import Inputs, InputSpec
from kar_offline.models.layers import MLP, Dice
from kar_sidecar.features import PADDING

__all__ = ["DIEN"]


def _steps(gates: Tensor, attention: Tensor, recurrent: Tensor, width: int) -> Tensor:
    """The last state [N, w] of an AUGRU over input gates [N, L, 3 w] (update, reset, new) and attention [N, L]."""
    state = torch.zeros_like(gates[:, 0, :width])
    for t in range(gates.size(1)):
        own = gates[:, t]
        past = state @ recurrent  # [N, 3 w]
        update = torch.sigmoid(own[:, :width] + past[:, :width]) * attention[:, t : t + 1]
        reset = torch.sigmoid(own[:, width : 2 * width] + past[:, width : 2 * width])
        new = torch.tanh(own[:, 2 * width :] + reset * past[:, 2 * width :])
        state = state + update * (new - state)
    return state


_evolve: Callable[[Tensor, Tensor, Tensor, int], Tensor] = torch.jit.script_if_tracing(_steps)
"""In ONNX the loop stays a loop, whatever the number of events."""


class DIEN(Backbone):
    """Deep interest evolution network; arguments as in `Backbone`, final MLP as in the KAR paper."""

    def __init__(
        self,
        spec: InputSpec,
        item_categories: Tensor,
        *,
        embedding: int = 32,
        hidden: tuple[int, ...] = (200, 80),
        dropout: float = 0.2,
    ) -> None:
        super().__init__(spec, item_categories, embedding=embedding)
        self.interest = nn.GRU(self.event_width, embedding, batch_first=True)
        self.match = nn.Linear(self.items.width, embedding, bias=False)
        self.gates = nn.Linear(embedding, 3 * embedding)
        self.recurrent = nn.Parameter(torch.empty(embedding, 3 * embedding))
        nn.init.uniform_(self.recurrent, -(embedding**-0.5), embedding**-0.5)
        self.deep = MLP(self.flat_width + embedding, hidden, Dice, dropout)
        self.output = nn.Linear(hidden[-1], 1)

    def network(self, inputs: Inputs) -> Tensor:
        """Log-odds [N]."""
        item, rating = inputs["history_item"], inputs["history_rating"]
        events = [F.embedding(item, self.items.table()), F.embedding(rating, self.ratings.table())]
        read = torch.cat(events, 2)
        interests, _ = self.interest(read, read.new_zeros(1, read.shape[0], self.interest.hidden_size))  # [R, L, d]
        real = self.spread(inputs, item != PADDING)  # [N, L]
        gates, interests = self.spread(inputs, self.gates(interests)), self.spread(inputs, interests)
        flat = self.flat(inputs)
        query = self.match(self.items(inputs["item_index"], inputs["item_categorical"]))
        scores = (interests @ query.unsqueeze(2)).squeeze(2)
        attention = torch.softmax(scores.masked_fill(~real, -1e9), 1) * real
        state = _evolve(gates, attention, self.recurrent, query.shape[1])
        return self.output(self.deep(torch.cat([flat, state], 1))).squeeze(1)
