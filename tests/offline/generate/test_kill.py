"""`kar generate` killed at any moment and started again: nothing completed is paid for twice, all ends complete."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.support.hostile import Hostile
from tests.support.prose import prose

from kar.records.v1 import records_pb2
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.prompts import render_prompts
from kar_offline.work_folder import WorkFolder

pytestmark = pytest.mark.service

FILMS = 60
CONCURRENCY = 4
KILLS = (7, 23, 24)
"""Answers after which the process is killed."""
LIMIT_S = 120.0


def answer(prompt: str) -> str:
    title = re.search(r'title: "([^"]+)"', prompt)
    assert title is not None
    return prose(title[1], prompt)


@pytest.fixture
def work(tmp_path: Path) -> WorkFolder:
    work = WorkFolder(tmp_path / "work")
    work.dataset.mkdir(parents=True)
    Dataset.from_events(
        "made",
        records_pb2.FeatureSchema(history_length=3),
        [Entity("u", {}, {})],
        [Entity(str(n), {}, {"title": f"The Road to Number {n}", "genres": ["Drama"]}) for n in range(FILMS)],
        user=np.zeros(4, np.int64),
        item=np.arange(4),
        rating=np.array([5, 2, 4, 3], dtype=np.float32),
        time=np.arange(4),
        positive_above=3.0,
    ).save(work.dataset)
    render_prompts(work)
    return work


def start(work: WorkFolder, server: Hostile, *options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "kar_sidecar", "generate", "--llm", "openai", "--base-url", server.url),
            *("--model", "m", "--price", "1", "4", "--kind", "item", "--work", str(work), "--show", "0"),
            *("--concurrency", str(CONCURRENCY), "--json", str(work.root / "report.json"), *options),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"NO_PROXY": "127.0.0.1"},
        start_new_session=True,
    )


def run(work: WorkFolder, server: Hostile, *options: str) -> dict[str, object]:
    with start(work, server, *options) as process:
        assert process.stdout is not None
        said = process.stdout.read().decode()
    assert process.returncode == 0, said
    report: dict[str, object] = json.loads((work.root / "report.json").read_text())
    return report


def await_true(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert process.poll() is None, process.stdout and process.stdout.read().decode()
        assert time.monotonic() < end
        time.sleep(0.001)


def ledger(work: WorkFolder) -> list[tuple[str, str]]:
    with sqlite3.connect(work.root / "ledger.sqlite") as database:
        rows = database.execute("SELECT prompt_sha256, state FROM requests").fetchall()
    database.close()
    return rows


def kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)  # the whole session: Ray's agents outlive their driver
    process.communicate()


def test_no_completed_record_is_paid_for_twice(work: WorkFolder) -> None:
    with Hostile(answer, hold_s=0.01) as server:
        for answers in KILLS:
            process = start(work, server)
            await_true(lambda answers=answers: sum(server.answered.values()) >= answers, process)  # type: ignore[misc]
            kill(process)
            done = {prompt for prompt, state in ledger(work) if state == "answered"}
            assert len(done) >= answers - len(KILLS) * CONCURRENCY
        report = run(work, server)
        assert (report["records"], report["quarantined"], report["unanswered"]) == (FILMS, 0, 0)
        requests = sum(server.prompts.values())
        assert FILMS <= requests <= FILMS + len(KILLS) * CONCURRENCY
        assert server.most <= CONCURRENCY
        rows = ledger(work)
        answered = [prompt for prompt, state in rows if state == "answered"]
        assert len(answered) == len(set(answered)) == FILMS
        # What was under way when a process died is all that was asked twice, and the ledger says so.
        uncertain = [prompt for prompt, state in rows if state == "uncertain"]
        assert requests - FILMS <= len(uncertain) == report["uncertain"] <= len(KILLS) * CONCURRENCY
        assert {state for _, state in rows} <= {"answered", "uncertain"}
        assert run(work, server)["calls"] == 0
        assert sum(server.prompts.values()) == requests


def test_on_ray_the_same_holds(work: WorkFolder) -> None:
    pytest.importorskip("ray", reason="ray is missing: install the extra ray")
    with Hostile(answer, hold_s=0.05) as server:
        process = start(work, server, "--runner", "ray", "--workers", "2")
        await_true(lambda: sum(server.answered.values()) >= 10, process)
        kill(process)
        report = run(work, server)  # here or there: the ledger is the same
        assert (report["records"], report["quarantined"], report["unanswered"]) == (FILMS, 0, 0)
        assert FILMS <= sum(server.prompts.values()) <= FILMS + CONCURRENCY
        assert server.most <= 2 * CONCURRENCY  # of a killed driver's actors some may still be waiting


def test_a_batch_is_paid_for_once_wherever_the_kill_falls(work: WorkFolder) -> None:
    for moment in ("create", "poll"):
        folder = WorkFolder(work.root.parent / moment)
        subprocess.run(["cp", "-r", str(work), str(folder)], check=True)
        with Hostile(answer) as server:
            process = start(folder, server, "--batch")
            await_true(lambda moment=moment: moment in server.routes(), process)  # type: ignore[misc]
            kill(process)
            report = run(folder, server, "--batch")
            assert (report["records"], report["unanswered"]) == (FILMS, 0), moment
            assert len(server.batches) == 1, moment
