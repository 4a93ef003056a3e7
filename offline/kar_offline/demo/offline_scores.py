"""Owns the offline side of the parity proof: the trained torch model and the adaptor itself, straight from the dataset.

Nothing of the release, the store or the sidecar takes part but the feature encoder that both sides share.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kar_offline.dataset.samples import Dataset
from kar_offline.demo.traffic import Slate
from kar_offline.models import Knowledge
from kar_offline.models.inputs import REQUEST_OF_ROW
from kar_offline.train import load_trained
from kar_offline.train.features import FeatureEncodings, encode_dataset
from kar_offline.train.vectors import load_text_vectors
from kar_sidecar.experiments import ARMS, CONTROL, KNOWLEDGE

__all__ = ["OfflineScorer"]


class OfflineScorer:
    """Scores slates as training would: the history is what the user did up to the prompt cut-off."""

    def __init__(self, dataset: Dataset, backbone: str, work: Path) -> None:
        """Load the trained models of `backbone` in both serving arms."""
        self._dataset = dataset
        trained = {arm: load_trained(work, backbone, arm) for arm in ARMS}
        self._models = {arm: one.model for arm, one in trained.items()}
        features = FeatureEncodings(trained[CONTROL].encodings, trained[CONTROL].item_ids)
        self._encoded = encode_dataset(dataset, features)
        self._vectors = load_text_vectors(work / "encoding", "knowledge", dataset)

    @torch.no_grad()
    def score(self, slate: Slate, arm: str) -> NDArray[np.float32]:
        """Probabilities [C] of one slate's candidates."""
        dataset, columns = self._dataset, self._encoded.columns
        history_item, history_rating = self._encoded.histories(
            np.array([dataset.offsets[slate.user] + dataset.cutoff[slate.user]])
        )
        user, rows = torch.tensor([slate.user]), torch.from_numpy(slate.items)
        inputs = {
            "history_item": history_item,
            "history_rating": history_rating,
            "user_categorical": columns["user_categorical"][user],
            "user_numeric": columns["user_numeric"][user],
            "item_index": columns["item_index"][rows],
            "item_categorical": columns["item_categorical"][rows],
            "item_numeric": columns["item_numeric"][rows],
            REQUEST_OF_ROW: torch.zeros(len(rows), dtype=torch.int64),
        }
        known = self._vectors
        knowledge = Knowledge(
            known.user[user],
            known.user_present[user],
            torch.zeros(1, dtype=torch.int64),
            known.item[rows],
            known.item_present[rows],
            torch.arange(len(rows)),
        )
        logits = self._models[arm](inputs, knowledge if arm == KNOWLEDGE else None)
        return torch.sigmoid(logits).numpy()
