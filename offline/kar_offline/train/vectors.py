"""Owns the text vectors that training reads: the arrays of an encoding stage, checked against the dataset."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kar_kernels import Tower
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.train.arms import Texts
from kar_sidecar.errors import IntegrityError, PreconditionError

__all__ = ["TextVectors", "load_text_vectors"]


@dataclass(frozen=True, slots=True)
class TextVectors:
    """Encoder vectors of all users and items, by row of the dataset."""

    encoder_id: str
    user: Tensor
    """[users, D] float32, memory-mapped."""
    user_present: Tensor
    """[users] bool, False where the user has no text."""
    item: Tensor
    """[items, D] float32, memory-mapped."""
    item_present: Tensor
    """[items] bool, False where the item has no text."""

    @property
    def dim(self) -> int:
        """Components D."""
        return self.user.shape[1]

    def tower(self, tower: Tower) -> tuple[Tensor, Tensor]:
        """Vectors and presence of users or of items."""
        return (self.user, self.user_present) if tower == "user" else (self.item, self.item_present)

    def shuffled(self, seed: int) -> "TextVectors":
        """The same vectors, shuffled between the users that have one and between the items that have one."""
        generator = torch.Generator().manual_seed(seed)

        def shuffle(vectors: Tensor, present: Tensor) -> Tensor:
            rows = present.nonzero().squeeze(1)
            shuffled = vectors.clone()
            shuffled[rows] = vectors[rows[torch.randperm(len(rows), generator=generator)]]
            return shuffled

        user, item = shuffle(self.user, self.user_present), shuffle(self.item, self.item_present)
        return replace(self, user=user, item=item)

    def random(self, seed: int) -> "TextVectors":
        """Gaussian noise of unit length in place of every vector."""
        generator = torch.Generator().manual_seed(seed)
        user, item = (F.normalize(torch.randn(x.shape, generator=generator)) for x in (self.user, self.item))
        return replace(self, user=user, item=item)


def _load(folder: Path, name: str, entities: Sequence[Entity]) -> tuple[str, Tensor, Tensor]:
    """Encoder id, vectors and presence of one kind of entity."""
    header_path, array_path = folder / f"{name}.json", folder / f"{name}.npy"
    if not header_path.is_file():
        raise PreconditionError(f"{header_path} does not exist: run `kar encode` first")
    try:
        header = json.loads(header_path.read_text())
        vectors = np.load(array_path, mmap_mode="c", allow_pickle=False)
        ids, texts, encoder_id = header["ids"], header["text_sha256"], str(header["encoder_id"])
    except (OSError, ValueError, KeyError) as error:
        raise IntegrityError(f"{array_path} or its header is corrupt ({error}): encode again") from error
    if ids != [entity.id for entity in entities] or vectors.shape[0] != len(ids) or len(texts) != len(ids):
        raise IntegrityError(f"{array_path} does not have one row for each entity of the dataset: encode again")
    present = torch.tensor([text is not None for text in texts])
    return encoder_id, torch.from_numpy(vectors.astype(np.float32, copy=False)), present


def load_text_vectors(folder: Path, texts: Texts, dataset: Dataset, *, seed: int = 0) -> TextVectors:
    """Read the vectors of one text source.

    Args:
        folder: Folder of the encoding stage.
        texts: The source.
        dataset: The dataset that the vectors must belong to.
        seed: Seed of shuffled and random vectors.

    Raises:
        PreconditionError: the texts are not encoded yet.
        IntegrityError: the vectors are corrupt, or belong to another dataset or to two encoders; the text names a file.
    """
    source = "raw" if texts == "raw" else "knowledge"
    encoder_id, user, user_present = _load(folder, f"{source}_user", dataset.users)
    item_encoder_id, item, item_present = _load(folder, f"{source}_item", dataset.items)
    if encoder_id != item_encoder_id or user.shape[1] != item.shape[1]:
        raise IntegrityError(f"{folder} holds {source} vectors of two encoders: encode again")
    vectors = TextVectors(encoder_id, user, user_present, item, item_present)
    if texts == "shuffled":
        return vectors.shuffled(seed)
    return vectors.random(seed) if texts == "random" else vectors
