"""Owns the stage `evaluate`: every trained model on the test samples, side by side, with intervals.

Epochs and settings are chosen on validation users; only this stage and the replay read the test split.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.splits import TEST
from kar_offline.evaluate.caveats import caveats_of
from kar_offline.evaluate.metrics import Interval, auc, gauc, logloss, paired_bootstrap
from kar_offline.evaluate.report import NEUTRAL, EvaluationReport, SampleSize
from kar_offline.stage_runner import StageResult, run_stage
from kar_offline.train.arms import ARMS, DEFAULT_ARMS
from kar_offline.train.batches import Batches
from kar_offline.train.checkpoint import load_trained, run_folder
from kar_offline.train.features import FeatureEncodings, encode_dataset
from kar_offline.train.knowledge_inputs import KnowledgeInputs
from kar_offline.train.predict import predict_logits
from kar_offline.train.samples import samples_of_split
from kar_offline.train.stage import DEFAULT_BACKBONES
from kar_offline.work_folder import WorkFolder
from kar_sidecar.errors import PreconditionError

__all__ = ["EVALUATION", "evaluate"]

EVALUATION: Final = "evaluation.json"
VERSION: Final = 3
ONE_SEED: Final = "One split and one seed: intervals cover the choice of test users, not of seeds."
COMPARISONS: Final = (
    ("knowledge", "control"),
    ("knowledge", "raw_text"),
    ("raw_text", "control"),
    (NEUTRAL, "control"),
)
"""Pairs of arms whose AUC is compared."""


def evaluate(
    work: WorkFolder, backbones: Sequence[str] = DEFAULT_BACKBONES, *, seed: int = 0, resamples: int = 1000
) -> StageResult[EvaluationReport]:
    """Evaluate trained models and write `evaluation.json`, the report, to `work.evaluation`.

    Args:
        work: The work folder with trained models.
        backbones: Names of the backbones, each trained with the default arms.
        seed: Seed of the bootstrap.
        resamples: Resamples of the bootstrap.

    Raises:
        PreconditionError: a model is not trained yet, or there are no test samples.
    """
    runs = {f"{backbone}_{arm}": run_folder(work, backbone, arm) for backbone in backbones for arm in DEFAULT_ARMS}

    def build(draft: Path) -> EvaluationReport:
        report = _evaluate(work, backbones, seed=seed, resamples=resamples)
        (draft / EVALUATION).write_text(json.dumps(report.to_json(), indent=2) + "\n")
        return report

    return run_stage(
        "evaluate",
        work.evaluation,
        build,
        inputs={"dataset": work.dataset, "encoding": work.encoding, **runs},
        params={"backbones": list(backbones), "seed": seed, "resamples": resamples},
        version=VERSION,
        report_type=EvaluationReport,
    )


def _evaluate(work: WorkFolder, backbones: Sequence[str], *, seed: int, resamples: int) -> EvaluationReport:
    dataset = work.read(Dataset)
    events = dataset.samples(TEST)
    if not len(events):
        raise PreconditionError("the dataset has no test users: build it with more users")
    labels, users = dataset.labels[events], dataset.event_user[events]
    scores = {backbone: _scores_by_arm(work, dataset, backbone) for backbone in backbones}

    def compare(by_arm: dict[str, NDArray], arm: str, baseline: str) -> Interval:
        return paired_bootstrap(labels, by_arm[arm], by_arm[baseline], users, seed=seed, resamples=resamples)

    return EvaluationReport(
        auc={name: {arm: auc(labels, p) for arm, p in by_arm.items()} for name, by_arm in scores.items()},
        logloss={name: {arm: logloss(labels, p) for arm, p in by_arm.items()} for name, by_arm in scores.items()},
        gauc={name: {arm: gauc(labels, p, users) for arm, p in by_arm.items()} for name, by_arm in scores.items()},
        calibration={
            name: {arm: float(p.mean() / labels.mean()) for arm, p in by_arm.items()} for name, by_arm in scores.items()
        },
        intervals={
            name: {f"{arm}_minus_{baseline}": compare(by_arm, arm, baseline) for arm, baseline in COMPARISONS}
            for name, by_arm in scores.items()
        },
        test=SampleSize(users=len(np.unique(users)), samples=len(labels)),
        caveats=(*caveats_of(dataset), ONE_SEED),
    )


def _scores_by_arm(work: WorkFolder, dataset: Dataset, backbone: str) -> dict[str, NDArray]:
    """Probabilities [S] of the test samples by arm; `NEUTRAL` is the knowledge model without knowledge."""
    scores: dict[str, NDArray] = {}
    for arm in DEFAULT_ARMS:
        trained = load_trained(work, backbone, arm)
        data = encode_dataset(dataset, FeatureEncodings(trained.encodings, trained.item_ids))
        samples, model = samples_of_split(data, TEST), trained.model
        inputs = {
            arm: KnowledgeInputs.for_serving(ARMS[arm], dataset, trained.affinity, work.encoding, seed=trained.seed)
        }
        if arm == "knowledge":
            inputs[NEUTRAL] = inputs[arm].without_knowledge_of(("user", "item"))
        for name, knowledge_inputs in inputs.items():
            logits = predict_logits(model, Batches(data, samples, knowledge_inputs))
            scores[name] = torch.sigmoid(logits).numpy()
    return scores
