"""Owns FuxiCTR's process: its own environment with FuxiCTR from PyPI, and the data that it trains on."""

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

import numpy as np
from torch import Tensor

from kar_offline.dataset.splits import SPLITS
from kar_offline.train.features import EncodedDataset
from kar_offline.train.samples import samples_of_split
from kar_offline.train.settings import TrainSettings
from kar_sidecar.errors import UnavailableError
from kar_sidecar.features import MAX_RATING_BUCKET

__all__ = ["SHAPE", "VERSION", "FuxiCTR", "Loader", "install", "write_task"]

VERSION: Final = "2.3.10"
SHAPE: Final[Mapping[str, Any]] = {"embedding": 32, "crosses": 3, "attention": 36, "hidden": (200, 80), "dropout": 0.2}
"""Sizes of both models, the defaults of `kar_offline.models`."""
RUNNER: Final = Path(__file__).with_name("fuxictr_runner.py")
Loader = Literal["npz", "memory"]
"""FuxiCTR's own loader, or batches sliced out of tensors."""


def install(environment: Path) -> str:
    """Make a virtual environment with FuxiCTR and this process' version of torch, unless it exists.

    Returns:
        The installed versions, in words.

    Raises:
        UnavailableError: pip cannot install them; the text has pip's last line.
    """
    torch = importlib.metadata.version("torch").split("+")[0]
    versions = f"fuxictr {VERSION}, torch {torch}"
    marker, python = environment / "kar-installed", environment / "bin" / "python"
    if marker.is_file() and marker.read_text() == versions:
        return versions
    pip = [str(python), "-m", "pip", "install", "--quiet", f"torch=={torch}", f"fuxictr=={VERSION}"]
    for command in ([sys.executable, "-m", "venv", str(environment)], pip):
        completed = subprocess.run(command, capture_output=True, text=True)
        if completed.returncode:
            reason = ((completed.stderr or completed.stdout).strip() or "no reason given").splitlines()[-1]
            raise UnavailableError(f"FuxiCTR could not be installed ({reason}): check the connection to PyPI")
    marker.write_text(versions)
    return versions


def write_task(folder: Path, data: EncodedDataset, settings: TrainSettings) -> None:
    """Write the runner's input: `task.json`, and the columns of every split with rows in random order."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = data.spec
    task = {
        **SHAPE,
        "seed": settings.seed,
        "batch": settings.batch,
        "learning_rate": settings.learning_rate,
        "clip_norm": settings.clip_norm,
        "patience": settings.patience,
        "items": spec.items,
        "ratings": MAX_RATING_BUCKET + 1,
        "user_fields": [(field.size, field.width) for field in spec.user_fields],
        "item_fields": [(field.size, field.width) for field in spec.item_fields],
        "user_numbers": spec.user_numbers,
        "item_numbers": spec.item_numbers,
        "categories": data.categories.tolist(),
    }
    (folder / "task.json").write_text(json.dumps(task))
    for number, name in enumerate(SPLITS):
        samples = samples_of_split(data, number)
        order = np.random.default_rng(settings.seed).permutation(len(samples))
        columns: dict[str, Tensor] = {
            "history_item": samples.history_item,
            "history_rating": samples.history_rating,
            "label": samples.label,
        }
        rows = {"user": samples.user, "item": samples.item}
        columns |= {key: column[rows[key.split("_")[0]]] for key, column in data.columns.items()}
        arrays: dict[str, Any] = {key: column.numpy()[order] for key, column in columns.items()}
        np.savez(folder / f"{name}.npz", **arrays)


class FuxiCTR:
    """The runner's process as a context: one thread, one command at a time."""

    def __init__(self, environment: Path, folder: Path) -> None:
        self._command = [str(environment / "bin" / "python"), "-W", "ignore", str(RUNNER), str(folder)]
        self._log = folder / "runner.log"
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        """Start the process."""
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def seconds(self, command: Literal["train", "score"], model: str, loader: Loader, rows: int) -> float:
        """Seconds to train on the first `rows` rows or to score them; raises as `ask` does."""
        return float(self.ask(command, model, loader, rows)["seconds"])

    def ask(self, command: Literal["train", "score", "fit"], model: str, loader: Loader, number: int) -> dict[str, Any]:
        """Send a command to the runner and return its answer.

        Raises:
            UnavailableError: the process ended early; the text has the last line of its log.
        """
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise RuntimeError("enter FuxiCTR with `with` before asking it")
        try:
            process.stdin.write(json.dumps([command, model, loader, number]) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass
        if answer := process.stdout.readline():
            return dict(json.loads(answer))
        log = self._log.read_text().strip().splitlines() or ["its log is empty"]
        raise UnavailableError(f"FuxiCTR ended early ({log[-1]}): see {self._log}")
