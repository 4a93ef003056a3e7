"""Owns how a release is built from the work folder; its layout is in `kar_sidecar.releases.manifest`.

The release id is the hash of the manifest, and the manifest holds the hash of every file but those below `triton/`:
model names there carry the id, so they are rendered when it is known, and listed in `triton/files.json`. Nothing
that is hashed depends on the time or on the number of cores: the same work folder gives the same id.
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Final

import numpy as np
import torch
from google.protobuf import json_format

from kar.records.v1 import records_pb2
from kar_kernels import PRECISIONS, FrozenAdaptor, HybridExpertAdaptor, Precision, Tower
from kar_model_repository.render import TARGETS, Backbone, Sizes, is_current, render
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.encode.vector_files import imputed_ids
from kar_offline.knowledge.records import read_clusters, read_knowledge
from kar_offline.models import BACKBONES, RERANKERS
from kar_offline.models.onnx import export_onnx
from kar_offline.stage_runner import StageResult
from kar_offline.train.arms import ARMS
from kar_offline.train.checkpoint import TrainedModel, load_trained
from kar_offline.train.vectors import TextVectors, load_text_vectors
from kar_offline.work_folder import WorkFolder
from kar_sidecar.content_hash import file_sha256
from kar_sidecar.entities import EntityKind
from kar_sidecar.errors import InputError, IntegrityError, NotFoundError, PreconditionError
from kar_sidecar.features import schema_hash
from kar_sidecar.ranking.affinity import AFFINITY_EVENTS
from kar_sidecar.releases.manifest import (
    ACTIVE,
    MANIFEST,
    RENDERED,
    Release,
    list_files,
    manifest_id,
    read_active,
    write_active,
)

__all__ = ["export"]

DTYPE: Final = "float32"
TOWERS: Final[tuple[Tower, ...]] = ("user", "item")
SERVED_TEXTS: Final = ("knowledge", "raw")
ADAPTOR: Final = "adaptor_{release}"


def export(
    work: WorkFolder,
    backbone: str,
    arm: str = "knowledge",
    *,
    precision: Precision = "float32",
    activate: bool = False,
    cores: int | None = None,
    now_s: Callable[[], float] = time.time,
) -> StageResult:
    """Make the release of one backbone and arm below `work`/releases, unless it is there, whole and of this version.

    Args:
        work: Holds `dataset`, `knowledge`, `encoding` and `training`.
        backbone: A trained backbone, in lower case.
        arm: The training arm whose model becomes the knowledge model; one with an adaptor. The control comes along.
        precision: What the adaptor multiplies in, for prestored vectors and in Triton, where the device can.
        activate: Serve this release from now on; the first one is activated anyway.
        cores: What the CPU repository may use together; default: the cores of this process.
        now_s: Seconds since the epoch, for the manifest's creation time.

    Returns:
        The release's folder, and a report with `release_id`, `backbone`, `arm`, `active`, `files`, `bytes`,
        `precision` and `vector_error`, the largest absolute difference of an adapted vector's component to float32's.

    Raises:
        InputError: no such backbone, arm or precision, or an arm without an adaptor.
        PreconditionError: an earlier stage is missing.
        IntegrityError: what the stages made is corrupt or does not belong together.
    """
    began = time.perf_counter()
    if backbone not in (names := (*BACKBONES, *RERANKERS)):
        raise InputError(f"backbone {backbone!r} is not known: choose from {', '.join(names)}")
    able = [name for name, one in ARMS.items() if one.towers and one.adaptor != "none" and one.texts in SERVED_TEXTS]
    if arm not in able:
        raise InputError(f"arm {arm!r} has no adaptor of real texts to release: choose from {', '.join(able)}")
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r} is not known: choose from {', '.join(PRECISIONS)}")
    texts = ARMS[arm].texts
    knowledge, control = (load_trained(work, backbone, name) for name in (arm, "control"))
    dataset = work.read(Dataset)
    vectors = load_text_vectors(work.encoding, texts, dataset)
    if vectors.encoder_id != knowledge.encoder_id:
        raise IntegrityError(
            f"{backbone} was trained on vectors of {knowledge.encoder_id}, not {vectors.encoder_id}: train it again"
        )
    if list(control.encodings) != list(knowledge.encodings) or control.item_ids != knowledge.item_ids:
        raise IntegrityError(f"the two models of {backbone} read different features: train them again")

    _adaptor(knowledge).precision = precision
    releases = work.releases
    draft = releases / f".{backbone}_{arm}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    lent = {kind: imputed_ids(work.encoding, texts, kind) for kind in TOWERS}
    vector_error = _write_files(draft, work.knowledge, knowledge, control, dataset, vectors, lent)
    manifest = _manifest(draft, knowledge, control, dataset, vectors, texts)
    manifest.release_id = manifest_id(manifest)
    folder = releases / manifest.release_id
    try:
        Release.load(releases, manifest.release_id)
        whole = is_current(folder)
    except (NotFoundError, IntegrityError):
        whole = False
    if whole:
        shutil.rmtree(draft)
    else:
        manifest.created_at.FromNanoseconds(int(now_s() * 1e9))
        (draft / MANIFEST).write_text(_as_json(manifest))
        _render(draft, manifest, knowledge, dataset, vectors.dim, cores)
        shutil.rmtree(folder, ignore_errors=True)
        draft.replace(folder)
    if activate or not (releases / ACTIVE).is_file():
        write_active(releases, manifest.release_id)
    report = {
        "release_id": manifest.release_id,
        "backbone": backbone,
        "arm": arm,
        "active": read_active(releases) == manifest.release_id,
        "files": len(manifest.files),
        "bytes": sum(entry.bytes for entry in manifest.files),
        "precision": precision,
        "vector_error": vector_error,
    }
    return StageResult(f"export {backbone}", folder, not whole, time.perf_counter() - began, report)


def _adaptor(knowledge: TrainedModel) -> HybridExpertAdaptor:
    if not isinstance(knowledge.adaptor, HybridExpertAdaptor):
        raise IntegrityError(f"the knowledge model of {knowledge.name} has no adaptor: train it again")
    return knowledge.adaptor


def _write_files(
    draft: Path,
    texts: Path,
    knowledge: TrainedModel,
    control: TrainedModel,
    dataset: Dataset,
    vectors: TextVectors,
    lent: Mapping[Tower, Collection[str]],
) -> float:
    """Write every file that the manifest lists; returns how far the precision moves an adapted vector."""
    for name in ("backbones", "vectors", "knowledge"):
        (draft / name).mkdir(parents=True)
    for name, trained in (("knowledge", knowledge), ("control", control)):
        export_onnx(trained.backbone, draft / "backbones" / f"{name}.onnx")
    adaptor = _adaptor(knowledge)
    adaptor.save(draft / "adaptor.safetensors")
    frozen, exact = adaptor.freeze(), _exact(adaptor)
    vector_error = 0.0
    _write_ids(draft / "item_ids.txt", knowledge.item_ids)
    entities: dict[str, Sequence[Entity]] = {"user": dataset.users, "item": dataset.items}
    for kind in TOWERS:
        present = vectors.user_present if kind == "user" else vectors.item_present
        encoded = (vectors.user if kind == "user" else vectors.item)[present]
        ids = [entity.id for entity in compress(entities[kind], present)]
        _write_ids(draft / "vectors" / f"{kind}_ids.txt", ids)
        _write_ids(draft / "vectors" / f"{kind}_lent.txt", [id_ for id_ in ids if id_ in lent[kind]])
        np.save(draft / "vectors" / f"{kind}_encoded.npy", encoded.numpy())
        if kind in adaptor.towers:
            given = {kind: (encoded, torch.ones(len(encoded), dtype=torch.bool))}
            adapted = frozen.adapt(given)[kind]
            if exact is not None and len(encoded):
                vector_error = max(vector_error, float((adapted - exact.adapt(given)[kind]).abs().max()))
            np.save(draft / "vectors" / f"{kind}_adapted.npy", adapted.numpy())
        source = texts / f"{kind}.jsonl"
        if not source.is_file():
            raise PreconditionError(f"{source} does not exist: run `kar generate` first")
        for file in (source, texts / f"{kind}_clusters.jsonl"):
            if file.is_file():
                shutil.copyfile(file, draft / "knowledge" / file.name)
    nothing = torch.zeros(adaptor.out)
    neutral = torch.stack([adaptor.neutral(kind) if kind in adaptor.towers else nothing for kind in TOWERS])
    np.save(draft / "vectors" / "neutral.npy", neutral.detach().numpy())
    if knowledge.affinity is not None and knowledge.affinity.segments:
        table = knowledge.affinity.vectors
        known = table.any(1)
        _write_ids(draft / "vectors" / "affinity_ids.txt", [item.id for item in compress(dataset.items, known)])
        np.save(draft / "vectors" / "affinity.npy", table[known].numpy())
    return vector_error


def _exact(adaptor: HybridExpertAdaptor) -> FrozenAdaptor | None:
    """The same weights in float32, to compare with; None where they are multiplied in it anyway."""
    if adaptor.precision == "float32":
        return None
    asked, adaptor.precision = adaptor.precision, "float32"
    frozen, adaptor.precision = adaptor.freeze(), asked
    return frozen


def _write_ids(path: Path, ids: Sequence[str]) -> None:
    if any(id_.splitlines() != [id_] for id_ in ids):
        raise InputError(f"an id is empty or holds a line break, so {path.name} cannot hold it: change the dataset")
    path.write_text("".join(f"{id_}\n" for id_ in ids))


def _space(*content: str, dim: int) -> records_pb2.VectorSpace:
    space_id = hashlib.sha256("\n".join((*content, DTYPE)).encode()).hexdigest()[:12]
    return records_pb2.VectorSpace(space_id=space_id, dim=dim, dtype=DTYPE)


def _manifest(
    draft: Path,
    knowledge: TrainedModel,
    control: TrainedModel,
    dataset: Dataset,
    vectors: TextVectors,
    texts: str,
) -> records_pb2.Manifest:
    """The manifest of the files in `draft`, without id and creation time."""
    weights = file_sha256(draft / "adaptor.safetensors")
    return records_pb2.Manifest(
        dataset=dataset.name,
        encoder_id=vectors.encoder_id,
        prompt_versions=_prompt_versions(draft / "knowledge"),
        adapted_space=_space(vectors.encoder_id, weights, dim=_adaptor(knowledge).out),
        encoded_space=_space(vectors.encoder_id, *(() if texts == "knowledge" else (texts,)), dim=vectors.dim),
        feature_schema=dataset.schema,
        feature_schema_hash=schema_hash(dataset.schema),
        feature_encodings=knowledge.encodings,
        models=[
            _entry(knowledge, "knowledge", ensemble=f"{knowledge.name}_encoded_{{release}}"),
            _entry(control, "control"),
        ],
        triton_adaptor=ADAPTOR,
        towers=[EntityKind(tower).number for tower in _adaptor(knowledge).towers],
        affinity=_affinity(draft, knowledge, vectors.encoder_id),
        files=list_files(draft, (path for path in draft.rglob("*") if path.is_file())),
    )


def _affinity(draft: Path, knowledge: TrainedModel, encoder_id: str) -> records_pb2.Affinity | None:
    """What the knowledge model reads as affinity; its space depends on the vectors alone, not on the model."""
    known, spec = knowledge.affinity, knowledge.backbone.spec
    if known is None:
        return None
    space = None
    if known.segments:
        names = ",".join(name for name, _ in known.segments)
        content = file_sha256(draft / "vectors" / "affinity.npy")
        space = _space("affinity", encoder_id, names, content, dim=sum(known.widths))
    return records_pb2.Affinity(
        space=space,
        segments=[records_pb2.AffinitySegment(name=name, dim=width) for name, width in known.segments],
        events=AFFINITY_EVENTS,
        mean=known.mean.tolist(),
        scale=known.scale.tolist(),
        learned=bool(spec.vector),
    )


def _entry(trained: TrainedModel, arm: str, ensemble: str = "") -> records_pb2.ModelEntry:
    return records_pb2.ModelEntry(
        backbone=trained.name,
        arm=arm,
        triton_model=f"{trained.name}_{arm}_{{release}}",
        triton_ensemble=ensemble,
        metrics={"validation_loss": float(trained.metrics["validation_loss"])},
        recipe=trained.arm,
    )


def _prompt_versions(texts: Path) -> dict[str, str]:
    """Versions of each template in the knowledge records, "1" or "1,2"; "unknown" ones as they are."""
    found: dict[str, set[str]] = {}
    for kind in TOWERS:
        for record in (*read_knowledge(texts, kind), *read_clusters(texts, kind)):
            if record.text:
                name, _, version = record.template.partition("/")
                found.setdefault(name, set()).add(version or "unknown")
    return {name: ",".join(sorted(versions)) for name, versions in found.items()}


def _render(
    draft: Path, manifest: records_pb2.Manifest, knowledge: TrainedModel, dataset: Dataset, dim: int, cores: int | None
) -> None:
    """Write `triton/`: a repository for each target, and the list of its files."""
    release, spec = Release(draft, manifest), knowledge.backbone.spec
    sizes = Sizes(
        history=dataset.schema.history_length,
        user_categorical=spec.user_columns,
        user_numeric=max(spec.user_numbers, 1),
        item_categorical=spec.item_columns,
        item_numeric=max(spec.item_numbers, 1),
        encoding=dim,
        user_knowledge=spec.user_knowledge,
        item_knowledge=spec.item_knowledge,
        affinity=spec.affinity,
        vector=spec.vector,
        vector_events=AFFINITY_EVENTS if spec.vector else 0,
    )
    backbones = [
        Backbone(
            release.triton_name(entry.triton_model),
            draft / "backbones" / f"{entry.arm}.onnx",
            release.triton_name(entry.triton_ensemble),
        )
        for entry in manifest.models
    ]
    files: list[Path] = []
    for target in TARGETS:
        files += render(
            target,
            draft / "triton" / target,
            adaptor=release.triton_name(manifest.triton_adaptor),
            adaptor_weights=draft / "adaptor.safetensors",
            backbones=backbones,
            sizes=sizes,
            precision=_adaptor(knowledge).precision,
            cores=cores,
        )
    rendered = records_pb2.Manifest(release_id=manifest.release_id, files=list_files(draft, files))
    (draft / RENDERED).write_text(_as_json(rendered))


def _as_json(manifest: records_pb2.Manifest) -> str:
    return json_format.MessageToJson(manifest, preserving_proto_field_name=True) + "\n"
