"""Owns locks between processes: one holder of a lock file at a time, let go when the holder ends, however it ends."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kar_sidecar.errors import KarError

__all__ = ["held"]


@contextmanager
def held(path: Path, otherwise: KarError) -> Iterator[None]:
    """Hold the lock file `path` inside the block; raises `otherwise` where another process holds it."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise otherwise from error
        yield
