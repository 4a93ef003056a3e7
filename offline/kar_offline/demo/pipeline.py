"""Owns the demo: runs every stage in order, says what each did, and leaves `summary.json` and `report.html`."""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from kar_offline.dataset.movielens import build_dataset
from kar_offline.dataset.samples import Dataset
from kar_offline.demo.replay import replay
from kar_offline.demo.report import write_report
from kar_offline.demo.serving import serving
from kar_offline.encode import encode
from kar_offline.evaluate import CAVEATS, evaluate, evaluation_table
from kar_offline.export import export
from kar_offline.generate import generate
from kar_offline.prompts import render_prompts
from kar_offline.publish import publish
from kar_offline.stage import StageResult
from kar_offline.train import train
from kar_sidecar.release import Release, read_active

__all__ = ["BACKBONES", "SUMMARY", "run_demo"]

BACKBONES: Final = ("dcnv2", "din")
SUMMARY: Final = "summary.json"
REPORT: Final = "report.html"


@dataclass(frozen=True, slots=True)
class _Step:
    """One stage of the demo: what to run, and how to say what came out."""

    name: str
    run: Callable[[], StageResult]
    say: Callable[[Mapping[str, Any]], str]
