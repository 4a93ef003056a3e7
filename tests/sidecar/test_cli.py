"""`kar` answers wrong usage with a sentence and an exit code, never a traceback."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from kar_sidecar.cli import main

pytestmark = pytest.mark.service

KAR = Path(sys.executable).with_name("kar")


@dataclass(frozen=True)
class Answer:
    returncode: int | str | None
    stdout: str
    stderr: str


@pytest.fixture
def kar(monkeypatch, capsys):
    """Runs `kar` in this process: a new one would import torch for each command."""

    def run(*arguments: str) -> Answer:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["kar", *arguments])
            for name, value in {"NO_COLOR": "1", "COLUMNS": "200", "OMP_WAIT_POLICY": "passive"}.items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit) as exit_:
                main()
        return Answer(exit_.value.code, *capsys.readouterr())

    return run


def test_the_help_of_the_installed_command_names_every_stage():
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "200"}
    answer = subprocess.run([KAR, "--help"], capture_output=True, text=True, env=environment, timeout=120, check=False)
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
        "replay",
        "demo",
        "sidecar",
    ]
    assert [stage for stage in stages if not re.search(rf"^\W*{stage}\s", answer.stdout, re.MULTILINE)] == []


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["train", "--work", "missing-folder"], "kar dataset", 1),
        (["serve", "--work", "missing-folder"], "kar export", 1),
        (["replay", "--work", "missing-folder"], "kar export", 1),
        (["publish", "--work", "missing-folder"], "kar export", 1),
        (["serve", "--mode", "sideways"], "mode", 2),
        (["replay", "--ready-file", "missing-file"], "kar serve", 2),
        (["replay", "--ready-file", "missing[events.values]"], "missing[events.values]", 2),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_missing_or_wrong_input_gives_one_line(arguments, words, code, kar, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = kar(*arguments)
    assert answer.returncode == code
    assert answer.stderr.startswith("error: ")
    assert answer.stderr.count("\n") == 1
    assert words in answer.stderr


def test_an_unusable_path_gives_one_line(kar, tmp_path):
    (tmp_path / "file").touch()
    answer = kar("dataset", "--work", str(tmp_path / "file"), "--limit", "3")
    assert answer.returncode == 1
    assert answer.stderr.startswith("error: ")
    assert answer.stderr.count("\n") == 1
    assert str(tmp_path / "file") in answer.stderr


def test_an_interrupted_command_says_how_to_continue(tmp_path):
    program = (
        "import os, signal, sys, threading, kar_sidecar.cli as cli\n"
        # Started in the background, a process ignores interrupts.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "@cli.app.command()\n"
        "def wait():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    threading.Event().wait(60)\n"
        "cli._Commands.get_command = cli.TyperGroup.get_command\n"
        "sys.argv = ['kar', 'wait']\n"
        "cli.main()\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 130
    assert "run the same command to go on" in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["no-such-stage"], "No such command"), (["generate", "--llm", "telepathy"], "telepathy")],
    ids=["command", "value"],
)
def test_wrong_usage_says_what_is_wrong(arguments, words, kar):
    answer = kar(*arguments)
    assert answer.returncode == 2
    assert "Traceback" not in answer.stderr
    assert words in answer.stderr
