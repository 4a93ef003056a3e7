"""Owns a `kar serve` process for the duration of a block of code, on free loopback ports."""

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
    """Addresses of a running `kar serve`."""

    grpc: str
    triton_metrics: str


def read_ready_file(path: Path) -> ServingAddresses:
    """Read the addresses that `kar serve --ready-file` wrote.

    Raises:
        InputError: the file does not exist or is not a ready file.
    """
    try:
        ready = json.loads(path.read_text())
        return ServingAddresses(ready["grpc"], ready["triton_metrics"])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} is not a ready file of a running `kar serve` ({error}): start one") from error


@contextmanager
def serving(work: WorkFolder, mode: Mode | None = None) -> Iterator[ServingAddresses]:
    """Serve the active release of a work folder until the block ends.

    Args:
        work: The work folder.
        mode: The serving mode; None: as the settings say.

    Raises:
        UnavailableError: serving did not become ready; the message names its log.
    """
    folder = work.serving
    folder.mkdir(parents=True, exist_ok=True)
    ready_file, log = folder / "ready.json", folder / "serve.log"
    ready_file.unlink(missing_ok=True)
    arguments = ["serve", "--work", str(work), "--port", "0", "--ready-file", str(ready_file)]
    arguments += ["--mode", mode] if mode else []
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "kar_sidecar", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not ready_file.is_file():
            if process.poll() is not None or time.monotonic() > deadline:
                raise UnavailableError(f"kar serve did not become ready: {log.read_text().strip()} (log: {log})")
            time.sleep(POLL_S)
        yield read_ready_file(ready_file)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
