"""Owns the loop over samples with which research code trains, a baseline of the training benchmark.

All values are Python lists, vectors included. Each sample converts its lists to tensors, and samples are collated to
batches. The adaptor runs on every row, even if an entity occurs in the batch several times. The model is ours.
"""

import time
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from kar_kernels import Tower
from kar_offline.models import CTRModel, Encodings
from kar_offline.train.batches import Batches
from kar_offline.train.settings import TrainSettings
from kar_sidecar.scoring import AFFINITY

__all__ = ["PerSample", "score_seconds", "train_seconds"]


class PerSample(TorchDataset[dict[str, Tensor]]):
    """The rows of a feed as lists, converted one sample at a time."""

    def __init__(self, feed: Batches) -> None:
        samples = feed.samples
        self._of_row: dict[str, list[Any]] = {
            "history_item": samples.history_item.tolist(),
            "history_rating": samples.history_rating.tolist(),
            "label": samples.label.tolist(),
        }
        if feed.affinity.shape[1]:
            self._of_row[AFFINITY] = feed.affinity.tolist()
        self._rows = {"user": samples.user.tolist(), "item": samples.item.tolist()}
        self._of_entity = {name: column.tolist() for name, column in feed.data.columns.items()}
        self.towers: tuple[Tower, ...] = feed.knowledge_inputs.arm.towers
        for tower in self.towers:
            vectors, present = feed.knowledge_inputs.encodings(tower)
            self._of_entity |= {f"{tower}_text": vectors.tolist(), f"{tower}_present": present.tolist()}

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._of_row["label"])

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        """One sample."""
        values = {name: column[row] for name, column in self._of_row.items()}
        values |= {name: column[self._rows[name.split("_")[0]][row]] for name, column in self._of_entity.items()}
        return {name: torch.tensor(value) for name, value in values.items()}

    def logits(self, model: CTRModel, batch: dict[str, Tensor]) -> Tensor:
        """The model's log-odds [B] of collated samples."""
        row = torch.arange(len(batch["label"]))
        encodings = {tower: Encodings(batch[f"{tower}_text"], batch[f"{tower}_present"], row) for tower in self.towers}
        return model(batch, encodings)


def train_seconds(model: CTRModel, feed: Batches, settings: TrainSettings) -> float:
    """Seconds of one pass with optimisation; the lists are made beforehand."""
    rows = PerSample(feed)
    optimiser = torch.optim.AdamW(
        model.train().parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    began = time.perf_counter()
    for batch in DataLoader(rows, settings.batch, shuffle=True):
        optimiser.zero_grad()
        model.backbone.loss(rows.logits(model, batch), batch["label"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimiser.step()
    return time.perf_counter() - began


@torch.no_grad()
def score_seconds(model: CTRModel, feed: Batches, batch: int) -> tuple[float, Tensor]:
    """Seconds of one pass without optimisation, and the log-odds [S]; the lists are made beforehand."""
    rows = PerSample(feed)
    model.eval()
    began = time.perf_counter()
    logits = torch.cat([rows.logits(model, part) for part in DataLoader(rows, batch)])
    return time.perf_counter() - began, logits
