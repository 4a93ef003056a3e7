"""Owns a trained model on disk: `model.safetensors`, `config.json` and `metrics.json` of one run."""

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
from kar_offline.models import Backbone, CTRModel, InputSpec, build_backbone
from kar_offline.train.features import FeatureEncodings
from kar_sidecar.errors import IntegrityError, PreconditionError

__all__ = [
    "ARMS",
    "CONTROL",
    "TEXT_SOURCES",
    "TrainedModel",
    "build_model",
    "load_trained",
    "run_folder",
    "save_trained",
]

CONTROL: Final = "control"
TEXT_SOURCES: Final = {"raw_text": "raw", "knowledge": "knowledge"}
"""The text source that each arm with an adaptor reads."""
ARMS: Final = (CONTROL, *TEXT_SOURCES)
MODEL: Final = "model.safetensors"
CONFIG: Final = "config.json"
METRICS: Final = "metrics.json"


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """One trained run, in evaluation mode.

    `adaptor` is None and `encoder_id` empty for the control arm; `item_ids[i]` has index i + RESERVED; `metrics` are
    of the validation split.
    """

    arm: str
    name: str
    backbone: Backbone
    adaptor: HybridExpertAdaptor | None
    encodings: Sequence[records_pb2.FeatureEncoding]
    item_ids: Sequence[str]
    encoder_id: str
    metrics: Mapping[str, Any]

    @property
    def model(self) -> CTRModel:
        """Backbone and adaptor joined, in evaluation mode."""
        return CTRModel(self.backbone, self.adaptor).eval()


def run_folder(work: Path, backbone: str, arm: str) -> Path:
    """Where a run's stage writes."""
    return work / "training" / f"{backbone}_{arm}"


def build_model(name: str, spec: InputSpec, categories: Tensor, adaptor: Mapping[str, int] | None) -> CTRModel:
    """A freshly initialised model; `adaptor` holds the arguments of `HybridExpertAdaptor`, None for a control."""
    made = HybridExpertAdaptor(**adaptor) if adaptor else None
    return CTRModel(build_backbone(name, spec, categories), made)


def save_trained(
    folder: Path,
    weights: Mapping[str, Tensor],
    features: FeatureEncodings,
    *,
    identity: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> None:
    """Write a run: `identity` holds `backbone`, `arm`, `spec`, `adaptor` and `encoder_id` for `load_trained`."""
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / MODEL)
    encodings = [json_format.MessageToDict(e, preserving_proto_field_name=True) for e in features.encodings]
    config = {**identity, "encodings": encodings, "item_ids": list(features.item_ids)}
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    (folder / METRICS).write_text(json.dumps(metrics, indent=1) + "\n")


def load_trained(work: Path, backbone: str, arm: str) -> TrainedModel:
    """Read the model that `train` made for a backbone ("dcnv2", "din") and an arm ("control", "raw_text", "knowledge").

    Raises:
        PreconditionError: this run was not trained yet.
        IntegrityError: its files are corrupt; the text names one.
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
        metrics = json.loads((folder / METRICS).read_text())
        encodings = [json_format.ParseDict(e, records_pb2.FeatureEncoding()) for e in config["encodings"]]
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, json_format.ParseError) as error:
        raise IntegrityError(f"{folder} does not hold a readable model ({error}): train it again") from error
    model.eval()
    return TrainedModel(
        arm, backbone, model.backbone, model.adaptor, encodings, config["item_ids"], config["encoder_id"], metrics
    )
