"""Owns the Triton repositories of a release: one for each target, with model names that carry the release id."""

from pathlib import Path

from kar.records.v1 import records_pb2
from kar_model_repository.render import TARGETS, Backbone, Sizes, render
from kar_offline.export.manifest_parts import manifest_json
from kar_offline.export.sources import ExportSources
from kar_sidecar.ranking.affinity import AFFINITY_EVENTS
from kar_sidecar.releases.manifest import RENDERED, Release, list_files

__all__ = ["write_triton_repositories"]


def write_triton_repositories(
    draft: Path, manifest: records_pb2.Manifest, sources: ExportSources, cores: int | None
) -> None:
    """Write `triton/`, and the list of its files.

    Args:
        draft: The release's folder before it is complete.
        manifest: The release's manifest, with its id.
        sources: The inputs.
        cores: Cores that the models of the CPU repository may use together; None: the cores of this process.
    """
    release = Release(draft, manifest)
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
            sizes=_tensor_sizes(sources),
            precision=sources.adaptor.precision,
            cores=cores,
        )
    rendered = records_pb2.Manifest(release_id=manifest.release_id, files=list_files(draft, files))
    (draft / RENDERED).write_text(manifest_json(rendered))


def _tensor_sizes(sources: ExportSources) -> Sizes:
    """Sizes of the tensors that the models read."""
    spec = sources.knowledge_model.backbone.spec
    return Sizes(
        history=sources.dataset.schema.history_length,
        user_categorical=spec.user_columns,
        user_numeric=max(spec.user_numbers, 1),
        item_categorical=spec.item_columns,
        item_numeric=max(spec.item_numbers, 1),
        encoding=sources.vectors.dim,
        user_knowledge=spec.user_knowledge,
        item_knowledge=spec.item_knowledge,
        affinity=spec.affinity,
        vector=spec.vector,
        vector_events=AFFINITY_EVENTS if spec.vector else 0,
    )
