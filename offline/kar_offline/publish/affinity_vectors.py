"""Owns the affinity vectors of fresh items, in the space of a release.

The text segment of an affinity vector holds principal components of the item's encoded vector, as the release's model
was trained with. The other segments come from the ratings: released items keep theirs, and new items have zeros.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from kar.records.v1 import records_pb2
from kar_offline.publish.released_entities import ReleasedEntities
from kar_offline.train.knowledge_inputs import TEXT as TEXT_SEGMENT
from kar_offline.train.principal_components import Components
from kar_sidecar.errors import PreconditionError

__all__ = ["AffinityVectors"]

TOLERANCE: Final = 1e-4
"""Largest difference between components of the same vectors, computed at different times."""


@dataclass(frozen=True, slots=True)
class AffinityVectors:
    """Makes affinity vectors [n, V] for one release."""

    space: records_pb2.VectorSpace
    components: Components
    text_segment: slice
    """Columns of the text segment in a vector."""
    row_of: dict[str, int]
    """Rows of `exported` by item id."""
    exported: NDArray[np.float32]
    """[items, V], the affinity vectors in the release."""

    @staticmethod
    def of(items: ReleasedEntities) -> "AffinityVectors | None":
        """The affinity vectors of a release's items; None if the release has none with a text segment.

        Raises:
            PreconditionError: the release was exported from other encoded vectors than its model was trained on.
        """
        release = items.release
        affinity = release.manifest.affinity
        text_segment, start = None, 0
        for segment in affinity.segments:
            if segment.name == TEXT_SEGMENT:
                text_segment = slice(start, start + segment.dim)
            start += segment.dim
        if text_segment is None or not affinity.HasField("space"):
            return None
        encoded = torch.from_numpy(np.array(items.vectors("encoded")))  # (items, D)
        components = Components.of(encoded, text_segment.stop - text_segment.start)
        with_affinity = items.with_affinity()
        row_of = {id_: row for row, id_ in enumerate(with_affinity.ids)}
        exported = np.array(with_affinity.vectors("affinity"))
        # Items whose affinity vector is 0 were not exported.
        rows = [row_of.get(id_, -1) for id_ in items.ids]
        trained = np.pad(exported[:, text_segment], ((0, 1), (0, 0)))[rows]
        if not np.allclose(components.project(encoded).numpy(), trained, atol=TOLERANCE):
            raise PreconditionError(
                f"release {release.release_id} was exported from other vectors than its model was trained on: train "
                "and export again"
            )
        return AffinityVectors(affinity.space, components, text_segment, row_of, exported)

    def vectors(self, ids: Sequence[str], encoded: NDArray[np.float32]) -> NDArray[np.float32]:
        """Affinity vectors [n, V] of items with encoded vectors [n, D]."""
        vectors = np.zeros((len(ids), self.exported.shape[1]), np.float32)
        for number, id_ in enumerate(ids):
            if (row := self.row_of.get(id_)) is not None:
                vectors[number] = self.exported[row]
        projected = self.components.project(torch.from_numpy(np.ascontiguousarray(encoded)))  # (n, text components)
        vectors[:, self.text_segment] = projected.numpy()
        return vectors
