"""Owns a `kar serve` of one's own: started on free loopback ports for the length of a block, stopped after it."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kar_offline.work_folder import WorkFolder
from kar_sidecar.errors import InputError, UnavailableError
from kar_sidecar.releases.serving_view import Mode

__all__ = ["ServingAddresses", "read_ready_file", "serving"]

START_TIMEOUT_S: Final = 120.0
STOP_TIMEOUT_S: Final = 30.0
POLL_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class ServingAddresses:
    """Where one `kar serve` answers."""

    grpc: str
    triton_metrics: str


def read_ready_file(path: Path) -> ServingAddresses:
    """Where a running `kar serve --ready-file` answers.

    Raises:
        InputError: it is not such a file, or nothing is ready.
    """
    try:
        ready = json.loads(path.read_text())
        return ServingAddresses(ready["grpc"], ready["triton_metrics"])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} is no ready file of a running `kar serve` ({error}): start one") from error


@contextmanager
def serving(work: WorkFolder, mode: Mode | None = None) -> Iterator[ServingAddresses]:
    """Serve the active release of a work folder until the block ends, in `mode` or as the settings say.

    Raises:
        UnavailableError: it did not get ready; the text names its log.
    """
    folder = work.serving
    folder.mkdir(parents=True, exist_ok=True)
    ready, log = folder / "ready.json", folder / "serve.log"
    ready.unlink(missing_ok=True)
    serve = ["serve", "--work", str(work), "--port", "0", "--ready-file", str(ready)]
    serve += ["--mode", mode] if mode else []
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "kar_sidecar", *serve],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not ready.is_file():
            if process.poll() is not None or time.monotonic() > deadline:
                raise UnavailableError(f"kar serve did not get ready: {log.read_text().strip()} (log: {log})")
            time.sleep(POLL_S)
        yield read_ready_file(ready)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
