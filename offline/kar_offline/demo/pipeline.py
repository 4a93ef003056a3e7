"""Owns the demo: all stages in order, one printed line per stage, then `summary.json` and `report.html`."""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Final, NamedTuple

from rich.console import Console, RenderableType

from kar_offline.dataset.movielens_100k import MovieLens100K
from kar_offline.dataset.stage import build_dataset
from kar_offline.demo.report import write_report
from kar_offline.encode import encode
from kar_offline.encoders.packaged import mini_lm
from kar_offline.evaluate import evaluate, evaluation_table
from kar_offline.export import export
from kar_offline.generate import Pack, generate
from kar_offline.prompts import render_prompts
from kar_offline.publish import publish
from kar_offline.replay.report import ReplayReport, replay_table
from kar_offline.replay.stage import SEED, replay_release
from kar_offline.stage_runner import StageResult
from kar_offline.train import DEFAULT_ARMS, DEFAULT_BACKBONES
from kar_offline.train.command import train_with_progress
from kar_offline.train.settings import TrainSettings
from kar_offline.work_folder import WorkFolder
from kar_sidecar.releases.manifest import read_active

__all__ = ["REPORT", "SUMMARY", "run_demo"]

PACK: Final = "ml-100k"
SUMMARY: Final = "summary.json"
REPORT: Final = "report.html"
SERVED: Final = "dcnv2"
"""The backbone whose release the demo serves; the other backbone is exported too."""

Reports = Mapping[str, Any]
"""Reports of the stages that ran, by the stage's name."""


class _Stage(NamedTuple):
    """One stage of the demo."""

    name: str
    run: Callable[[Reports], StageResult[Any]]
    describe: Callable[[Any], str]
    """Gives the line to print about the report."""
    table: Callable[[Any], RenderableType] | None = None
    """Gives the table to print of the report."""


def run_demo(
    work: WorkFolder, *, users: int | None, requests: int, candidates: int, console: Console
) -> dict[str, Any]:
    """Run every stage that is not up to date, and write the summary and the report page.

    Args:
        work: The work folder.
        users: Keep only this number of users, for a quick trial; None: all.
        requests: Number of requests that latency is measured over.
        candidates: Number of candidates of a request.
        console: Shows progress and results.

    Returns:
        The content of `summary.json`.
    """
    began = time.perf_counter()
    reports: dict[str, Any] = {}
    rows = []
    for stage in _stages(work, users, requests, candidates, console):
        stage_began = time.perf_counter()
        with console.status(f"{stage.name} ..."):
            result = stage.run(reports)
        seconds = time.perf_counter() - stage_began
        reports[stage.name] = result.report
        rows.append({"name": stage.name, "ran": result.ran, "seconds": seconds})
        state = f"{seconds:.1f} s" if result.ran else "up to date"
        line = f"[bold]{stage.name:>13}[/]  {state:>10}  {stage.describe(result.report)}"
        console.print(line, highlight=False, soft_wrap=True)
        if stage.table:
            console.print(stage.table(result.report))
    dataset, quality = reports["dataset"], reports["evaluate"].to_json()
    summary = {
        "dataset": "MovieLens-100K",
        "samples": dataset.samples,
        "positive_ratio": dataset.positive_ratio,
        "release_id": read_active(work.releases),
        **{name: quality[name] for name in ("auc", "logloss", "gauc", "intervals", "caveats")},
        **asdict(reports["serve, rank"]),
        "stages": rows,
        "machine": f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, Python {platform.python_version()}",
        "seconds": time.perf_counter() - began,
    }
    (work.root / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    write_report(summary, work.root / REPORT)
    _print_next_steps(work, summary["seconds"], console)
    return summary


def _stages(work: WorkFolder, users: int | None, requests: int, candidates: int, console: Console) -> list[_Stage]:
    """All stages, in order."""
    return [
        _Stage(
            "dataset",
            lambda _: build_dataset(work, MovieLens100K(users)),
            lambda r: f"{r.samples:,} samples, {r.positive_ratio:.2%} positive, {r.users} users, from {r.source}",
        ),
        _Stage(
            "prompts",
            lambda _: render_prompts(work),
            lambda r: ", ".join(f"{kind['prompts']:,} of {kind['template']}" for kind in r["kinds"].values()),
        ),
        _Stage(
            "generate",
            lambda _: generate(work, Pack.load(PACK)),
            lambda r: (
                f"{r['records']:,} texts from the released {r['source']}, {r['quarantined']} refused by checks: "
                "no language model was called"
            ),
        ),
        _Stage(
            "encode",
            lambda _: encode(work, mini_lm(), console=console),
            lambda r: f"{r.encoded:,} texts encoded, {r.reused:,} reused, by {r.encoder_id}",
        ),
        _Stage(
            "train",
            lambda _: train_with_progress(
                work, list(DEFAULT_BACKBONES), list(DEFAULT_ARMS), TrainSettings(), 2, console
            ),
            lambda r: f"{len(r.runs)} models: {', '.join(DEFAULT_BACKBONES)}, each with {', '.join(DEFAULT_ARMS)}",
        ),
        _Stage("evaluate", lambda _: evaluate(work), lambda r: f"{r.test.samples:,} test samples", evaluation_table),
        *(stage for backbone in DEFAULT_BACKBONES for stage in _release_stages(work, backbone)),
        _Stage(
            "serve, rank",
            lambda _: _replay(work, requests, candidates, console),
            lambda _: "through Triton and the gRPC sidecar",
            replay_table,
        ),
    ]


def _release_stages(work: WorkFolder, backbone: str) -> list[_Stage]:
    """Export and publish the release of one backbone."""
    name = f"export {backbone}"
    return [
        _Stage(
            name,
            lambda _: export(work, backbone, activate=backbone == SERVED),
            lambda r: f"release {r.release_id}{', active' if r.active else ''}, {r.bytes / 1e6:.1f} MB",
        ),
        _Stage(
            "publish",
            lambda reports: publish(work, reports[name].release_id, f"lmdb:{work.store}"),
            lambda r: f"{r.users:,} users and {r.items:,} items in {r.store}",
        ),
    ]


def _replay(work: WorkFolder, requests: int, candidates: int, console: Console) -> StageResult[ReplayReport]:
    began = time.perf_counter()
    report = replay_release(work, None, requests=requests, candidates=candidates, seed=SEED, console=console)
    return StageResult("replay", work.serving, True, time.perf_counter() - began, report)


def _print_next_steps(work: WorkFolder, seconds: float, console: Console) -> None:
    console.print(
        f"\nDone in {seconds:.0f} s. Look at [bold]{work.root / REPORT}[/] and {work.root / SUMMARY}; every stage's "
        f"folder lies in {work}.\nTry next:\n"
        f"  kar prompts --show 2 --work {work}             what a language model would be asked\n"
        f"  kar generate --llm local --limit 3 --work {work}   ask one, here (and see why checks are needed)\n"
        f"  kar serve --work {work}                        then the client of the README",
        highlight=False,
        soft_wrap=True,
    )
