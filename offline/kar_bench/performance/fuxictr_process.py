"""Owns FuxiCTR as another process: an environment of its own with FuxiCTR from PyPI, and the data it trains on."""

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
    """Make a virtual environment with FuxiCTR and this process' version of torch, unless it is there.

    Returns:
        Versions of what was installed, in words.

    Raises:
        UnavailableError: pip cannot install it; the text has pip's last line.
    """
    torch = importlib.metadata.version("torch").split("+")[0]
    wanted = f"fuxictr {VERSION}, torch {torch}"
    marker, python = environment / "kar-installed", environment / "bin" / "python"
    if marker.is_file() and marker.read_text() == wanted:
        return wanted
    pip = [str(python), "-m", "pip", "install", "--quiet", f"torch=={torch}", f"fuxictr=={VERSION}"]
    for command in ([sys.executable, "-m", "venv", str(environment)], pip):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = ((done.stderr or done.stdout).strip() or "no reason given").splitlines()[-1]
            raise UnavailableError(f"FuxiCTR could not be installed ({reason}): check the way to PyPI")
    marker.write_text(wanted)
    return wanted


def write_task(folder: Path, data: EncodedDataset, settings: TrainSettings) -> None:
    """Write what the runner reads: `task.json` and every split's columns, rows in random order for training."""
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
    """The runner between enter and exit: one process, one thread, one command at a time."""

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
        """End it."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def seconds(self, command: Literal["train", "score"], model: str, loader: Loader, rows: int) -> float:
        """Seconds to train on the first rows or to score them; raises as `ask` does."""
        return float(self.ask(command, model, loader, rows)["seconds"])

    def ask(self, command: Literal["train", "score", "fit"], model: str, loader: Loader, number: int) -> dict[str, Any]:
        """What the runner answers.

        Raises:
            UnavailableError: it broke down; the text has its last words.
        """
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise RuntimeError("FuxiCTR is used outside of `with`")
        try:
            process.stdin.write(json.dumps([command, model, loader, number]) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass
        if answer := process.stdout.readline():
            return dict(json.loads(answer))
        said = self._log.read_text().strip().splitlines() or ["it said nothing"]
        raise UnavailableError(f"FuxiCTR broke down ({said[-1]}): see {self._log}")
