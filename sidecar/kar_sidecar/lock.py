"""Owns locks between processes: a lock file has one holder at a time, and is free again when that process ends."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kar_sidecar.errors import KarError

__all__ = ["held"]


@contextmanager
def held(path: Path, otherwise: KarError) -> Iterator[None]:
    """Hold the lock file `path` inside the block; raises `otherwise` when another process holds it."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise otherwise from error
        yield
