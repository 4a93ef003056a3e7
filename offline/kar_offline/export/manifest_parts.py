"""Owns the manifest of a release: what the release was made from, its models, its vector spaces, its files."""

import hashlib
from pathlib import Path
from typing import Final

from google.protobuf import json_format

from kar.records.v1 import records_pb2
from kar_offline.export.sources import TOWERS, ExportSources
from kar_offline.knowledge.records import read_clusters, read_knowledge
from kar_offline.train.checkpoint import TrainedModel
from kar_sidecar.content_hash import file_sha256
from kar_sidecar.entities import EntityKind
from kar_sidecar.features import schema_hash
from kar_sidecar.ranking.affinity import AFFINITY_EVENTS
from kar_sidecar.releases.manifest import list_files, manifest_id

__all__ = ["make_manifest", "manifest_json"]

DTYPE: Final = "float32"
TRITON_ADAPTOR: Final = "adaptor_{release}"


def make_manifest(draft: Path, sources: ExportSources) -> records_pb2.Manifest:
    """The manifest of the files in `draft`, with its id and without a creation time."""
    knowledge, vectors, dataset = sources.knowledge_model, sources.vectors, sources.dataset
    adaptor_sha256 = file_sha256(draft / "adaptor.safetensors")
    # Vectors of raw texts are in a space of their own.
    text_source = () if sources.text_source == "knowledge" else (sources.text_source,)
    manifest = records_pb2.Manifest(
        dataset=dataset.name,
        encoder_id=vectors.encoder_id,
        prompt_versions=_prompt_versions(draft / "knowledge"),
        adapted_space=_vector_space(vectors.encoder_id, adaptor_sha256, dim=sources.adaptor.out),
        encoded_space=_vector_space(vectors.encoder_id, *text_source, dim=vectors.dim),
        feature_schema=dataset.schema,
        feature_schema_hash=schema_hash(dataset.schema),
        feature_encodings=knowledge.encodings,
        models=[
            _model_entry(knowledge, "knowledge", ensemble=f"{knowledge.name}_encoded_{{release}}"),
            _model_entry(sources.control_model, "control"),
        ],
        triton_adaptor=TRITON_ADAPTOR,
        towers=[EntityKind(tower).number for tower in sources.adaptor.towers],
        affinity=_affinity(draft, knowledge, vectors.encoder_id),
        files=list_files(draft, (path for path in draft.rglob("*") if path.is_file())),
    )
    manifest.release_id = manifest_id(manifest)
    return manifest


def manifest_json(manifest: records_pb2.Manifest) -> str:
    """A manifest as the JSON of its file."""
    return json_format.MessageToJson(manifest, preserving_proto_field_name=True) + "\n"


def _vector_space(*content: str, dim: int) -> records_pb2.VectorSpace:
    """A space whose id is the hash of `content`, everything that its vectors depend on."""
    space_id = hashlib.sha256("\n".join((*content, DTYPE)).encode()).hexdigest()[:12]
    return records_pb2.VectorSpace(space_id=space_id, dim=dim, dtype=DTYPE)


def _model_entry(trained: TrainedModel, arm: str, ensemble: str = "") -> records_pb2.ModelEntry:
    return records_pb2.ModelEntry(
        backbone=trained.name,
        arm=arm,
        triton_model=f"{trained.name}_{arm}_{{release}}",
        triton_ensemble=ensemble,
        metrics={"validation_loss": float(trained.metrics["validation_loss"])},
        recipe=trained.arm,
    )


def _affinity(draft: Path, knowledge: TrainedModel, encoder_id: str) -> records_pb2.Affinity | None:
    """The affinity that the knowledge model reads; its space depends on the vectors only, not on the model."""
    affinity, spec = knowledge.affinity, knowledge.backbone.spec
    if affinity is None:
        return None
    space = None
    if affinity.segments:
        names = ",".join(name for name, _ in affinity.segments)
        vectors_sha256 = file_sha256(draft / "vectors" / "affinity.npy")
        space = _vector_space("affinity", encoder_id, names, vectors_sha256, dim=sum(affinity.widths))
    return records_pb2.Affinity(
        space=space,
        segments=[records_pb2.AffinitySegment(name=name, dim=width) for name, width in affinity.segments],
        events=AFFINITY_EVENTS,
        mean=affinity.mean.tolist(),
        scale=affinity.scale.tolist(),
        learned=bool(spec.vector),
    )


def _prompt_versions(knowledge: Path) -> dict[str, str]:
    """Template versions in the knowledge records, by template: "1", or "1,2"; "unknown" if a record names none."""
    versions: dict[str, set[str]] = {}
    for kind in TOWERS:
        for record in (*read_knowledge(knowledge, kind), *read_clusters(knowledge, kind)):
            if record.text:
                name, _, version = record.template.partition("/")
                versions.setdefault(name, set()).add(version or "unknown")
    return {name: ",".join(sorted(versions_of_name)) for name, versions_of_name in versions.items()}
