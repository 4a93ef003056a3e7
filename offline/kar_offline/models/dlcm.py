"""Owns DLCM: a GRU reads the list from its end to its top; its last state is the context of every candidate.

    o_C, ..., o_1, s = GRU(x_C, ..., x_1)
    logit_c = v^T (o_c * tanh(W s + b)) + w^T o_c + d

x_c is the row of candidate c (`Backbone.flat`), projected. The order of the list matters by design; padding behind the
end of a list is never read. The paper's attention-rank loss is replaced by the log loss that all our rerankers share.

Source: Ai et al., "Learning a Deep Listwise Context Model for Ranking Refinement" (SIGIR 2018, arXiv 1804.05936).
"""

import torch
from torch import Tensor, nn

from kar_offline.models.inputs import Inputs, InputSpec
from kar_offline.models.reranker import ListView, Reranker

__all__ = ["DLCM"]


class DLCM(Reranker):
    """Deep listwise context model.

    Args:
        spec: Sizes of the inputs.
        item_categories: (items, Ic) int64, the categories of every item index.
        embedding: Embedding dimension d.
        width: Components of a candidate inside the model.
        dropout: Probability that a component of a projected candidate is dropped.

    Example:
        >>> from kar_offline.models import example_inputs
        >>> spec = InputSpec(items=10, user_fields=(), item_fields=(), user_numbers=1, item_numbers=1)
        >>> model = DLCM(spec, torch.zeros(10, 1, dtype=torch.int64)).eval()
        >>> model(example_inputs(spec, candidates=5, requests=2)).shape
        torch.Size([5])
    """

    def __init__(
        self, spec: InputSpec, item_categories: Tensor, *, embedding: int = 32, width: int = 64, dropout: float = 0.2
    ) -> None:
        super().__init__(spec, item_categories, embedding=embedding)
        self.enter = nn.Sequential(nn.Linear(self.flat_width, width), nn.ReLU(), nn.Dropout(dropout))
        self.read = nn.GRU(width, width, batch_first=True)
        self.context = nn.Linear(width, width)
        self.match = nn.Linear(width, 1, bias=False)
        self.own = nn.Linear(width, 1)

    def rerank(self, view: ListView, inputs: Inputs) -> Tensor:
        """Log-odds (R, C)."""
        candidates = view.lists(self.enter(self.flat(inputs)))  # (R, C, width)
        # Only the real candidates are reversed. Reversing the whole list would put padding first, where it would change
        # the state; this way padding stays behind the end.
        count = view.real.sum(1, keepdim=True)  # (R, 1)
        place = torch.arange(candidates.shape[1], device=candidates.device)  # (C,)
        reversed_place = ((count - 1 - place) * view.real).unsqueeze(2).expand_as(candidates)  # (R, C, width)
        no_state = candidates.new_zeros(1, candidates.shape[0], candidates.shape[2])
        outputs, _ = self.read(candidates.gather(1, reversed_place), no_state)  # (R, C, width), from end to top
        last_place = (count - 1).clamp(min=0).unsqueeze(2).expand(-1, 1, candidates.shape[2])
        last = outputs.gather(1, last_place)  # (R, 1, width)
        outputs = outputs.gather(1, reversed_place)  # (R, C, width), from top to end
        return (self.match(outputs * torch.tanh(self.context(last))) + self.own(outputs)).squeeze(2)  # (R, C)
