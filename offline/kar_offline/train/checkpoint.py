"""Owns a trained model on disk: the files of one run's folder.

model.safetensors     weights
affinity.safetensors  item vectors and the standardisation of the affinity columns, if the model reads affinity
config.json           backbone, arm, input sizes, adaptor, encodings of features, item vocabulary, settings
metrics.json          figures of the training
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from google.protobuf import json_format
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kar.records.v1 import records_pb2
from kar_kernels import HybridExpertAdaptor
from kar_offline.models import Adaptor, Backbone, CTRModel, Identity, InputSpec, build_backbone
from kar_offline.train.features import FeatureEncodings
from kar_offline.train.knowledge_inputs import AffinityInput
from kar_offline.work_folder import WorkFolder
from kar_sidecar.errors import IntegrityError, PreconditionError

__all__ = ["TrainedModel", "build_model", "load_trained", "run_folder", "save_trained"]

MODEL: Final = "model.safetensors"
AFFINITY: Final = "affinity.safetensors"
CONFIG: Final = "config.json"
METRICS: Final = "metrics.json"


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """One trained run, in evaluation mode."""

    arm: str
    name: str
    """Name of the backbone."""
    backbone: Backbone
    adaptor: Adaptor | None
    affinity: AffinityInput | None
    encodings: Sequence[records_pb2.FeatureEncoding]
    """One per feature of the schema."""
    item_ids: Sequence[str]
    """The item vocabulary; the item at position i has the index i + RESERVED."""
    encoder_id: str
    """Empty for an arm without texts."""
    seed: int
    metrics: Mapping[str, Any]
    """Figures of the training, see `metrics.json`."""

    @property
    def model(self) -> CTRModel:
        """Backbone and adaptor together, in evaluation mode."""
        return CTRModel(self.backbone, self.adaptor).eval()


def run_folder(work: WorkFolder, backbone: str, arm: str) -> Path:
    """The folder of a run."""
    return work.training / f"{backbone}_{arm}"


def build_model(name: str, spec: InputSpec, categories: Tensor, adaptor: Mapping[str, Any] | None) -> CTRModel:
    """A model with fresh weights, drawn from torch's global random state.

    Args:
        name: Name of the backbone.
        spec: Sizes of the backbone's inputs.
        categories: [items, Ic] int64, categories by item index.
        adaptor: Arguments of `HybridExpertAdaptor`, or of `Identity` if there is no `hidden`; None for an arm without
            encodings.
    """
    module: Adaptor | None = None
    if adaptor:
        module = HybridExpertAdaptor(**adaptor) if "hidden" in adaptor else Identity(adaptor["dim"], adaptor["towers"])
    return CTRModel(build_backbone(name, spec, categories), module)


def save_trained(
    folder: Path,
    weights: Mapping[str, Tensor],
    features: FeatureEncodings,
    affinity: AffinityInput | None,
    *,
    identity: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> None:
    """Write the files of a run.

    Args:
        folder: The folder to write to.
        weights: Weights of the `CTRModel` by name.
        features: Encodings of the features.
        affinity: Affinity vectors and standardisation, if the model reads them.
        identity: `backbone`, `arm`, `spec`, `adaptor`, `encoder_id` and `settings` for `config.json`.
        metrics: Figures of the training for `metrics.json`.
    """
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / MODEL)
    if affinity:
        tensors = {"vectors": affinity.vectors, "mean": affinity.mean, "scale": affinity.scale}
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / AFFINITY)
    encodings = [json_format.MessageToDict(e, preserving_proto_field_name=True) for e in features.encodings]
    config = {
        **identity,
        "affinity": affinity.segments if affinity else None,
        "encodings": encodings,
        "item_ids": list(features.item_ids),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    (folder / METRICS).write_text(json.dumps(metrics, indent=1) + "\n")


def load_trained(work: WorkFolder, backbone: str, arm: str) -> TrainedModel:
    """Read the trained model of a backbone and an arm, such as "dcnv2" and "knowledge".

    Raises:
        PreconditionError: the model is not trained yet.
        IntegrityError: its files are corrupt; the text names the folder.
    """
    folder = run_folder(work, backbone, arm)
    if not (folder / CONFIG).is_file():
        raise PreconditionError(f"{backbone} with arm {arm} is not trained below {work}: run `kar train` first")
    try:
        config = json.loads((folder / CONFIG).read_text())
        weights = load_file(folder / MODEL)
        spec = InputSpec.from_json(config["spec"])
        model = build_model(backbone, spec, weights["backbone.items.categories"], config["adaptor"])
        model.load_state_dict(weights)
        affinity = None
        if config["affinity"] is not None:
            segments = tuple((str(name), int(width)) for name, width in config["affinity"])
            affinity = AffinityInput(segments, **load_file(folder / AFFINITY))
        metrics = json.loads((folder / METRICS).read_text())
        encodings = [json_format.ParseDict(e, records_pb2.FeatureEncoding()) for e in config["encodings"]]
        item_ids, encoder_id, seed = config["item_ids"], config["encoder_id"], int(config["settings"]["seed"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, json_format.ParseError) as error:
        raise IntegrityError(f"{folder} does not hold a readable model ({error}): train it again") from error
    model.eval()
    return TrainedModel(
        arm, backbone, model.backbone, model.adaptor, affinity, encodings, item_ids, encoder_id, seed, metrics
    )
