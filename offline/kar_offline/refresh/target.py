"""Owns the target of a refresh: the release and its encoder, checked before a call is paid for."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

from kar_offline.dataset.dataset import Dataset
from kar_offline.encode.vector_files import Encoding
from kar_offline.encoders.text_encoder import TextEncoder
from kar_offline.publish.release_target import ReleaseTarget
from kar_offline.refresh.context import RefreshContext
from kar_sidecar.errors import PreconditionError
from kar_sidecar.releases.manifest import Release

__all__ = ["RefreshTarget", "check_target"]


@dataclass(frozen=True, slots=True)
class RefreshTarget:
    """The release that takes the fresh knowledge, and its encoder."""

    release: ReleaseTarget
    encoder: TextEncoder


def check_target(
    context: RefreshContext,
    release: Release,
    make_encoder: Callable[[], TextEncoder],
    dataset: Dataset,
    encoding: Encoding,
) -> RefreshTarget:
    """Check that a release is published, and that the work folder and the encoder fit it.

    Raises:
        IntegrityError: the release is corrupt.
        PreconditionError: the release is not published, or something belongs to another release or encoder.
        UnavailableError: the store does not answer.
    """
    with closing(context.open_store()) as store:
        target = ReleaseTarget.check(release, store, dataset, encoding)
    encoder = make_encoder()
    if encoder.encoder_id != release.manifest.encoder_id:
        raise PreconditionError(
            f"release {release.release_id} reads vectors of {release.manifest.encoder_id}, not {encoder.encoder_id}: "
            "name its encoder"
        )
    return RefreshTarget(target, encoder)
