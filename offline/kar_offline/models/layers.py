"""Owns the layers that backbones share: embeddings of fields, items and ratings, the MLP, the Dice activation."""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kar_offline.models.inputs import Field
from kar_sidecar.features import MAX_RATING_BUCKET, PADDING

__all__ = ["MLP", "Dice", "ItemEmbedding", "MultiFieldEmbedding", "RatingEmbedding"]

INIT_SIGMA: Final = 0.01
"""Standard deviation of initial embeddings. With 1, the control is too weak: any added input seems to help."""


def _embedding_table(rows: int, dim: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, dim) * INIT_SIGMA)


def _row_mask(rows: int, zero_rows: Sequence[int]) -> Tensor:
    """Ones (rows, 1) with zeros at `zero_rows`. Masking a table costs less than masking each vector looked up."""
    mask = torch.ones(rows, 1)
    mask[list(zero_rows)] = 0
    return mask


class MultiFieldEmbedding(nn.Module):
    """Embeddings of categorical fields that lie side by side in one index tensor.

    A field with several values gets the mean of their embeddings; padding (index 0) does not count.

    Args:
        fields: The fields, in the order of their columns.
        embedding: Embedding dimension d.

    Example:
        >>> layer = MultiFieldEmbedding((Field(size=3, width=1), Field(size=4, width=2)), embedding=8)
        >>> layer(torch.tensor([[2, 1, 3], [0, 2, 0]])).shape
        torch.Size([2, 16])
    """

    offset: Tensor
    real: Tensor

    def __init__(self, fields: Sequence[Field], embedding: int) -> None:
        super().__init__()
        starts = list(accumulate((field.size for field in fields), initial=0))
        self.widths = [field.width for field in fields]
        self.embedding = embedding
        self.width = len(self.widths) * embedding
        """Columns of the output: fields * d."""
        self.weight = _embedding_table(starts[-1], embedding)
        offset = [start for start, width in zip(starts, self.widths, strict=False) for _ in range(width)]
        self.register_buffer("offset", torch.tensor(offset, dtype=torch.int64), persistent=False)
        self.register_buffer("real", _row_mask(starts[-1], starts[:-1]), persistent=False)

    def forward(self, index: Tensor) -> Tensor:
        """Embed every field.

        Args:
            index: (batch, sum of the fields' widths) int64.

        Returns:
            (batch, fields * d); zeros for a missing field.
        """
        if not self.widths:
            return self.weight.new_zeros(index.shape[0], 0)
        values = F.embedding(index + self.offset, self.weight * self.real)  # (batch, widths, d)
        counts = (index != PADDING).to(values.dtype)  # (batch, widths)
        means = [
            values[:, start]
            if end - start == 1
            else values[:, start:end].sum(1) / counts[:, start:end].sum(1, keepdim=True).clamp(min=1)
            for start, end in pairwise(accumulate(self.widths, initial=0))
        ]
        return torch.cat(means, 1)  # (batch, fields * d)


class ItemEmbedding(nn.Module):
    """Embeddings of items: the id and the categorical fields side by side.

    Args:
        items: Item indices, reserved ones included.
        fields: Categorical fields of an item.
        categories: (items, Ic) int64, the categories of every item index.
        embedding: Embedding dimension d.
    """

    categories: Tensor
    real: Tensor

    def __init__(self, items: int, fields: Sequence[Field], categories: Tensor, embedding: int) -> None:
        super().__init__()
        self.id = _embedding_table(items, embedding)
        self.fields = MultiFieldEmbedding(fields, embedding)
        self.width = embedding + self.fields.width
        """Columns of the output: (1 + fields) * d."""
        self.register_buffer("categories", categories)
        self.register_buffer("real", _row_mask(items, [PADDING]), persistent=False)

    def forward(self, index: Tensor, categories: Tensor) -> Tensor:
        """Embed items whose categories come with the request.

        Args:
            index: (batch,) int64 item indices.
            categories: (batch, Ic) int64.

        Returns:
            (batch, width).
        """
        return torch.cat([F.embedding(index, self.id), self.fields(categories)], 1)

    def table(self) -> Tensor:
        """Embeddings (items, width) of every item index; zeros for padding.

        Its cost grows with the vocabulary and not with the histories. In an ONNX graph it is a constant.
        """
        return torch.cat([self.id, self.fields(self.categories)], 1) * self.real


class RatingEmbedding(nn.Module):
    """Embeddings of the half-star rating buckets of history events.

    Args:
        embedding: Embedding dimension d.
    """

    real: Tensor

    def __init__(self, embedding: int) -> None:
        super().__init__()
        self.weight = _embedding_table(MAX_RATING_BUCKET + 1, embedding)
        self.register_buffer("real", _row_mask(MAX_RATING_BUCKET + 1, [PADDING]), persistent=False)

    def table(self) -> Tensor:
        """Embeddings (buckets, d) of every bucket; zeros for padding."""
        return self.weight * self.real


class Dice(nn.Module):
    """Dice activation with running statistics, so that a score never depends on the other rows of its batch.

        y = p x + (1 - p) alpha x,   p = sigmoid((x - mean) / sqrt(variance + eps))

    In training, mean and variance come from the batch; in evaluation, from their exponential moving average.

    Args:
        width: Units.
        momentum: Weight of a batch in the moving averages.
        eps: Added to the variance.

    Source: Zhou et al., "Deep Interest Network for Click-Through Rate Prediction" (KDD 2018, arXiv 1706.06978).
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
        """Apply the activation.

        Args:
            x: (..., width).
            real: (..., 1) float, 0 for padding, which the statistics leave out; None counts every row.

        Returns:
            (..., width).
        """
        mean, variance = self.mean, self.variance
        if self.training:
            rows = x.reshape(-1, x.shape[-1])  # (rows, width)
            weight = rows.new_ones(rows.shape[0]) if real is None else real.reshape(-1)  # (rows,)
            weight = weight / weight.sum().clamp(min=1)
            mean = weight @ rows  # (width,)
            variance = weight @ (rows - mean).square()  # (width,)
            with torch.no_grad():
                self.mean.lerp_(mean, self.momentum)
                self.variance.lerp_(variance, self.momentum)
        p = torch.sigmoid((x - mean) * torch.rsqrt(variance + self.eps))
        return x * (self.alpha + p * (1 - self.alpha))


class MLP(nn.Sequential):
    """Fully connected layers, each followed by an activation and dropout.

    Args:
        inputs: Width of the input.
        widths: Units of each layer.
        activation: Makes the activation of a layer from its width.
        dropout: Probability that a unit is dropped.

    Example:
        >>> MLP(7, (5, 3), lambda width: nn.ReLU(), dropout=0.2)(torch.zeros(2, 7)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self, inputs: int, widths: Sequence[int], activation: Callable[[int], nn.Module], dropout: float
    ) -> None:
        layers = [
            nn.Sequential(nn.Linear(before, after), activation(after), nn.Dropout(dropout))
            for before, after in pairwise((inputs, *widths))
        ]
        super().__init__(*layers)
