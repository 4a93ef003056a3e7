"""Owns the demo: every stage in order, one line on what each did, then `summary.json` and `report.html`."""

import json
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final, TypeVar

from rich.console import Console

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
from kar_offline.replay.online import SEED, replay_release, replay_table
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
"""The backbone whose release the demo serves; the other one's lies beside it."""

R = TypeVar("R")


class _Walk:
    """The stages so far: prints a line for each and remembers it for the summary."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.rows: list[dict[str, Any]] = []

    def step(self, name: str, run: Callable[[], StageResult[R]], say: Callable[[R], str]) -> R:
        """Run one stage and tell what came out; returns its report."""
        began = time.perf_counter()
        with self._console.status(f"{name} ..."):
            result = run()
        self.tell(name, result.ran, time.perf_counter() - began, say(result.report))
        return result.report

    def tell(self, name: str, ran: bool, seconds: float, said: str) -> None:
        """Print and remember one stage."""
        self.rows.append({"name": name, "ran": ran, "seconds": seconds})
        state = f"{seconds:.1f} s" if ran else "up to date"
        self._console.print(f"[bold]{name:>13}[/]  {state:>10}  {said}", highlight=False, soft_wrap=True)


def run_demo(
    work: WorkFolder, *, users: int | None, requests: int, candidates: int, console: Console
) -> dict[str, Any]:
    """Run every stage below `work`, those that are up to date excepted; returns what `summary.json` holds.

    Args:
        work: The work folder.
        users: Keep only so many users, for a quick trial; None: all.
        requests: Requests that latency is measured over.
        candidates: Candidates of a request.
        console: Where progress and results are shown.
    """
    began = time.perf_counter()
    walk = _Walk(console)
    data = walk.step(
        "dataset",
        lambda: build_dataset(work, MovieLens100K(users)),
        lambda r: f"{r.samples:,} samples, {r.positive_ratio:.2%} positive, {r.users} users, from {r.source}",
    )
    walk.step(
        "prompts",
        lambda: render_prompts(work),
        lambda r: ", ".join(f"{kind['prompts']:,} of {kind['template']}" for kind in r["kinds"].values()),
    )
    walk.step(
        "generate",
        lambda: generate(work, Pack.load(PACK)),
        lambda r: (
            f"{r['records']:,} texts from the released {r['source']}, {r['quarantined']} refused by checks: "
            "no language model was called"
        ),
    )
    walk.step(
        "encode",
        lambda: encode(work, mini_lm(), console=console),
        lambda r: f"{r['encoded']:,} texts encoded, {r['reused']:,} reused, by {r['encoder_id']}",
    )
    walk.step(
        "train",
        lambda: train_with_progress(work, list(DEFAULT_BACKBONES), list(DEFAULT_ARMS), TrainSettings(), 2, console),
        lambda r: f"{len(r.runs)} models: {', '.join(DEFAULT_BACKBONES)}, each with {', '.join(DEFAULT_ARMS)}",
    )
    quality = walk.step("evaluate", lambda: evaluate(work), lambda r: f"{r.test.samples:,} test samples")
    console.print(evaluation_table(quality))
    for backbone in DEFAULT_BACKBONES:
        exported = walk.step(
            f"export {backbone}",
            partial(export, work, backbone, activate=backbone == SERVED),
            lambda r: f"release {r['release_id']}{', active' if r['active'] else ''}, {r['bytes'] / 1e6:.1f} MB",
        )
        walk.step(
            "publish",
            partial(publish, work, exported["release_id"], f"lmdb:{work.store}"),
            lambda r: f"{r.users:,} users and {r.items:,} items in {r.store}",
        )
    with console.status("serve and rank ..."):
        ranked_at = time.perf_counter()
        online = replay_release(work, None, requests=requests, candidates=candidates, seed=SEED, console=console)
    walk.tell("serve, rank", True, time.perf_counter() - ranked_at, "through Triton and the gRPC sidecar")
    console.print(replay_table(online))
    summary = {
        "dataset": "MovieLens-100K",
        "samples": data.samples,
        "positive_ratio": data.positive_ratio,
        "release_id": read_active(work.releases),
        **{name: quality.to_json()[name] for name in ("auc", "logloss", "gauc", "intervals", "caveats")},
        **online,
        "stages": walk.rows,
        "machine": f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, Python {platform.python_version()}",
        "seconds": time.perf_counter() - began,
    }
    (work.root / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    write_report(summary, work.root / REPORT)
    _say_what_next(work, summary["seconds"], console)
    return summary


def _say_what_next(work: WorkFolder, seconds: float, console: Console) -> None:
    console.print(
        f"\nDone in {seconds:.0f} s. Look at [bold]{work.root / REPORT}[/] and {work.root / SUMMARY}; every stage's "
        f"folder lies in {work}.\nTry next:\n"
        f"  kar prompts --show 2 --work {work}             what a language model would be asked\n"
        f"  kar generate --llm local --limit 3 --work {work}   ask one, here (and see why checks are needed)\n"
        f"  kar serve --work {work}                        then the client of the README",
        highlight=False,
        soft_wrap=True,
    )
