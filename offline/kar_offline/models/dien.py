"""Owns DIEN: one GRU extracts interests from the history, a second one with attention follows how they evolve.

    h_t    = GRU(e_t)                                   e_t: item and rating of event t
    a_t    = softmax over real events of h_t^T W c      c: the candidate
    u_t    = a_t sigmoid(W_u h_t + U_u s_{t-1} + b_u)   AUGRU: attention scales the update gate
    r_t    = sigmoid(W_r h_t + U_r s_{t-1} + b_r)
    s_t    = (1 - u_t) s_{t-1} + u_t tanh(W_s h_t + r_t * (U_s s_{t-1}) + b_s)
    logit  = w^T MLP_Dice([user, candidate, s_L, mean event, knowledge, affinity]) + b

Padding lies at the end of a history and has a_t = 0, so it leaves the state unchanged; an empty history leaves s = 0.
Knowledge and affinity enter the final MLP, not the attention. The paper's auxiliary loss needs clicks and non-clicks
in the history. It is left out: rated histories have no sampled negatives, and the comparison in the KAR paper trains
with the click loss alone.

Source: Zhou et al., "Deep Interest Evolution Network for Click-Through Rate Prediction" (AAAI 2019, arXiv 1809.03672).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kar_offline.models.backbone import Backbone
from kar_offline.models.inputs import Inputs, InputSpec
from kar_offline.models.layers import MLP, Dice
from kar_sidecar.features import PADDING

__all__ = ["DIEN"]


def _augru_steps(gates: Tensor, attention: Tensor, recurrent: Tensor, width: int) -> Tensor:
    """Run an AUGRU over the history.

    Args:
        gates: (N, L, 3 width), the inputs' part of the update gate, reset gate and new state.
        attention: (N, L), 0 for padding.
        recurrent: (width, 3 width), weights of the state's part.
        width: Components of the state.

    Returns:
        (N, width), the last state.
    """
    state = torch.zeros_like(gates[:, 0, :width])
    for step in range(gates.size(1)):
        from_input = gates[:, step]  # (N, 3 width)
        from_state = state @ recurrent  # (N, 3 width)
        update = torch.sigmoid(from_input[:, :width] + from_state[:, :width]) * attention[:, step : step + 1]
        reset = torch.sigmoid(from_input[:, width : 2 * width] + from_state[:, width : 2 * width])
        new = torch.tanh(from_input[:, 2 * width :] + reset * from_state[:, 2 * width :])
        state = state + update * (new - state)  # (N, width)
    return state


_augru: Callable[[Tensor, Tensor, Tensor, int], Tensor] = torch.jit.script_if_tracing(_augru_steps)
"""Exported to ONNX, the loop stays a loop: the graph accepts any number of events."""


class DIEN(Backbone):
    """Deep interest evolution network; final MLP as in the KAR paper.

    Args:
        spec: Sizes of the inputs.
        item_categories: (items, Ic) int64, the categories of every item index.
        embedding: Embedding dimension d.
        hidden: Units of the MLP's layers.
        dropout: Probability that a unit of the MLP is dropped.

    Example:
        >>> from kar_offline.models import example_inputs
        >>> spec = InputSpec(items=10, user_fields=(), item_fields=(), user_numbers=1, item_numbers=1)
        >>> model = DIEN(spec, torch.zeros(10, 1, dtype=torch.int64)).eval()
        >>> model(example_inputs(spec, candidates=5, requests=2)).shape
        torch.Size([5])
    """

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
        """Log-odds (N,)."""
        events = self.embed_history(inputs)  # (R, L, event_width)
        no_interest = events.new_zeros(1, events.shape[0], self.interest.hidden_size)
        interests, _ = self.interest(events, no_interest)  # (R, L, d)
        real = self.spread(inputs, inputs["history_item"] != PADDING)  # (N, L)
        gates, interests = self.spread(inputs, self.gates(interests)), self.spread(inputs, interests)  # (N, L, ...)
        flat = self.flat(inputs)  # (N, flat_width)
        query = self.match(self.items(inputs["item_index"], inputs["item_categorical"]))  # (N, d)
        scores = (interests @ query.unsqueeze(2)).squeeze(2)  # (N, L)
        attention = torch.softmax(scores.masked_fill(~real, -1e9), 1) * real  # (N, L)
        state = _augru(gates, attention, self.recurrent, query.shape[1])  # (N, d)
        return self.output(self.deep(torch.cat([flat, state], 1))).squeeze(1)  # (N,)
