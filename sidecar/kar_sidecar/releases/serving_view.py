"""Owns a release in one serving mode: which vectors are read, and which models are called."""

from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from kar.records.v1 import records_pb2
from kar_sidecar.errors import PreconditionError
from kar_sidecar.experiments.assignment import ARMS, KNOWLEDGE
from kar_sidecar.releases.manifest import Release
from kar_sidecar.store import FEATURES, vector_part

__all__ = ["ENCODED", "PRESTORED", "Mode", "ServedRelease"]

Mode = Literal["prestored", "encoded"]
PRESTORED: Final = "prestored"
ENCODED: Final = "encoded"


@dataclass(frozen=True)
class ServedRelease:
    """One release in one serving mode."""

    release: Release
    mode: Mode

    @property
    def id(self) -> str:
        """The release's id."""
        return self.release.release_id

    @cached_property
    def space(self) -> records_pb2.VectorSpace:
        """The space of the knowledge vectors that this mode reads."""
        manifest = self.release.manifest
        return manifest.encoded_space if self.mode == ENCODED else manifest.adapted_space

    @cached_property
    def neutral(self) -> NDArray[np.float32]:
        """Vectors float32 [2, dim] in the place of missing ones: row 0 for users, row 1 for items.

        Zeros in `encoded` mode, where the adaptor itself inserts the learned neutral vector.
        """
        return np.zeros((2, self.space.dim), np.float32) if self.mode == ENCODED else self.release.neutral

    @property
    def affinity_space(self) -> records_pb2.VectorSpace | None:
        """The space of the items' affinity vectors; None for a release without them."""
        affinity = self.release.affinity
        return affinity.space if affinity and affinity.HasField("space") else None

    def parts(self, arm: str) -> tuple[str, ...]:
        """Store parts that an arm reads for user and candidates: features, knowledge vectors, affinity vectors."""
        if arm != KNOWLEDGE:
            return (FEATURES,)
        parts = (FEATURES, vector_part(self.space.space_id))
        return (*parts, vector_part(self.affinity_space.space_id)) if self.affinity_space else parts

    def model(self, arm: str) -> str:
        """Name of the model that scores an arm.

        Raises:
            PreconditionError: the release has none.
        """
        entry = self.release.model(arm)
        template = entry.triton_ensemble if self.mode == ENCODED and arm == KNOWLEDGE else entry.triton_model
        if not template:
            raise PreconditionError(f"release {self.id} has no ensemble: serve it in the mode {PRESTORED!r}")
        return self.release.triton_name(template)

    def models(self) -> tuple[str, ...]:
        """Names of all models that this mode needs, in the order to load them."""
        if self.mode == ENCODED:
            # Ensembles first: with an ensemble, Triton also loads its models, even if they are already loaded, and
            # `TritonProcess.ready` would take the end of the replaced model processes for a crash.
            return tuple(self.release.triton_models())[::-1]
        return tuple(self.model(arm) for arm in ARMS)
