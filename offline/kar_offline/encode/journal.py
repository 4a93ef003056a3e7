"""Owns the journal of an encoding run: every vector is appended as soon as it is encoded, so a killed run resumes."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from kar_offline.encoders.text_encoder import TextEncoder

__all__ = ["Vectors", "encode_texts", "read_journal", "text_sha256"]

PROGRESS_COLUMNS: Final = (
    TextColumn("{task.description}"),
    BarColumn(),
    TaskProgressColumn(),
    TimeRemainingColumn(),
)

Vectors = dict[str, NDArray[np.float32]]
"""Vectors [D] by the SHA-256 of their text."""


def text_sha256(text: str) -> str:
    """SHA-256 of a text, as hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def _entry_type(dim: int) -> np.dtype[np.void]:
    return np.dtype([("sha256", np.uint8, 32), ("vector", np.float32, dim)])


def read_journal(path: Path, dim: int) -> Vectors:
    """The vectors of an interrupted run.

    A kill may leave an incomplete last entry, which is removed so that the next run can append.
    """
    entry_type = _entry_type(dim)
    if not path.is_file() or path.stat().st_size < entry_type.itemsize:
        path.unlink(missing_ok=True)
        return {}
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // entry_type.itemsize * entry_type.itemsize)
    entries = np.fromfile(path, entry_type)
    return {entry["sha256"].tobytes().hex(): entry["vector"] for entry in entries}


def encode_texts(
    encoder: TextEncoder, texts: Sequence[str], journal: Path, console: Console | None
) -> Iterator[tuple[Sequence[str], NDArray[np.float32], int]]:
    """Encode texts; yield hashes of n texts, their vectors [n, D] and a token count, once the journal has them."""
    shown = Progress(*PROGRESS_COLUMNS, console=console, disable=console is None, transient=True)
    with journal.open("ab") as file, shown as progress:
        bar = progress.add_task("encoding", total=sum(map(len, texts)))
        for rows, vectors, tokens in encoder.stream(texts):
            digests = [text_sha256(texts[row]) for row in rows]
            entries = np.empty(len(rows), _entry_type(encoder.dim))
            entries["vector"] = vectors
            entries["sha256"] = np.frombuffer(bytes.fromhex("".join(digests)), np.uint8).reshape(-1, 32)
            file.write(entries.tobytes())
            file.flush()
            progress.advance(bar, sum(len(texts[row]) for row in rows))
            yield digests, vectors, tokens
