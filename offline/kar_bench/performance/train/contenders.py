"""Owns what takes turns in the benchmark of training speed: our trainer and the loop over samples, on the same rows."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Literal

import torch

from kar_bench.performance.train.fuxictr_process import FuxiCTR, Loader
from kar_bench.performance.train.per_sample import score_seconds, train_seconds
from kar_offline.dataset.splits import TRAIN
from kar_offline.models import CTRModel
from kar_offline.train.arms import ARMS
from kar_offline.train.batches import Batches
from kar_offline.train.features import EncodedDataset
from kar_offline.train.fit import fit
from kar_offline.train.knowledge_inputs import KnowledgeInputs
from kar_offline.train.predict import predict_logits
from kar_offline.train.run import Run, new_model
from kar_offline.train.samples import samples_of_split
from kar_offline.train.settings import TrainSettings

__all__ = ["FUXICTR_LOADERS", "PHASES", "Contender", "OurTrainer", "Phase", "fuxictr_contenders"]

Phase = Literal["train", "score"]
PHASES: Final[tuple[Phase, ...]] = ("train", "score")
EVALUATION_BATCH: Final = 2048
PER_SAMPLE_ROWS: Final = 2_048
"""Rows in a turn of the loop over samples, which is slow."""
FUXICTR_LOADERS: Final[dict[str, Loader]] = {"fuxictr": "npz", "fuxictr_in_memory": "memory"}


@dataclass(frozen=True, slots=True)
class Contender:
    """One implementation of one phase."""

    model: str
    arm: str
    implementation: str
    phase: Phase
    rows: int
    """Samples in a turn."""
    turn: Callable[[], float]
    """Runs a turn and returns its seconds."""

    @property
    def name(self) -> str:
        """What is shown while it runs."""
        return f"{self.model} {self.arm}, {self.implementation}, {self.phase}"


class OurTrainer:
    """One model and arm on the first rows of the training split, by our trainer and by the loop over samples."""

    def __init__(self, data: EncodedDataset, encodings: Path, run: Run, rows: int) -> None:
        """Prepare `rows` random training rows.

        Args:
            data: The dataset's arrays with their split.
            encodings: The folder with the texts' vectors.
            run: The model and its arm.
            rows: Samples in a turn.
        """
        self.run, self.data, self.settings = run, data, TrainSettings(epochs=1)
        samples = samples_of_split(data, TRAIN)
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
        self.rows = samples.rows(order[:rows])
        self.inputs = KnowledgeInputs.for_training(ARMS[run.arm], data, samples, encodings, seed=0)
        self.feed = Batches(data, self.rows, self.inputs)
        few = torch.arange(min(PER_SAMPLE_ROWS, rows))
        self.per_sample_feed = Batches(data, self.rows.rows(few), self.inputs)
        self.one_row_feed = Batches(data, self.rows.rows(few[:1]), self.inputs)

    def model(self) -> CTRModel:
        """A new model."""
        return new_model(self.run, self.data, self.inputs, self.settings)

    def train(self) -> float:
        """Seconds of an epoch of `fit`, its checkpoint included."""
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            fit(
                self.model,
                self.feed,
                self.one_row_feed,
                self.settings,
                folder=Path(folder),
                on_epoch=lambda epoch: None,
            )
            return time.perf_counter() - began

    def score(self) -> float:
        """Seconds to score the rows, the computation of affinities included."""
        model = self.model()
        began = time.perf_counter()
        predict_logits(model, Batches(self.data, self.rows, self.inputs))
        return time.perf_counter() - began

    def train_per_sample(self) -> float:
        """Seconds of an epoch of the loop over samples."""
        return train_seconds(self.model(), self.per_sample_feed, self.settings)

    def score_per_sample(self) -> float:
        """Seconds to score by the loop over samples."""
        return score_seconds(self.model(), self.per_sample_feed, EVALUATION_BATCH)[0]

    def contenders(self) -> Iterator[Contender]:
        """Turns of our trainer and of the loop over samples."""
        model, arm = self.run.backbone, self.run.arm
        rows, few = len(self.feed), len(self.per_sample_feed)
        yield Contender(model, arm, "ours", "train", rows, self.train)
        yield Contender(model, arm, "ours", "score", rows, self.score)
        yield Contender(model, arm, "per_sample", "train", few, self.train_per_sample)
        yield Contender(model, arm, "per_sample", "score", few, self.score_per_sample)


def fuxictr_contenders(fuxictr: FuxiCTR, models: Sequence[str], rows: int) -> Iterator[Contender]:
    """FuxiCTR's turns: without knowledge, with its own loader and with batches cut from memory."""
    for model in models:
        for implementation, loader in FUXICTR_LOADERS.items():
            for phase in PHASES:
                turn = partial(fuxictr.seconds, phase, model, loader, rows)
                yield Contender(model, "control", implementation, phase, rows, turn)
