"""Owns the evaluation stage: every trained model on the test users, side by side, with intervals.

Models are chosen on validation users; only this stage and the demo's replay read the test split.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.splits import TEST
from kar_offline.evaluate.caveats import caveats_of
from kar_offline.evaluate.metrics import auc, gauc, logloss, paired_bootstrap
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

__all__ = ["EVALUATION", "NEUTRAL", "evaluate"]

EVALUATION: Final = "evaluation.json"
NEUTRAL: Final = "neutral"
"""The knowledge model when nothing is known of the user or of any item: every vector is the neutral one."""
VERSION: Final = 3
ONE_SEED: Final = "One split and one seed: intervals cover the choice of test users, not of seeds."


def _scores(work: WorkFolder, dataset: Dataset, backbone: str, arm: str) -> dict[str, NDArray]:
    """Probabilities of one run on the test samples, for `knowledge` also without any knowledge."""
    trained = load_trained(work, backbone, arm)
    data = encode_dataset(dataset, FeatureEncodings(trained.encodings, trained.item_ids))
    samples, model = samples_of_split(data, TEST), trained.model
    given = {arm: KnowledgeInputs.for_serving(ARMS[arm], dataset, trained.affinity, work.encoding, seed=trained.seed)}
    if arm == "knowledge":
        given[NEUTRAL] = given[arm].without_knowledge_of(("user", "item"))
    return {row: torch.sigmoid(predict_logits(model, Batches(data, samples, g))).numpy() for row, g in given.items()}


def _evaluate(work: WorkFolder, backbones: Sequence[str], *, seed: int, resamples: int) -> dict[str, Any]:
    dataset = work.read(Dataset)
    events = dataset.samples(TEST)
    if not len(events):
        raise PreconditionError("the dataset has no test users: build it with more users")
    labels, users = dataset.labels[events], dataset.event_user[events]
    report: dict[str, Any] = {name: {} for name in ("auc", "logloss", "gauc", "calibration", "intervals")}
    for backbone in backbones:
        scores: dict[str, NDArray] = {}
        for arm in DEFAULT_ARMS:
            scores |= _scores(work, dataset, backbone, arm)
        report["auc"][backbone] = {row: auc(labels, p) for row, p in scores.items()}
        report["logloss"][backbone] = {row: logloss(labels, p) for row, p in scores.items()}
        report["gauc"][backbone] = {row: gauc(labels, p, users) for row, p in scores.items()}
        report["calibration"][backbone] = {row: float(p.mean() / labels.mean()) for row, p in scores.items()}
        report["intervals"][backbone] = {
            f"{ours}_minus_{theirs}": paired_bootstrap(
                labels, scores[ours], scores[theirs], users, seed=seed, resamples=resamples
            )
            for ours, theirs in (
                ("knowledge", "control"),
                ("knowledge", "raw_text"),
                ("raw_text", "control"),
                (NEUTRAL, "control"),
            )
        }
    test = {"users": len(np.unique(users)), "samples": len(labels)}
    return {**report, "test": test, "caveats": [*caveats_of(dataset), ONE_SEED]}


def evaluate(
    work: WorkFolder, backbones: Sequence[str] = DEFAULT_BACKBONES, *, seed: int = 0, resamples: int = 1000
) -> StageResult:
    """Write `work`/evaluation/evaluation.json, which is also the stage's report.

    It holds `auc`, `logloss` (nats), `gauc` and `calibration` (mean prediction over mean label) as
    {backbone: {control, raw_text, knowledge, neutral}}, `intervals` as {backbone: {"a_minus_b": Interval}} of AUC
    differences, the size of the test split and the caveats.

    Raises:
        PreconditionError: a model is not trained yet, or there are no test users.
    """
    runs = {f"{backbone}_{arm}": run_folder(work, backbone, arm) for backbone in backbones for arm in DEFAULT_ARMS}
    inputs: Mapping[str, Path] = {"dataset": work.dataset, "encoding": work.encoding, **runs}

    def build(draft: Path) -> dict[str, Any]:
        report = _evaluate(work, backbones, seed=seed, resamples=resamples)
        (draft / EVALUATION).write_text(json.dumps(report, indent=2) + "\n")
        return report

    params = {"backbones": list(backbones), "seed": seed, "resamples": resamples}
    return run_stage("evaluate", work.evaluation, build, inputs=inputs, params=params, version=VERSION)
