"""FuxiCTR's process: the data that it gets, and how its failure is reported."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.support.work_folders import QUICK_TRAINING, batches_of

from kar_bench.performance.train.fuxictr_process import FuxiCTR, write_task
from kar_offline.train.samples import samples_of_split
from kar_sidecar.errors import UnavailableError


def test_a_process_that_ends_early_is_reported_with_the_last_line_of_its_log(work, tmp_path):
    python = tmp_path / "peer" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho out of luck >&2\n")
    python.chmod(0o755)
    with FuxiCTR(tmp_path / "peer", tmp_path) as fuxictr, pytest.raises(UnavailableError, match="out of luck"):
        fuxictr.ask("train", "dcnv2", "npz", 8)


def test_fuxictr_gets_every_split_and_no_other_row(work, tmp_path):
    data = batches_of(work, "control").data
    write_task(tmp_path, data, QUICK_TRAINING)
    for number, name in enumerate(("train", "validation", "test")):
        with np.load(tmp_path / f"{name}.npz") as arrays:
            samples = samples_of_split(data, number)
            assert arrays["label"].sum() == samples.label.sum()
            assert sorted(arrays["item_index"].tolist()) == sorted(data.columns["item_index"][samples.item].tolist())


@pytest.mark.skipif("FUXICTR_ENVIRONMENT" not in os.environ, reason="FUXICTR_ENVIRONMENT names no environment")
@pytest.mark.parametrize("name", ["dcnv2", "din"])
def test_a_real_fuxictr_trains_and_scores(work, tmp_path, name):
    data = batches_of(work, "control").data
    write_task(tmp_path, data, replace(QUICK_TRAINING, batch=16))
    with FuxiCTR(Path(os.environ["FUXICTR_ENVIRONMENT"]), tmp_path) as fuxictr:
        for loader in ("npz", "memory"):
            assert fuxictr.seconds("train", name, loader, 64) > 0
            assert fuxictr.seconds("score", name, loader, 64) > 0
        assert 0 <= fuxictr.ask("fit", name, "memory", 1)["auc"] <= 1
