"""Owns the files of a release that its manifest lists: models, adaptor, vectors, knowledge records."""

import shutil
from collections.abc import Sequence
from itertools import compress
from pathlib import Path

import numpy as np
import torch

from kar_kernels import FrozenAdaptor, HybridExpertAdaptor, Tower
from kar_offline.export.sources import TOWERS, ExportSources
from kar_offline.models.onnx import export_onnx
from kar_sidecar.errors import InputError, PreconditionError

__all__ = ["write_release_files"]


def write_release_files(draft: Path, sources: ExportSources) -> float:
    """Write every file that the manifest lists.

    Args:
        draft: The release's folder before it is complete.
        sources: The inputs.

    Returns:
        The largest absolute difference of an adapted vector's component from the one computed in float32.

    Raises:
        InputError: an id cannot be written as a line.
        PreconditionError: there is no knowledge.
    """
    for name in ("backbones", "vectors", "knowledge"):
        (draft / name).mkdir(parents=True)
    export_onnx(sources.knowledge_model.backbone, draft / "backbones" / "knowledge.onnx")
    export_onnx(sources.control_model.backbone, draft / "backbones" / "control.onnx")
    sources.adaptor.save(draft / "adaptor.safetensors")
    _write_ids(draft / "item_ids.txt", sources.knowledge_model.item_ids)
    vector_error = _write_vectors(draft / "vectors", sources)
    _write_neutral_vectors(draft / "vectors", sources.adaptor)
    _write_affinity(draft / "vectors", sources)
    _copy_knowledge(draft / "knowledge", sources.knowledge_folder)
    return vector_error


def _write_vectors(folder: Path, sources: ExportSources) -> float:
    """Write ids, encoded vectors and adapted vectors of both kinds; returns the error of the adapted vectors."""
    adaptor = sources.adaptor
    frozen, exact = adaptor.freeze(), _freeze_float32(adaptor)
    vector_error = 0.0
    for kind in TOWERS:
        ids, encoded = sources.encoded(kind)  # (n, D)
        _write_ids(folder / f"{kind}_ids.txt", ids)
        _write_ids(folder / f"{kind}_lent.txt", [id_ for id_ in ids if id_ in sources.imputed_ids[kind]])
        np.save(folder / f"{kind}_encoded.npy", encoded.numpy())
        if kind in adaptor.towers:
            encodings = {kind: (encoded, torch.ones(len(encoded), dtype=torch.bool))}
            adapted = frozen.adapt(encodings)[kind]  # (n, K)
            if exact is not None and len(encoded):
                difference = (adapted - exact.adapt(encodings)[kind]).abs().max()
                vector_error = max(vector_error, float(difference))
            np.save(folder / f"{kind}_adapted.npy", adapted.numpy())
    return vector_error


def _freeze_float32(adaptor: HybridExpertAdaptor) -> FrozenAdaptor | None:
    """The same weights multiplied in float32; None if the adaptor multiplies in float32 anyway."""
    if adaptor.precision == "float32":
        return None
    precision, adaptor.precision = adaptor.precision, "float32"
    frozen, adaptor.precision = adaptor.freeze(), precision
    return frozen


def _write_neutral_vectors(folder: Path, adaptor: HybridExpertAdaptor) -> None:
    """Write the neutral vectors [2, K]: user row, item row; zeros for a kind without a tower."""

    def neutral(kind: Tower) -> torch.Tensor:
        return adaptor.neutral(kind) if kind in adaptor.towers else torch.zeros(adaptor.out)

    np.save(folder / "neutral.npy", torch.stack([neutral(kind) for kind in TOWERS]).detach().numpy())


def _write_affinity(folder: Path, sources: ExportSources) -> None:
    """Write the affinity vectors of the items that have one, if the knowledge model reads them."""
    affinity = sources.knowledge_model.affinity
    if affinity is None or not affinity.segments:
        return
    present = affinity.vectors.any(1)  # (items,)
    _write_ids(folder / "affinity_ids.txt", [item.id for item in compress(sources.dataset.items, present)])
    np.save(folder / "affinity.npy", affinity.vectors[present].numpy())


def _copy_knowledge(folder: Path, knowledge: Path) -> None:
    """Copy the knowledge records about entities and, if there are any, about clusters."""
    for kind in TOWERS:
        source = knowledge / f"{kind}.jsonl"
        if not source.is_file():
            raise PreconditionError(f"{source} does not exist: run `kar generate` first")
        for file in (source, knowledge / f"{kind}_clusters.jsonl"):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def _write_ids(path: Path, ids: Sequence[str]) -> None:
    """Write one id per line."""
    if any(id_.splitlines() != [id_] for id_ in ids):
        raise InputError(f"an id is empty or holds a line break, so {path.name} cannot hold it: change the dataset")
    path.write_text("".join(f"{id_}\n" for id_ in ids))
