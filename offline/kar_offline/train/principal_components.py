"""Owns principal components of text vectors, which make affinity vectors small enough to store with every item.

x_i = normalise(v_i - mean),   C = sum_i x_i x_i^T = A diag(s) A^T,   p_i = normalise(x_i A[:, :width])
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Components", "principal_components"]


@dataclass(frozen=True, slots=True)
class Components:
    """Principal components, applicable to more vectors of the same encoder."""

    mean: Tensor
    """[D] float64."""
    axes: Tensor
    """[D, width] float64; D columns if D is less than `width`."""
    width: int

    @staticmethod
    def of(vectors: Tensor, width: int) -> "Components":
        """The first `width` components of vectors [n, D], n at least 1."""
        mean = vectors.double().mean(0)
        centred = F.normalize(vectors.double() - mean)  # [n, D]
        _, axes = torch.linalg.eigh(centred.T @ centred)
        axes = axes.flip(1)[:, :width]
        # The sign of an eigenvector is arbitrary. It is fixed here, so that all machines agree.
        return Components(mean, axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign(), width)

    def project(self, vectors: Tensor) -> Tensor:
        """Vectors [n, D] in these components [n, width] float32, of unit length."""
        projected = F.normalize(F.normalize(vectors.double() - self.mean) @ self.axes)
        return F.pad(projected.float(), (0, self.width - projected.shape[1]))


def principal_components(vectors: Tensor, present: Tensor, width: int) -> Tensor:
    """Vectors in their own first principal components, of unit length.

    Args:
        vectors: [n, D] float32.
        present: [n] bool. Absent rows do not influence the components.
        width: Number of components, at most D; missing ones, of few rows, are zeros at the end.

    Returns:
        [n, width] float32; zeros for absent rows.

    Example:
        >>> vectors = torch.tensor([[1.0, 0.0], [3.0, 0.0], [9.0, 9.0]])
        >>> principal_components(vectors, torch.tensor([True, True, False]), width=1).tolist()
        [[-1.0], [1.0], [0.0]]
    """
    out = torch.zeros(len(vectors), width)
    if len(present_vectors := vectors[present]):
        out[present] = Components.of(present_vectors, width).project(present_vectors)
    return out
