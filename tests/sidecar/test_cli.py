"""`kar` answers wrong usage with a sentence and an exit code, never a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.service

KAR = Path(sys.executable).with_name("kar")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "200"}
    return subprocess.run([KAR, *arguments], capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_help_names_every_stage():
    answer = run("--help")
    assert answer.returncode == 0
    stages = [
        "dataset",
        "prompts",
        "generate",
        "encode",
        "train",
        "evaluate",
        "export",
        "publish",
        "serve",
        "rank",
        "demo",
        "sidecar",
    ]
    assert [stage for stage in stages if stage not in answer.stdout] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-stage"], "No such command"),
        (["train", "--work", "missing-folder"], "missing-folder"),
        (["serve", "--work", "missing-folder"], "kar export"),
        (["rank", "--work", "missing-folder"], "missing-folder"),
        (["generate", "--work", "missing-folder", "--llm", "telepathy"], "telepathy"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_wrong_usage_is_one_sentence(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = run(*arguments)
    assert answer.returncode in (1, 2)
    assert "Traceback" not in answer.stderr
    assert words in answer.stderr
