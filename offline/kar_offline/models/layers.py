"""Owns the layers that backbones share: field, item and rating embeddings, MLP, Dice."""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kar_offline.models.inputs import Field
from kar_sidecar.features import MAX_RATING_BUCKET, PADDING

__all__ = ["MLP", "Dice", "ItemEmbedding", "MultiFieldEmbedding", "RatingEmbedding"]

# With N(0, 1) the control is so weak that any extra input seems to lift it.
INIT_SIGMA: Final = 0.01


def _table(rows: int, width: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, width) * INIT_SIGMA)


def _all_but(rows: int, without: Sequence[int]) -> Tensor:
    """Ones [rows, 1] with zeros at rows `without`: one product with a table is cheaper than masking what it gives."""
    real = torch.ones(rows, 1)
    real[list(without)] = 0
    return real


class MultiFieldEmbedding(nn.Module):
    """Embeds categorical fields that lie side by side; a field of several values gives their mean, without any 0.

    `width` is what comes out: fields * d.
    """

    offset: Tensor
    real: Tensor

    def __init__(self, fields: Sequence[Field], embedding: int) -> None:
        super().__init__()
        starts = list(accumulate((field.size for field in fields), initial=0))
        self.widths = [field.width for field in fields]
        self.embedding = embedding
        self.width = len(self.widths) * embedding
        self.weight = _table(starts[-1], embedding)
        offset = [start for start, width in zip(starts, self.widths, strict=False) for _ in range(width)]
        self.register_buffer("offset", torch.tensor(offset, dtype=torch.int64), persistent=False)
        self.register_buffer("real", _all_but(starts[-1], starts[:-1]), persistent=False)

    def forward(self, index: Tensor) -> Tensor:
        """Embeddings [B, width] of `index` [B, sum of the fields' widths]; a missing field gives zeros."""
        if not self.widths:
            return self.weight.new_zeros(index.shape[0], 0)
        values = F.embedding(index + self.offset, self.weight * self.real)  # [B, W, d]
        counts = (index != PADDING).to(values.dtype)
        means = [
            values[:, a] if b - a == 1 else values[:, a:b].sum(1) / counts[:, a:b].sum(1, keepdim=True).clamp(min=1)
            for a, b in pairwise(accumulate(self.widths, initial=0))
        ]
        return torch.cat(means, 1)


class ItemEmbedding(nn.Module):
    """Embeds items by id and by categorical fields. `width` is (1 + fields) * d."""

    categories: Tensor
    real: Tensor

    def __init__(self, items: int, fields: Sequence[Field], categories: Tensor, embedding: int) -> None:
        super().__init__()
        self.id = _table(items, embedding)
        self.fields = MultiFieldEmbedding(fields, embedding)
        self.width = embedding + self.fields.width
        self.register_buffer("categories", categories)
        self.register_buffer("real", _all_but(items, [PADDING]), persistent=False)

    def forward(self, index: Tensor, categories: Tensor) -> Tensor:
        """Embeddings [B, width] of items `index` [B] with `categories` [B, Ic] as given."""
        return torch.cat([F.embedding(index, self.id), self.fields(categories)], 1)

    def table(self) -> Tensor:
        """Embeddings [items, width] of every known item, zeros for padding.

        Like the optimiser's, its cost grows with the vocabulary, not with histories; exported to ONNX it is a constant.
        """
        return torch.cat([self.id, self.fields(self.categories)], 1) * self.real


class RatingEmbedding(nn.Module):
    """Embeds the rating buckets of history events."""

    real: Tensor

    def __init__(self, embedding: int) -> None:
        super().__init__()
        self.weight = _table(MAX_RATING_BUCKET + 1, embedding)
        self.register_buffer("real", _all_but(MAX_RATING_BUCKET + 1, [PADDING]), persistent=False)

    def table(self) -> Tensor:
        """Embeddings [buckets, d] of every bucket, zeros for padding."""
        return self.weight * self.real


class Dice(nn.Module):
    """Dice activation with running statistics, so that a score never depends on its batch-mates.

        y = p x + (1 - p) alpha x,   p = sigmoid((x - mean) / sqrt(var + eps))

    Statistics come from the batch in training and from their exponential average in evaluation. Source: Zhou et al.,
    "Deep Interest Network for Click-Through Rate Prediction" (KDD 2018, arXiv 1706.06978).
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, width: int, *, momentum: float = 0.01, eps: float = 1e-5) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))
        self.momentum, self.eps = momentum, eps

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """Activation of `x` [..., width]; `real` [..., 1] float excludes padding from the statistics."""
        mean, variance = self.mean, self.variance
        if self.training:
            rows = x.reshape(-1, x.shape[-1])
            weight = rows.new_ones(rows.shape[0]) if real is None else real.reshape(-1)
            weight = weight / weight.sum().clamp(min=1)
            mean = weight @ rows
            variance = weight @ (rows - mean).square()
            with torch.no_grad():
                self.mean.lerp_(mean, self.momentum)
                self.variance.lerp_(variance, self.momentum)
        p = torch.sigmoid((x - mean) * torch.rsqrt(variance + self.eps))
        return x * (self.alpha + p * (1 - self.alpha))


class MLP(nn.Sequential):
    """Linear layers of `widths`, each followed by `activation(width)` and dropout."""

    def __init__(
        self, inputs: int, widths: Sequence[int], activation: Callable[[int], nn.Module], dropout: float
    ) -> None:
        layers = [
            nn.Sequential(nn.Linear(a, b), activation(b), nn.Dropout(dropout)) for a, b in pairwise((inputs, *widths))
        ]
        super().__init__(*layers)
