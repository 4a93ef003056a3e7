"""Owns the offline scores that online scores are compared with, from the trained torch models and the dataset.

They do not use the release, the store or the sidecar. Only the feature encoder and the affinity formula are code that
serving uses, too.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from kar_offline.dataset.dataset import Dataset
from kar_offline.replay.slates import Slate
from kar_offline.train import ARMS as RECIPES
from kar_offline.train import load_trained
from kar_offline.train.batches import Batches
from kar_offline.train.features import FeatureEncodings, encode_dataset
from kar_offline.train.knowledge_inputs import KnowledgeInputs
from kar_offline.train.predict import predict_logits
from kar_offline.train.samples import samples_before
from kar_offline.work_folder import WorkFolder
from kar_sidecar.experiments.assignment import ARMS, CONTROL, KNOWLEDGE

__all__ = ["OfflineScorer"]


class OfflineScorer:
    """Scores slates as in training; a user's history ends at the prompt cut-off."""

    def __init__(self, dataset: Dataset, backbone: str, work: WorkFolder, recipe: str = KNOWLEDGE) -> None:
        """Load the two trained models of a backbone: training arm `recipe` for the arm "knowledge", and the control."""
        self._dataset = dataset
        trained = {KNOWLEDGE: load_trained(work, backbone, recipe), CONTROL: load_trained(work, backbone, CONTROL)}
        self._models = {arm: trained[arm].model for arm in ARMS}
        features = FeatureEncodings(trained[CONTROL].encodings, trained[CONTROL].item_ids)
        self._encoded = encode_dataset(dataset, features)
        encodings = work.encoding
        self._knowledge_inputs = {
            arm: KnowledgeInputs.for_serving(RECIPES[run.arm], dataset, run.affinity, encodings, seed=run.seed)
            for arm, run in trained.items()
        }

    def score(self, slate: Slate, arm: str) -> NDArray[np.float32]:
        """Probabilities [C] of the candidates of a slate."""
        dataset, count = self._dataset, len(slate.items)
        event = dataset.offsets[slate.user] + dataset.cutoff[slate.user]
        rows = samples_before(
            self._encoded, np.full(count, event), slate.items, np.zeros(count, np.float32), list_length=count
        )
        logits = predict_logits(self._models[arm], Batches(self._encoded, rows, self._knowledge_inputs[arm]))
        return torch.sigmoid(logits).numpy()
